"""Measurements that can be run by hand."""
