"""Features: what a frozen backbone gives its head, computed once."""
