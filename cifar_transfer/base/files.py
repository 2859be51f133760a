"""Files that are complete or not there, whatever happens while they are written; and what those of a run are called."""

import csv
import errno
import io
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cifar_transfer.base.errors import UserError

LOGS = "lightning_logs"  # where runs are, in the current folder
CONFIG, RESULT = "config.yaml", "result.json"  # in a run's folder, the second when it is finished
ABANDONED = 3600  # seconds without a byte, after which a temporary file has lost its writer


def make_folder(folder: Path, option: str) -> None:
    """Make a folder that is not there yet; a `UserError` names the option if it cannot be, say because it is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be made a folder ({error.strerror}).") from None


def require_writable(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be made or written into, without making it; a `UserError` names the option for it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is no folder" if not there.is_dir() else "cannot be written by this user"
        raise UserError(
            f"{folder} cannot be written, because {there} {why}: name another place with {option}=FOLDER."
        )


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path`, in an existing folder, in one move when it is complete and on the disk.

    Until then, and after any error, what was at `path` stays as it was. Each writer has a hidden temporary file of its
    own; what a killed writer has left of it is removed by a later one.

    Raises:
        OSError: It cannot be written.
    """
    name = path.name.replace(
        "tfevents", "events"
    )  # TensorBoard reads every file with "tfevents" in its name
    partial = path.with_name(f".{name}.{secrets.token_hex(8)}.partial")
    remove_partial(path.parent, name, ABANDONED)
    try:
        with partial.open("xb") as file:
            yield file
            sync(file)
        os.replace(partial, path)
    except OSError as error:
        if error.filename in (None, str(partial)):
            error.filename = str(path)  # the name that its reader knows
        raise
    finally:
        with suppress(OSError):  # after the move there is none
            partial.unlink()
    with suppress(OSError):  # not every system can open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the move outlives a power failure
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """As `atomic_write`, in UTF-8, with escapes for what is no text in a name."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, value: object) -> None:
    """As `write_text`, in ASCII, a line for each entry."""
    write_text(path, f"{json.dumps(value, indent=1)}\n")


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """As `write_text`, with the line ends of RFC 4180."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


def sync(file: BinaryIO) -> None:
    """Have what was written on the disk, where the file system knows how: some of a network refuse to be asked."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def remove_partial(folder: Path, name: str | None = None, age: float = 0) -> None:
    """Remove temporary files that killed writers of `name`, or of any file, have left in a folder, but not below.

    Args:
        age: Seconds since they were last written to. Where no other process can be writing, 0 is safe.
    """
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[0-9a-f]{{16}}\.partial")
    for path in folder.glob(".*.partial"):
        with suppress(OSError):
            if pattern.fullmatch(path.name) and time.time() - path.stat().st_mtime >= age:
                path.unlink()
