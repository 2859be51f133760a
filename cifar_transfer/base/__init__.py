"""Errors in one sentence, text, files and downloads, for every other room."""
