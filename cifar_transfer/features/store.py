"""Features in a file: rows of numbers, and a sum for each batch of rows.

A batch is there when its sum is. So what a killed process has not written, and what is damaged, is missing when the
file is opened again, and nothing else.
"""

import os
import re
import stat
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import platformdirs

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import make_folder

NAME = re.compile(r"features-[0-9a-f]{32}\.bin")
LIMIT_GB = 20.0  # of all such files in a folder
IN_USE = 3600  # seconds since a file was taken up or written to, within which another process may be at it


def default_folder() -> Path:
    """Where features are kept, in the user's cache."""
    return platformdirs.user_cache_path("cifar_transfer") / "features"


class FeatureFile:
    """Features of N images in a file that is written batch by batch, by several processes at once.

    Args:
        path: The file; made if it is not there, or of another size.
        count: N.
        width: D, numbers of each image.
        dtype: float16 or float32.
        batch: Images of a batch; the last one may have fewer.
    """

    def __init__(self, path: Path, count: int, width: int, dtype: str, batch: int) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.shape = count, width
        self.batches: Sequence[range] = [
            range(start, min(start + batch, count)) for start in range(0, count, batch)
        ]
        self._row = width * self.dtype.itemsize  # bytes
        self.bytes = count * self._row + 4 * len(self.batches)

    def make(self) -> None:
        """Have the file there, its whole size without a batch, and note that it is used; called by one process."""
        make_folder(self.path.parent, "--features (by default in the user's cache, XDG_CACHE_HOME)")
        if not self.path.is_file() or self.path.stat().st_size != self.bytes:
            with self.path.open("wb") as file:
                file.truncate(self.bytes)
        os.utime(self.path)

    def missing(self) -> list[int]:
        """Numbers of the batches that are not there as they were written."""
        with self.path.open("rb") as file:
            file.seek(self.shape[0] * self._row)
            sums = np.frombuffer(file.read(), np.uint32)
            file.seek(0)
            return [
                n
                for n, rows in enumerate(self.batches)
                if _sum(file.read(len(rows) * self._row)) != sums[n]
            ]

    def write(self, number: int, values: np.ndarray) -> None:
        """Write a batch, [B, D], and then its sum."""
        content = np.ascontiguousarray(values, self.dtype).tobytes()
        # No memory map, on which a full disk would kill the process without a word.
        with self.path.open("r+b") as file:
            file.seek(self.batches[number].start * self._row)
            file.write(content)
            file.seek(self.shape[0] * self._row + 4 * number)
            file.write(np.uint32(_sum(content)).tobytes())

    def read(self) -> np.ndarray:
        """All rows, [N, D], memory-mapped and not to be changed."""
        return np.memmap(self.path, self.dtype, "r", shape=self.shape)


def _sum(content: bytes) -> int:
    return zlib.crc32(content) or 1  # 0 is what a file begins with


def make_room(folder: Path, wanted: int, kept: Sequence[Path], limit_gb: float) -> None:
    """Remove the features that were not used for longest, and not within an hour, for `wanted` bytes more.

    Args:
        folder: Where features are; only files of exactly their form are removed.
        wanted: Bytes.
        kept: Files that are in use.
        limit_gb: Most that all of them may have, 1e9 bytes each.

    Raises:
        UserError: They alone would have more.
    """
    if wanted > limit_gb * 1e9:
        raise UserError(
            f"The features would take {wanted / 1e9:.1f} GB in {folder}, more than limit_gb={limit_gb:g}: raise it."
        )
    found = []
    for path in folder.glob("features-*.bin") if folder.is_dir() else ():
        with suppress(OSError):  # another process has removed it
            status = path.lstat()
            ours = NAME.fullmatch(path.name) and stat.S_ISREG(status.st_mode) and path not in kept
            if ours and time.time() - status.st_mtime > IN_USE:
                found.append((status.st_mtime, status.st_size, path))
    total = wanted + sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit_gb * 1e9:
            break
        with suppress(OSError):
            os.unlink(path)
        total -= size
