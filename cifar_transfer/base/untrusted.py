"""Files that may be anybody's: refused in a sentence before they hang the program or fill its memory."""

import os
import stat
import zipfile
from pathlib import Path
from typing import BinaryIO

import yaml

from cifar_transfer.base.errors import UserError

MOST_BYTES = 2**20  # of a configuration; one of ours has 3 KB
MOST_VALUES = 100_000  # that it may unfold to
DEEPEST = 50  # levels of lists and maps


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read, if it is one: a pipe that nobody writes into, or a device, would keep the program waiting.

    Raises:
        OSError: As `open`; or it is no regular file.
    """
    # What it is, is asked of the open file: a name may come to mean another one in between.
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(22, "is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_yaml(path: Path) -> str:
    """The text of a configuration, which a reader may then unfold without harm.

    A few lines of aliases of aliases stand for more values than memory holds, and brackets for more levels than the
    reader's stack has.

    Raises:
        UserError: It is no text, too large, too deep, or no YAML.
    """
    with open_regular(path) as file:
        content = file.read(MOST_BYTES + 1)
    try:
        text = content.decode()
        if len(content) > MOST_BYTES or _unfolded(text) > MOST_VALUES:
            raise UserError(
                f"{path} is no configuration of a run: it unfolds to more than {MOST_VALUES:,} values."
            )
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no text in UTF-8 (byte {error.start}): mend or replace it."
        ) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(
            f"{path} cannot be read as YAML (line {line}: {error.problem}): mend it."
        ) from None
    return text


def _unfolded(text: str) -> int:
    """How many values a YAML text stands for, its aliases replaced; beyond the limit it is not read on."""
    inside: list[
        tuple[str | None, int]
    ] = []  # anchor of each list and map that is open, and the values before it
    anchors: dict[str, int] = {}
    values = 0
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            values += anchors.get(event.anchor, MOST_VALUES + 1)  # one within itself has no end
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            anchors |= {event.anchor: 1} if event.anchor else {}
        elif isinstance(event, yaml.CollectionStartEvent):
            inside.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = inside.pop()
            anchors |= {anchor: values - before} if anchor else {}
        if values > MOST_VALUES or len(inside) > DEEPEST:
            return MOST_VALUES + 1
    return values


def check_archive(path: str | Path, most: int | None = None) -> None:
    """Refuse an archive that unpacks to more than so many bytes; None: than it has, as `torch.save` compresses nothing.

    Raises:
        UserError: It does. What is no zip archive at all is left to its reader.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile):
        return
    if unpacked > (os.path.getsize(path) if most is None else most):
        raise UserError(
            f"{path} is not opened: it unpacks to {unpacked:,} bytes, more than such a file can hold."
        )
