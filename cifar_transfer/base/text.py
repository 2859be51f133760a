"""Text for people and files, made of plain strings."""

import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up: numbers to the right, words to the left; its first row is the heading."""
    columns = []
    for heading, *cells in zip(*table, strict=True):
        width = max(3, *map(len, (heading, *cells)))
        right = all(re.fullmatch(r"[\d.]*", cell) for cell in cells)
        heading, *cells = [
            f" {cell:>{width}} " if right else f" {cell:<{width}} " for cell in (heading, *cells)
        ]
        columns.append([heading, "-" * (width + 1) + (":" if right else "-"), *cells])
    return "".join(f"|{'|'.join(row)}|\n" for row in zip(*columns, strict=True))


def without_password(text: str) -> str:
    """A text whose addresses (`https://name:password@host/`) have no user and password, to be kept or shown."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def printable(text: str) -> str:
    """A text, such as a file's name, in one line that any file, terminal or figure takes.

    Each control character and each byte that is no UTF-8 becomes its escape (`\\n`, `\\udce9`).
    """
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def program(command: str) -> str:
    """Return a command as it is to be typed, in the form in which the running one was typed."""
    if Path(sys.argv[0]).stem == "cifar-transfer":
        return f"cifar-transfer {command}"
    return f"python -m cifar_transfer {command}"
