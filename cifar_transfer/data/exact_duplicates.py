"""Images that are copies of each other, by content, whatever their names."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from tqdm import tqdm

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.text import printable
from cifar_transfer.base.untrusted import open_regular, read_beginning
from cifar_transfer.data.images import ArrayImages, Images

BEGINNING_BYTES = 4096  # which tell almost all files of one size apart
DIGEST_BYTES = 8
READERS = 4  # threads: disks that turn, and those of networks, answer several questions at once
CHUNK_IMAGES = 1000  # that a thread reads at a time
MAX_COPIES_NAMED = 2  # copies that a warning names
SECONDS_BEFORE_PROGRESS = 5  # before a progress bar is shown


class SplitFiles(NamedTuple):
    """Images of a split, and their files.

    Attributes:
        images: The images.
        paths: Path of each of them.
        rows: Rows of the images to look at, int64 [N].
    """

    images: Images
    paths: Sequence[str]
    rows: np.ndarray


def content_numbers(splits: Sequence[SplitFiles]) -> list[np.ndarray]:
    """Return a number for each image, int64 [N] for each split; copies have the same one.

    Cached images are compared by their pixels, at no cost, because their checksums are known.
    Others are compared as files: those of one size by their beginning, and only those that still
    agree by the whole.

    Raises:
        UserError: A file cannot be read.
    """
    numbers = _numbers_of_pixels(splits)
    if numbers is None:
        try:
            numbers = _numbers_of_files(splits)
        except OSError as error:  # the file has gone since the folder was listed
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}): mend or remove it."
            ) from None
    ends = np.cumsum([len(split.rows) for split in splits])
    return np.split(numbers, ends[:-1])


def copies_among(train_numbers: np.ndarray, numbers: np.ndarray) -> list[tuple[int, int]]:
    """Return the place of a training image, and that of its copy, for each copy in other images.

    Args:
        train_numbers: Numbers of the training images, int64 [N], see `content_numbers`.
        numbers: Numbers of other images, int64 [M].
    """
    different_numbers, first_places = np.unique(train_numbers, return_index=True)
    places = np.flatnonzero(np.isin(numbers, different_numbers))
    train_places = first_places[np.searchsorted(different_numbers, numbers[places])]
    return list(zip(train_places.tolist(), places.tolist(), strict=True))


def warn_of_copies(pairs: Sequence[tuple[str, str]], count: int, split: str) -> None:
    """Warn of images of a split that are also among those of training.

    Args:
        pairs: Path of a training image, and that of its copy, for each such image.
        count: Number of all images of the split.
        split: Name of the split.
    """
    if not pairs:
        return
    examples = [f"{path} is {train_path}" for train_path, path in pairs[:MAX_COPIES_NAMED]]
    rank_zero_warn(
        f"{len(pairs):,} of {count:,} {split} images are also among those of training "
        f"({printable('; '.join(examples))}), so the {split} figure will be too good: "
        f"remove them from either, or list those of training for leave_out."
    )


def _numbers_of_pixels(splits: Sequence[SplitFiles]) -> np.ndarray | None:
    """Return numbers of all images, int64 [N], by their pixels; None if they are not all cached."""
    arrays = []
    checksums = []
    for split in splits:
        if not isinstance(split.images, ArrayImages) or split.images.checksums is None:
            return None
        arrays.append(split.images.array)
        checksums.append(split.images.checksums[split.rows])
    splits_of_images, rows = _places(splits)

    def content(image: int) -> bytes:
        return arrays[splits_of_images[image]][rows[image]].tobytes()

    return _refined(np.concatenate(checksums), content)


def _numbers_of_files(splits: Sequence[SplitFiles]) -> np.ndarray:
    """Return numbers of all images, int64 [N], by the content of their files."""
    splits_of_images, rows = _places(splits)

    def path(image: int) -> str:
        return splits[splits_of_images[image]].paths[rows[image]]

    def beginning(image: int) -> bytes:
        return read_beginning(path(image), BEGINNING_BYTES)

    def content(image: int) -> bytes:
        with open_regular(path(image)) as file:
            return file.read()

    sizes = (os.path.getsize(path(image)) for image in range(len(rows)))
    numbers = np.fromiter(sizes, np.int64, len(rows))
    numbers = _refined(numbers, beginning)
    return _refined(numbers, content)


def _places(splits: Sequence[SplitFiles]) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the split, and the row in it, of each image of all splits, int64 [N]."""
    counts = [len(split.rows) for split in splits]
    return np.repeat(np.arange(len(splits)), counts), np.concatenate(
        [split.rows for split in splits]
    )


def _refined(numbers: np.ndarray, content: Callable[[int], bytes]) -> np.ndarray:
    """Return numbers that only those images share that shared one before, and have one content.

    Args:
        numbers: A number for each of N images.
        content: Returns the content of an image. Images that share no number are not asked for it.
    """
    _, numbers, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    images = np.flatnonzero(counts[numbers] > 1)
    digests = np.zeros(len(images), np.uint64)
    bar = tqdm(
        total=len(images),
        desc="comparing images",
        unit="img",
        delay=SECONDS_BEFORE_PROGRESS,
        disable=None,
    )

    def fill(start: int) -> int:
        chunk = images[start : start + CHUNK_IMAGES].tolist()
        for place, image in enumerate(chunk, start):
            number = int(numbers[image]).to_bytes(DIGEST_BYTES)
            digest = blake2b(content(image), digest_size=DIGEST_BYTES, key=number).digest()
            digests[place] = int.from_bytes(digest)
        return len(chunk)

    with bar, ThreadPoolExecutor(READERS) as pool:
        for count in pool.map(fill, range(0, len(images), CHUNK_IMAGES)):
            bar.update(count)
    _, numbers_of_digests = np.unique(digests, return_inverse=True)
    numbers[images] = len(counts) + numbers_of_digests
    return numbers
