"""Decode once: images as one array on disk, verified whenever it is opened.

One memory-mapped `.npy` of shape [N, 3, H, W] beside the data is there in an instant, is in memory
once a machine however many processes read it, and is indexed by whole batches.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import platformdirs
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_warn
from tqdm import tqdm

from cifar_transfer.base.files import atomic_write, write_json
from cifar_transfer.base.machine import cores
from cifar_transfer.base.untrusted import open_regular
from cifar_transfer.data.images import ArrayImages, Images, UnreadableImages

CACHE_FOLDER = ".cifar_transfer"
DECODED_IMAGES = 64  # images that a thread decodes at once
# Version of what decoding gives. One more makes all caches anew. 2: images are turned upright;
# 3: they are cut without rounding; 4: what is transparent is white.
VERSION = 4


def cached(
    folder: Path,
    name: str,
    fingerprint: object,
    source: Callable[[], Images],
    other_fingerprints: Sequence[object] = (),
) -> Images:
    """Return images as one memory-mapped array, which one process writes the first time.

    Each image is verified by its CRC-32, in 0.1 s for 60,000 of CIFAR-10, and a damaged cache is
    made again. If no cache can be written, a warning says so, and the images are those of `source`.

    Args:
        folder: Folder of the data. The cache is in a subfolder of it or, if nothing can be written
            there, in the user's cache.
        name: Name of the cache, and text of the progress bar.
        fingerprint: JSON-serialisable; another one makes another cache, because files have changed.
        source: Called for the images, all of one size, if they are not cached yet.
        other_fingerprints: Those of caches that will do as well, if they are there.

    Raises:
        UnreadableImages: Images are broken; the message names them. Nothing is left behind.
    """
    cache_folder = writable_folder(folder)
    if cache_folder is None:
        return _uncached(source(), f"neither {folder} nor the user's cache can be written")
    pixels_path, index_path = _paths(cache_folder, name, fingerprint)
    try:
        lock = FileLock(cache_folder / f"{name}.lock").acquire()
    except OSError as error:
        return _uncached(
            source(), f"{cache_folder / name}.lock cannot be locked ({error.strerror})"
        )
    with lock:
        for usable_fingerprint in (fingerprint, *other_fingerprints):
            images = _open(*_paths(cache_folder, name, usable_fingerprint))
            if images is not None:
                return images
        _remove_stale(cache_folder, name)
        decoded = source()
        try:
            _write(decoded, name, pixels_path, index_path)
        except OSError as error:
            _remove_stale(cache_folder, name)
            return _uncached(decoded, f"{cache_folder} cannot be written ({error.strerror})")
        images = _open(pixels_path, index_path)
        if images is None:
            return _uncached(decoded, f"{cache_folder} does not keep what is written")
        return images


def remembered(folder: Path, name: str, fingerprint: object, compute: Callable[[], Any]) -> Any:
    """Return what was computed of images, which is computed once and kept beside the caches.

    Args:
        folder: Folder of the data.
        name: Name of the file that keeps it.
        fingerprint: JSON-serialisable; another one has it computed anew, because files have
            changed.
        compute: Returns it: primitives, as JSON knows them.
    """
    key = _key(fingerprint)
    cache_folder = writable_folder(folder)
    if cache_folder is None:
        return compute()
    path = cache_folder / f"{name}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
        with open_regular(path) as file:
            kept = json.loads(file.read())
        if kept["key"] == key:
            return kept["value"]
    value = compute()
    remember(folder, name, fingerprint, value)
    return value


def remember(folder: Path, name: str, fingerprint: object, value: Any) -> None:
    """Keep what `remembered` returns from now on, if there is a folder to keep it in."""
    cache_folder = writable_folder(folder)
    if cache_folder is None:
        return
    with suppress(OSError):  # it is computed again the next time
        write_json(cache_folder / f"{name}.json", {"key": _key(fingerprint), "value": value})


def _key(fingerprint: object) -> str:
    return hashlib.sha256(json.dumps([VERSION, fingerprint]).encode()).hexdigest()[:16]


def _paths(cache_folder: Path, name: str, fingerprint: object) -> tuple[Path, Path]:
    """Return the files of pixels and of index of a cache."""
    key = _key(fingerprint)
    return cache_folder / f"{name}-{key}.npy", cache_folder / f"{name}-{key}.npz"


def writable_folder(folder: Path) -> Path | None:
    """Return the folder for caches of a folder of data, or None if there is none to write into."""
    path_bytes = str(folder.resolve()).encode(errors="surrogateescape")
    user_cache = platformdirs.user_cache_path("cifar_transfer")
    in_user_cache = user_cache / hashlib.sha256(path_bytes).hexdigest()[:16]
    for candidate in (folder / CACHE_FOLDER, in_user_cache):
        with suppress(OSError):
            candidate.mkdir(parents=True, exist_ok=True)
            if os.access(candidate, os.W_OK) and _is_trusted(candidate):
                return candidate
    return None


def _is_trusted(folder: Path) -> bool:
    """Return whether a folder is no link, and nobody but its owner or this user can write to it."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return False
    if not hasattr(os, "getuid"):  # on Windows
        return True
    others_may_write = bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    return status.st_uid == os.getuid() or not others_may_write


def _uncached(images: Images, reason: str) -> Images:
    consequence = "kept in memory"
    if images.on_the_fly:
        consequence = "decoded anew in each epoch, which is slower"
    rank_zero_warn(f"Images are not cached but {consequence}: {reason}.")
    return images


def _open(pixels_path: Path, index_path: Path) -> Images | None:
    """Return the cached images, or None if there are none or they are damaged."""
    if not pixels_path.exists():
        return None
    with suppress(Exception):  # of any kind: nobody lists what readers of damaged files raise
        array = np.lib.format.open_memmap(pixels_path, mode="r")
        # NumPy would read a plain array or a pickle too. A zip's members have checksums.
        with zipfile.ZipFile(index_path), np.load(index_path, allow_pickle=False) as index:
            labels = index["labels"]
            checksums = index["sums"]
        is_whole = array.dtype == np.uint8 and array.ndim == 4 and len(labels) == len(array)
        if is_whole and np.array_equal(_checksums(array), checksums):
            return ArrayImages(array, labels, checksums)
    rank_zero_warn(f"The decoded images in {pixels_path} are damaged, and are made again.")
    return None


def _remove_stale(cache_folder: Path, name: str) -> None:
    """Remove other caches of this name, damaged ones, and what a killed run has left.

    Nothing else in the folder is touched.
    """
    cache_file = re.compile(
        rf"\.?{re.escape(name)}-[0-9a-f]{{16}}\.np[yz](\.[0-9a-f]{{16}}\.partial)?"
    )
    for path in cache_folder.iterdir():
        if cache_file.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()


def _write(images: Images, name: str, pixels_path: Path, index_path: Path) -> None:
    """Decode and write images; the index is written first, so that where there are pixels is all.

    The array is written as a file, because a full disk kills a process that writes to a memory map.
    """
    checksums: list[np.ndarray] = []
    with atomic_write(pixels_path) as file:
        for batch in decoded_batches(images, f"decoding {name}"):
            if not checksums:
                _write_header(file, (len(images), *batch.shape[1:]))
            file.write(batch.data)
            checksums.append(_checksums(batch))
        np.savez(index_path, labels=images.labels, sums=np.concatenate(checksums))


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def decoded_batches(images: Images, progress: str) -> Iterator[np.ndarray]:
    """Yield all images in order, uint8 [B, 3, H, W], with a progress bar.

    Args:
        images: The images.
        progress: Text of the progress bar.

    Raises:
        UnreadableImages: Images are broken. All that can be read were decoded before, so that the
            message names all others.
    """
    bar = tqdm(total=len(images), desc=progress, unit="img", disable=not sys.stderr.isatty())
    reasons: list[str] = []
    paths: list[str] = []
    with bar:
        for batch in _decoded_ahead(images):
            if isinstance(batch, UnreadableImages):
                reasons += batch.reasons
                paths += batch.paths
            else:
                bar.update(len(batch))
                yield batch
    if reasons:
        raise UnreadableImages(*reasons, paths=paths)


def _decoded_ahead(images: Images) -> Iterator[np.ndarray | UnreadableImages]:
    """Yield all images in order, uint8 [B, 3, H, W], or why some cannot be read.

    Threads decode ahead. Processes would need shared memory, of which a container may not grant
    enough: a DataLoader then waits for ever.
    """

    def decode(start: int) -> np.ndarray | UnreadableImages:
        rows = np.arange(start, min(start + DECODED_IMAGES, len(images)))
        try:
            return np.ascontiguousarray(images.pixels(rows))
        except UnreadableImages as error:
            return error

    max_waiting = 2 * cores()
    waiting: deque[Future[np.ndarray | UnreadableImages]] = deque()
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(images), DECODED_IMAGES):
            if len(waiting) == max_waiting:
                yield waiting.popleft().result()
            waiting.append(pool.submit(decode, start))
        while waiting:
            yield waiting.popleft().result()


def _checksums(array: np.ndarray) -> np.ndarray:
    """Return the CRC-32 of each image, uint32 [N]."""
    # Rows of a memory map are memory maps, which take longer to make than to sum.
    rows = np.asarray(array)
    return np.fromiter(map(zlib.crc32, rows), np.uint32, len(rows))
