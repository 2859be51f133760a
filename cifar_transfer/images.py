"""Images from files to uint8 batches: decode once, cache as one array, read a batch at a time.

CIFAR-10 is a tensor of 180 MB, not 60,000 files. So every source (python batches, a folder of images, drawn shapes)
ends as one memory-mapped `.npy` of shape [N, 3, H, W] beside the data: started in an instant, held once per machine
however many processes read it, and indexed by whole batches. Only a folder too large for that is decoded on the fly.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cifar_transfer.errors import UserError

Batch = tuple[Tensor, Tensor]

CACHE_FOLDER = ".cifar_transfer"


def read_image(path: str | Path, size: int | None = None) -> np.ndarray:
    """Decode one image file of any mode that Pillow reads: grey, palette, RGBA, CMYK, 16 bit.

    Args:
        path: The file.
        size: None keeps the image's own size; otherwise the shorter side is resized to `size` pixels (bilinear,
            antialiased) and the centre square is cut out, as torchvision's evaluation presets do.

    Returns:
        uint8 [3, H, W], RGB. Transparency is dropped, as torchvision's loader does.

    Raises:
        UserError: The file cannot be decoded; the message names it.
    """
    try:
        with Image.open(path) as image:
            return to_pixels(image, size)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be decoded as an image ({error}): mend or remove it.") from None


def to_pixels(image: Image.Image, size: int | None = None) -> np.ndarray:
    """An opened image as an array: uint8 [3, H, W], RGB; `size` as in `read_image`."""
    if image.mode.startswith("I"):  # 16 bit a pixel, which `convert` would clip instead of scale
        rgb = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    else:
        rgb = image.convert("RGB")
    if size is not None and rgb.size != (size, size):
        scale = size / min(rgb.size)
        width, height = (max(size, round(side * scale)) for side in rgb.size)
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        rgb = rgb.crop((left, top, left + size, top + size))
    return np.array(rgb).transpose(2, 0, 1)  # a copy, as torch wants to be able to write


class Images(Dataset[Batch]):
    """Images and labels, read a batch of indices at a time.

    `__getitems__` is what the DataLoader calls; it returns uint8 [B, 3, H, W] and int64 [B].

    Args:
        labels: int64 [N].

    Attributes:
        on_the_fly: Whether reading means decoding, so that worker processes pay.
    """

    on_the_fly = False

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Images uint8 [B, 3, H, W] and labels int64 [B] of these rows."""
        rows = np.asarray(indices)
        return torch.from_numpy(self.pixels(rows)), torch.from_numpy(self.labels[rows])

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] of the rows int64 [B]."""
        raise NotImplementedError

    def subset(self, rows: np.ndarray) -> "Images":
        """The same images, only these rows, without a copy."""
        return _Rows(self, rows)


class _Rows(Images):
    def __init__(self, images: Images, rows: np.ndarray) -> None:
        super().__init__(images.labels[rows])
        self.images, self.rows, self.on_the_fly = images, rows, images.on_the_fly

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        return self.images.pixels(self.rows[rows])


class ArrayImages(Images):
    """Images of one array in memory or memory-mapped.

    Args:
        array: uint8 [N, 3, H, W].
        labels: int64 [N].
    """

    def __init__(self, array: np.ndarray, labels: np.ndarray) -> None:
        super().__init__(labels)
        self.array = array

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] of the rows int64 [B]."""
        return self.array[rows]


class FileImages(Images):
    """Images decoded when they are asked for.

    Args:
        paths: N files.
        labels: int64 [N].
        size: As in `read_image`.
    """

    on_the_fly = True

    def __init__(self, paths: Sequence[str], labels: np.ndarray, size: int | None) -> None:
        super().__init__(labels)
        self.paths, self.size = paths, size

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] of the rows int64 [B]; a UserError names a broken file or one of another size."""
        images = [read_image(self.paths[row], self.size) for row in rows]
        for row, image in zip(rows, images, strict=True):
            if image.shape != images[0].shape:
                raise MixedSizes(f"{self.paths[row]} has another size than {self.paths[rows[0]]}: set decode_size.")
        return np.stack(images)


class MixedSizes(UserError):
    """Images that were to keep their own size do not share one."""


def cores() -> int:
    """How many cores this process may use; a batch scheduler or container often grants fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def as_is(batch: Batch) -> Batch:
    """Collate function of a dataset whose `__getitems__` returns whole batches."""
    return batch


def stratified(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into two, keeping the share of every class.

    Args:
        labels: int64 [N].
        fraction: Share of each class that goes into the second part, in (0, 1), rounded, but at least one image of
            every class that has two.
        seed: The same seed gives the same rows.

    Returns:
        Two sorted int64 arrays of row numbers, together 0..N-1.
    """
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        held_out[rows[:count]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def cached(folder: Path, name: str, fingerprint: object, source: Callable[[], Images]) -> Images:
    """The images of `source` as one memory-mapped array, written the first time.

    Args:
        folder: The data's folder; the cache is a subfolder of it, or, where nothing can be written, of the user's
        cache. name: Shown in the progress bar and used as the file's name.
        fingerprint: JSON-serialisable; another fingerprint means another cache, so that changed files are read again.
        source: Called when there is no cache yet. Its images must share one size.

    Raises:
        UserError: A broken image; the message names it. Nothing is left behind.
    """
    key = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:16]
    directory = _writable(folder)
    pixels, labels = directory / f"{name}-{key}.npy", directory / f"{name}-{key}-labels.npy"
    with FileLock(directory / f"{name}.lock"):
        if (images := _open(pixels, labels)) is None:
            for stale in directory.glob(f"{name}-*"):  # of files that have changed since, or cut short by a full disk
                stale.unlink()
            _write(source(), name, pixels, labels)
            images = _open(pixels, labels)
            assert images is not None
    return images


def _open(pixels: Path, labels: Path) -> Images | None:
    try:
        return ArrayImages(np.load(pixels, mmap_mode="r"), np.load(labels))
    except (OSError, ValueError, EOFError):  # absent or cut short
        return None


def _write(images: Images, name: str, pixels: Path, labels: Path) -> None:
    # Workers decode on all cores; a process forked for an array in memory would only copy it.
    workers = cores() if images.on_the_fly else 0
    loader = DataLoader(images, batch_size=256, collate_fn=as_is, num_workers=workers)  # type: ignore[arg-type]
    partial = pixels.with_suffix(".partial")
    array: np.memmap | None = None
    done = 0
    try:
        with tqdm(total=len(images), desc=f"decoding {name}", unit="img", disable=not sys.stderr.isatty()) as bar:
            for batch, _ in loader:
                if array is None:
                    shape = (len(images), *batch.shape[1:])
                    array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
                if batch.shape[1:] != array.shape[1:]:
                    raise MixedSizes(f"The images of {name} do not share one size: set decode_size.")
                array[done : done + len(batch)] = batch.numpy()
                done += len(batch)
                bar.update(len(batch))
        assert array is not None
        array.flush()
        np.save(labels, images.labels)
        os.replace(partial, pixels)  # last, so that a file of this name is whole
    finally:
        partial.unlink(missing_ok=True)


def _writable(folder: Path) -> Path:
    from pooch import os_cache

    places = [
        folder / CACHE_FOLDER,
        os_cache("cifar_transfer") / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
    ]
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
        except OSError:
            continue
    raise UserError(
        f"No place for decoded images: neither {places[0]} nor {places[1]} can be written. Free one of them."
    )
