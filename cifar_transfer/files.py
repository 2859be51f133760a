"""Files that are whole or not there, whatever happens while they are written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` in one move when it is complete and on the disk.

    Until then, and after any error, what was at `path` stays as it was. A killed process leaves a hidden file, which
    the next one to write `path` overwrites.

    Args:
        path: The file; its folder exists.

    Raises:
        OSError: It cannot be written.
    """
    # TensorBoard reads whatever has "tfevents" in its name.
    partial = path.with_name(f".{path.name.replace('tfevents', 'events')}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    with suppress(OSError):  # not every system can open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the move outlives a power failure
        finally:
            os.close(folder)
