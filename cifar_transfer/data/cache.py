"""Decode once: images as one array on disk, verified whenever it is opened.

One memory-mapped `.npy` of shape [N, 3, H, W] beside the data is there in an instant, is held once per machine however
many processes read it, and is indexed by whole batches.
"""

import hashlib
import json
import os
import re
import stat
import sys
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import platformdirs
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_warn
from tqdm import tqdm

from cifar_transfer.base.files import atomic_write
from cifar_transfer.data.images import ArrayImages, Images, cores

CACHE_FOLDER = ".cifar_transfer"
BATCH = 64  # images that a thread decodes at once
VERSION = 3  # of what decoding gives: one more makes all caches anew. 2: turned upright; 3: cut without rounding


def cached(folder: Path, name: str, fingerprint: object, source: Callable[[], Images]) -> Images:
    """The images of `source`, all of one size, as one memory-mapped array, written the first time, by one process.

    Each image is verified by its CRC-32, in 0.1 s for 60,000 of CIFAR-10, and a damaged cache is made again. Where none
    can be written, a warning says so, and the images are those of `source`.

    Args:
        folder: The data's; the cache is a subfolder of it or, where nothing can be written, of the user's cache.
        name: Shown in the progress bar and used as the file's name.
        fingerprint: JSON-serialisable; another one means that the files have changed, and makes another cache.
        source: Called when there is no cache yet.

    Raises:
        UserError: A broken image; the message names it. Nothing is left behind.
    """
    key = hashlib.sha256(json.dumps([VERSION, fingerprint]).encode()).hexdigest()[:16]
    if (directory := _writable(folder)) is None:
        return _without(source(), f"neither {folder} nor the user's cache can be written")
    pixels, index = directory / f"{name}-{key}.npy", directory / f"{name}-{key}.npz"
    try:
        lock = FileLock(directory / f"{name}.lock").acquire()
    except OSError as error:
        return _without(source(), f"{directory / name}.lock cannot be locked ({error.strerror})")
    with lock:
        if (images := _open(pixels, index)) is None:
            _remove_stale(directory, name)
            decoded = source()
            try:
                _write(decoded, name, pixels, index)
            except OSError as error:
                _remove_stale(directory, name)
                return _without(decoded, f"{directory} cannot be written ({error.strerror})")
            images = _open(pixels, index) or _without(
                decoded, f"{directory} does not keep what is written"
            )
    return images


def _remove_stale(directory: Path, name: str) -> None:
    """Remove caches of files that have changed since, damaged ones, and what a killed run has left; nothing else."""
    ours = re.compile(rf"\.?{re.escape(name)}-[0-9a-f]{{16}}\.np[yz](\.[0-9a-f]{{16}}\.partial)?")
    for path in directory.iterdir():
        if ours.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()


def _without(images: Images, why: str) -> Images:
    how = "decoded anew in each epoch, which is slower" if images.on_the_fly else "kept in memory"
    rank_zero_warn(f"Images are not cached but {how}: {why}.")
    return images


def _open(pixels: Path, index: Path) -> Images | None:
    """The cached images, or None if there are none or damaged ones."""
    if not pixels.exists():
        return None
    with suppress(
        Exception
    ):  # of any kind: what the readers of damaged files raise is not listed anywhere
        array = np.lib.format.open_memmap(pixels, mode="r")
        with (
            zipfile.ZipFile(index),
            np.load(index, allow_pickle=False) as arrays,
        ):  # which is a zip, verified when read
            labels, sums = arrays["labels"], arrays["sums"]
        whole = array.dtype == np.uint8 and array.ndim == 4 and len(labels) == len(array)
        if whole and np.array_equal(_sums(array), sums):
            return ArrayImages(array, labels, sums)
    rank_zero_warn(f"The decoded images in {pixels} are damaged, and are made again.")
    return None


def _sums(array: np.ndarray) -> np.ndarray:
    """CRC-32 of each image, uint32 [N]."""
    rows = np.asarray(
        array
    )  # those of a memory map are objects of its class, which take longer to make than to sum
    return np.fromiter(map(zlib.crc32, rows), np.uint32, len(rows))


def _write(images: Images, name: str, pixels: Path, index: Path) -> None:
    """The index first, so that where there are pixels there is all."""
    sums: list[np.ndarray] = []
    hidden = not sys.stderr.isatty()
    with (
        atomic_write(
            pixels
        ) as file,  # no memory map, on which a full disk would kill the process without a word
        tqdm(total=len(images), desc=f"decoding {name}", unit="img", disable=hidden) as bar,
    ):
        for batch in _batches(images):
            if not sums:
                shape = (len(images), *batch.shape[1:])
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "|u1", "fortran_order": False, "shape": shape}
                )
            file.write(batch.data)
            sums.append(_sums(batch))
            bar.update(len(batch))
        np.savez(index, labels=images.labels, sums=np.concatenate(sums))


def _batches(images: Images) -> Iterator[np.ndarray]:
    """All images in order, uint8 [B, 3, H, W], decoded ahead by threads.

    Processes would need shared memory, of which a container may not grant enough: a DataLoader then waits for ever.
    """

    def read(start: int) -> np.ndarray:
        return np.ascontiguousarray(
            images.pixels(np.arange(start, min(start + BATCH, len(images))))
        )

    starts = iter(range(0, len(images), BATCH))
    with ThreadPoolExecutor(cores()) as pool:
        ahead = deque(pool.submit(read, start) for start in islice(starts, 2 * cores()))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(read, start) for start in islice(starts, 1))


def _ours(place: Path) -> bool:
    """Whether nobody else decides what is in a folder: it is no link, and if it is another's only they may write."""
    found = place.lstat()
    if not hasattr(os, "getuid"):
        return stat.S_ISDIR(found.st_mode)
    return stat.S_ISDIR(found.st_mode) and (
        found.st_uid == os.getuid() or not found.st_mode & 0o022
    )


def _writable(folder: Path) -> Path | None:
    own = hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
    for place in (folder / CACHE_FOLDER, platformdirs.user_cache_path("cifar_transfer") / own):
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK) and _ours(place):
                return place
    return None
