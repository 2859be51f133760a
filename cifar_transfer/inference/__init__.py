"""Inference: a trained checkpoint used on images."""
