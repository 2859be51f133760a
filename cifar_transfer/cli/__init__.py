"""Command lines: the first second of a command, and the parsers of their options."""
