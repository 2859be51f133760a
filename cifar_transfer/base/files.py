"""Files that are complete or absent, whatever happens while they are written."""

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
from itertools import count
from pathlib import Path
from typing import BinaryIO

from cifar_transfer.base.errors import UserError

LOGS = "lightning_logs"  # folder of the runs, in the current folder
CONFIG = "config.yaml"  # in the folder of a run
RESULT = "result.json"  # in the folder of a finished run
ABANDONED_SECONDS = 3600  # without a byte, after which a temporary file has lost its writer


def user_path(path: str | Path) -> Path:
    """Return a path whose `~` at the beginning, if any, has become the user's home.

    Shells expand it in `NAME ~/x`, but not in `--option=~/x`, nor in files of options. What names
    no home here stays as it is.
    """
    return Path(os.path.expanduser(path))


def file_version(path: str | Path) -> list[int]:
    """Return numbers that change when a file is written to or replaced.

    Size and time of writing alone would not tell: `cp -p`, rsync and archives set that time. The
    time of the last change of the file's entry, and its number on the disk, cannot be set.

    Raises:
        OSError: The file is missing or cannot be looked at.
    """
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def make_folder(folder: Path, option: str) -> None:
    """Make a folder unless it exists.

    Raises:
        UserError: The folder cannot be made, for example because it is a file. The text names the
            option that gave the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be made a folder ({error.strerror}).") from None


def new_versions(folder: Path) -> Iterator[Path]:
    """Yield folders in a folder, `version_N`, which do not exist; the folder need not exist."""
    numbers = [-1]
    for path in folder.glob("version_*"):
        number = path.name.removeprefix("version_")
        if number.isdecimal():
            numbers.append(int(number))
    for next_number in count(max(numbers) + 1):
        yield folder / f"version_{next_number}"


def require_writable(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be made or written into, without making it.

    Raises:
        UserError: The text names the option that gives another folder.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        reason = "is no folder"
    elif not os.access(place, os.W_OK | os.X_OK):
        reason = "cannot be written by this user"
    else:
        return
    raise UserError(
        f"{folder} cannot be written, because {place} {reason}: name another place with "
        f"{option}=FOLDER."
    )


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a file that replaces `path` in one move, when it is complete and on the disk.

    Until then, and after any error, what was at `path` stays as it was. Each writer has its own
    hidden temporary file; a later writer removes what a killed one has left.

    Args:
        path: The file, in an existing folder.

    Yields:
        The temporary file.

    Raises:
        OSError: The file cannot be written.
    """
    # TensorBoard reads every file with "tfevents" in its name.
    name = path.name.replace("tfevents", "events")
    partial = path.with_name(f".{name}.{secrets.token_hex(8)}.partial")
    remove_partial(path.parent, name, ABANDONED_SECONDS)
    try:
        with partial.open("xb") as file:
            yield file
            _sync(file)
        os.replace(partial, path)
    except OSError as error:
        if error.filename in (None, str(partial)):
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        with suppress(OSError):  # after the move there is none
            partial.unlink()
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text like `atomic_write`, in UTF-8, with escapes for undecodable bytes of names."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, value: object) -> None:
    """Write JSON like `atomic_write`, in ASCII, with a line for each entry."""
    write_text(path, f"{json.dumps(value, indent=1)}\n")


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write CSV like `atomic_write`, with the line ends of RFC 4180."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


def remove_partial(folder: Path, name: str | None = None, min_seconds: float = 0) -> None:
    """Remove temporary files that killed writers have left in a folder, but not in its folders.

    Args:
        folder: The folder.
        name: Name of the file that they were writing; None for any file.
        min_seconds: Time since a file was last written to. 0 is safe where no other process can
            be writing.
    """
    file_name = ".+"
    if name is not None:
        file_name = re.escape(name)
    pattern = re.compile(rf"\.{file_name}\.[0-9a-f]{{16}}\.partial")
    for path in folder.glob(".*.partial"):
        if not pattern.fullmatch(path.name):
            continue
        with suppress(OSError):
            if time.time() - path.stat().st_mtime >= min_seconds:
                path.unlink()


def _sync(file: BinaryIO) -> None:
    """Have a file's bytes written to the disk, except where a network's file system refuses."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def _sync_folder(folder: Path) -> None:
    """Have a folder written to the disk, so that a move in it outlives a power failure."""
    with suppress(OSError):  # not every system can open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
