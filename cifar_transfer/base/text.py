"""Text for people and files."""

import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

MIN_COLUMNS = 20  # a terminal that says that it has fewer says nothing
# A cell that begins so may be run as a formula: https://owasp.org/www-community/attacks/CSV_Injection
FORMULA_STARTS = ("=", "+", "-", "@")
STYLE = r"\x1b\[\d*m"  # ANSI's, which takes no place
MIN_COLUMN_WIDTH = 3  # Markdown wants three dashes


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up.

    Columns of numbers are aligned to the right, all others to the left.

    Args:
        table: Rows of cells, of equal length. The first row is the heading.
    """
    columns = [_markdown_column(cells) for cells in zip(*table, strict=True)]
    lines = [f"|{'|'.join(row)}|\n" for row in zip(*columns, strict=True)]
    return "".join(lines)


def latex(table: Sequence[Sequence[str]]) -> str:
    r"""Return a LaTeX `tabular`; its first column is aligned to the left, the others to the right.

    Args:
        table: Rows of cells, of equal length. The first row is the heading.
    """
    columns = "l" + "r" * (len(table[0]) - 1)
    heading, *rows = [" & ".join(_latex_cell(cell) for cell in row) for row in table]
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", rf"{heading} \\", r"\hline"]
    for row in rows:
        lines.append(rf"{row} \\")
    lines += [r"\hline", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _latex_cell(text: str) -> str:
    """Return a text whose characters mean themselves in LaTeX."""
    escapes = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    escapes |= {character: f"\\{character}" for character in "&%$#_{}"}
    escapes["±"] = r"$\pm$"
    return "".join(escapes.get(character, character) for character in text)


def _markdown_column(cells: Sequence[str]) -> list[str]:
    """Return the cells of a column at one width, with the line below the heading."""
    width = max(MIN_COLUMN_WIDTH, *map(len, cells))
    is_numeric = all(re.fullmatch(r"(-?[\d.]+( ± [\d.]+)?)?", value) for value in cells[1:])
    if is_numeric:
        rule = "-" * (width + 1) + ":"
        padded = [f" {cell:>{width}} " for cell in cells]
    else:
        rule = "-" * (width + 2)
        padded = [f" {cell:<{width}} " for cell in cells]
    return [padded[0], rule, *padded[1:]]


def wrapped(text: str, stream: TextIO | None) -> str:
    """Return a text with lines that fit a terminal, broken between words; a pipe gets it as it is.

    Args:
        text: The text. Its lines that fit stay as they are.
        stream: Where it will be printed.
    """
    if stream is None or not stream.isatty():
        return text
    # The last column stays free, because some terminals break a line that fills it.
    columns = max(MIN_COLUMNS, shutil.get_terminal_size().columns - 1)
    lines: list[str] = []
    for line in text.split("\n"):
        if len(re.sub(STYLE, "", line)) <= columns:
            lines.append(line)
            continue
        lines += textwrap.wrap(
            line,
            columns,
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
        )
    return "\n".join(lines)


def without_password(text: str) -> str:
    """Return a text without the user and password of its addresses.

    `https://name:password@host/` becomes `https://host/`.
    """
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def printable(text: str) -> str:
    r"""Return a text, such as the name of a file, in one line that files and terminals take.

    Each control character and each byte that is not UTF-8 becomes its escape (`\n`, `\udce9`).
    """
    characters = []
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs"):
            character = ascii(character)[1:-1]
        characters.append(character)
    return "".join(characters)


def spreadsheet_cell(text: str) -> str:
    """Return a text in one line, with a quote before what a spreadsheet would run as a formula."""
    line = printable(text)
    return f"'{line}" if line.startswith(FORMULA_STARTS) else line


def from_spreadsheet_cell(cell: str) -> str:
    """Return the text of a cell without the quote that `spreadsheet_cell` puts before some."""
    if cell.startswith("'") and cell[1:].startswith(FORMULA_STARTS):
        return cell[1:]
    return cell


def composed(text: str) -> str:
    """Return a text in Unicode's form NFC, in which "é" is one character.

    macOS writes it as two in names of files, e and an accent.
    """
    return unicodedata.normalize("NFC", text)


def program(command: str) -> str:
    """Return a command as the user types it, in the form of the one that is running."""
    if Path(sys.argv[0]).stem == "cifar-transfer":
        return f"cifar-transfer {command}"
    return f"python -m cifar_transfer {command}"
