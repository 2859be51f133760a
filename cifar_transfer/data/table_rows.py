"""Tables of images and labels: CSV as spreadsheets and programs write it."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from cifar_transfer.base.errors import UserError, first_line
from cifar_transfer.base.text import from_spreadsheet_cell, printable
from cifar_transfer.base.untrusted import open_regular

DELIMITERS = (",", ";", "\t")  # spreadsheets write ";" where "," is the decimal point
MAX_COLUMNS_SHOWN = 8  # names in a message


class TableRow(NamedTuple):
    """A row of a table.

    Attributes:
        line: Line of the file in which the row begins, from 1.
        image: The cell in the column of images.
        label: The cell in the column of labels.
        group: The cell in the column of groups; "" if no such column is read.
    """

    line: int
    image: str
    label: str
    group: str = ""


def read_rows(
    path: Path, image_column: str, label_column: str, group_column: str | None = None
) -> Iterator[TableRow]:
    """Yield the rows of a table, in which no cell of these columns is empty.

    The table has a heading, and is in UTF-8, with or without a byte order mark. Commas, semicolons
    or tabs are between the cells. Empty lines and spaces around a cell do not matter, and other
    columns are not looked at.

    Args:
        path: The file.
        image_column: Name of the column of images.
        label_column: Name of the column of labels.
        group_column: Name of the column of groups, or None to read none.

    Raises:
        UserError: The file cannot be read, lacks a column, or has an unfit row; the text names file
            and line.
    """
    columns = [image_column, label_column]
    if group_column is not None:
        columns.append(group_column)
    try:
        with open_regular(path) as file:
            text = io.TextIOWrapper(file, "utf-8-sig", newline="")
            heading = text.readline()
            delimiter = _delimiter(heading, columns)
            text.seek(0)
            yield from _rows(path, text, delimiter, columns)
    except OSError as error:
        reason = error.strerror or first_line(error)
        place = "" if path.is_absolute() else f", seen from {Path.cwd()}"
        raise UserError(
            f"{path} cannot be read as a table ({reason}){place}: name another file."
        ) from None
    except UnicodeError:
        raise UserError(
            f"{path}, line {_first_undecodable_line(path)}: it is no text in UTF-8: save the table "
            f"as CSV in UTF-8."
        ) from None


def _delimiter(heading: str, columns: Sequence[str]) -> str:
    """Return what is between the cells of a heading, "," if the columns cannot be told apart."""
    for delimiter in DELIMITERS:
        cells = [cell.strip() for cell in next(csv.reader([heading], delimiter=delimiter), [])]
        if set(columns) <= set(cells):
            return delimiter
    return ","


def _rows(path: Path, text: TextIO, delimiter: str, columns: Sequence[str]) -> Iterator[TableRow]:
    """Yield the rows of an open table, the cells of a row in the order of the columns.

    Raises:
        UserError: The table has no heading, lacks a column, or has an unfit row.
    """
    reader = csv.reader(text, delimiter=delimiter)
    positions: list[int] = []
    width = 0
    while True:
        line = reader.line_num + 1
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            break
        except csv.Error as error:
            raise UserError(f"{path}, line {line}: {first_line(error)}: mend the table.") from None
        if not any(cells):
            continue
        if not positions:
            positions = _positions(path, line, cells, columns)
            width = len(cells)
            continue
        if len(cells) > width:
            raise UserError(
                f"{path}, line {line}: the row has {len(cells)} cells, and the heading {width}: "
                f"put cells that have commas into quotes."
            )
        cells += [""] * (width - len(cells))
        for column, position in zip(columns, positions, strict=True):
            if not cells[position]:
                raise UserError(f"{path}, line {line}: the cell of {column} is empty: fill it.")
        yield TableRow(line, *(from_spreadsheet_cell(cells[position]) for position in positions))
    if not positions:
        raise UserError(
            f"{path} is empty: it needs a heading, {','.join(columns)}, and a row for each image."
        )


def _positions(path: Path, line: int, cells: list[str], columns: Sequence[str]) -> list[int]:
    """Return the places of the columns in a heading."""
    positions = []
    for column in columns:
        if column not in cells:
            shown = ", ".join(printable(cell) for cell in cells[:MAX_COLUMNS_SHOWN])
            raise UserError(
                f"{path}, line {line}: the heading has no column {column}, but {shown}: name the "
                f"columns with image_column=NAME and label_column=NAME, and groups with "
                f"group_column=NAME."
            )
        positions.append(cells.index(column))
    return positions


def _first_undecodable_line(path: Path) -> int:
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeError:
                return number
    return 1  # it was written to meanwhile
