"""The commands: each parses its options, calls one room, and prints."""
