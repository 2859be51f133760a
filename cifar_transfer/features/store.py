"""Features on disk: one array for each backbone, split and view, as a `.npy` file.

An array is written whole: its rows go into a temporary file, which gets the array's name once all
of them are there. So whatever a killed process leaves behind is never taken for features.
"""

import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import platformdirs
from lightning.pytorch.strategies import Strategy

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import atomic_write, make_folder

DEFAULT_LIMIT_GB = 20.0  # of all features in a folder, 1e9 bytes each
FILE_NAME = re.compile(r"features-[0-9a-f]{32}\.npy")


def default_folder() -> Path:
    """Return the folder of features in the user's cache."""
    return platformdirs.user_cache_path("cifar_transfer") / "features"


@dataclass(frozen=True)
class FeatureFile:
    """The file of one array of features, float32 [N, D].

    Args:
        path: Where the file is, or will be.
        count: N, the number of images.
        width: D, the numbers of each image.
    """

    path: Path
    count: int
    width: int

    @property
    def num_bytes(self) -> int:
        """Size of the array."""
        return self.count * self.width * np.dtype(np.float32).itemsize

    def read(self) -> np.ndarray:
        """Return the array, float32 [N, D], memory-mapped and read-only.

        Raises:
            OSError: The file is missing or cannot be read.
            ValueError: The file was cut short, or holds something else.
        """
        array = np.lib.format.open_memmap(self.path, mode="r")
        if array.shape != (self.count, self.width) or array.dtype != np.float32:
            raise ValueError(f"{self.path} holds an array of {array.dtype} {array.shape}.")
        return array

    def is_whole(self) -> bool:
        """Return whether the array can be read."""
        try:
            self.read()
        except (OSError, ValueError):
            return False
        return True

    @contextmanager
    def write(self, strategy: Strategy) -> Iterator[Any]:
        """Yield the array to be filled, memory-mapped; all processes of a strategy share it.

        The file gets its name when every process has left the context.

        Raises:
            OSError: The file cannot be written, for example because the disk is full.
        """
        with ExitStack() as stack:
            temporary_name = ""
            if strategy.is_global_zero:
                file = stack.enter_context(atomic_write(self.path))
                self._allocate(file)
                temporary_name = file.name
            temporary_name = strategy.broadcast(temporary_name)
            array = np.lib.format.open_memmap(temporary_name, mode="r+")
            yield array
            array.flush()
            strategy.barrier()  # The first process moves the file once all rows are written.
        strategy.barrier()  # The other processes read it once it is moved.

    def _allocate(self, file: BinaryIO) -> None:
        """Write the header and reserve the space of the array.

        A full disk is an `OSError` here. Later, writing to the memory map, it would kill the
        process (SIGBUS).
        """
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.count, self.width)}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        num_bytes = file.tell() + self.num_bytes
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        else:  # macOS and Windows
            file.truncate(num_bytes)


class _StoredFile(NamedTuple):
    """A file of features that may be removed; sorted, the least recently used comes first."""

    last_used: float  # seconds since 1970
    num_bytes: int
    path: Path


def make_room(folder: Path, files: Collection[FeatureFile], limit_gb: float) -> None:
    """Make a folder ready for files of features, and remove the least recently used other ones.

    Args:
        folder: Folder of features, made if it is missing.
        files: Files that will be read or written. They count as used now.
        limit_gb: Limit of all features in the folder, 1e9 bytes each.

    Raises:
        UserError: The folder cannot be made, or the files alone exceed the limit.
    """
    make_folder(folder, "--features (by default in the user's cache, XDG_CACHE_HOME)")
    limit = limit_gb * 1e9
    total = sum(file.num_bytes for file in files)
    if total > limit:
        raise UserError(
            f"The features would take {total / 1e9:.1f} GB in {folder}, more than "
            f"limit_gb={limit_gb:g}: raise it."
        )
    paths = {file.path for file in files}
    for path in paths:
        if path.is_file():
            os.utime(path)
    others = _stored_files(folder, paths)
    total += sum(other.num_bytes for other in others)
    for other in sorted(others):
        if total <= limit:
            break
        with suppress(OSError):  # another user's, or already removed by another process
            other.path.unlink()
        total -= other.num_bytes


def _stored_files(folder: Path, excluded: Collection[Path]) -> list[_StoredFile]:
    """Return the files of features in a folder, and nothing else that has a similar name."""
    files = []
    for path in folder.iterdir():
        if FILE_NAME.fullmatch(path.name) is None or path in excluded:
            continue
        try:
            status = path.lstat()
        except FileNotFoundError:  # another process has removed it
            continue
        if stat.S_ISREG(status.st_mode):
            files.append(_StoredFile(status.st_mtime, status.st_size, path))
    return files
