"""Images that are in the training and in another split alike, by content, whatever their names."""

import hashlib
import os
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.untrusted import open_regular
from cifar_transfer.data.images import ArrayImages, Images

BEGINNING_BYTES = 4096  # which tell almost all files of one size apart

Pair = tuple[str, str]  # paths of a training image and of the same image in another split


class SplitFiles(NamedTuple):
    """The images of a split, and their files.

    Attributes:
        images: Images that the split is taken from.
        paths: Path of each of them.
        rows: Rows of the images that are in the split, int64 [N].
    """

    images: Images
    paths: Sequence[str]
    rows: np.ndarray


def find_duplicates(train: SplitFiles, other: SplitFiles) -> list[Pair]:
    """Return pairs of a training file and a file of another split that are the same image.

    Cached images are compared by their pixels, at no cost, because their checksums are known.
    Others are compared as files: those of one size by their beginning, and only those that still
    agree by the whole.

    Raises:
        UserError: A file cannot be read.
    """
    if isinstance(train.images, ArrayImages) and isinstance(other.images, ArrayImages):
        return _same_pixels(train.images, train, other.images, other)
    try:
        return _same_files(_paths(train), _paths(other))
    except OSError as error:  # the file has gone since the folder was listed
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}): mend or remove it."
        ) from None


def _paths(files: SplitFiles) -> list[str]:
    return [files.paths[row] for row in files.rows]


def _same_pixels(
    train_images: ArrayImages, train: SplitFiles, other_images: ArrayImages, other: SplitFiles
) -> list[Pair]:
    if train_images.checksums is None or other_images.checksums is None:
        return []
    train_rows = {}
    for row in train.rows.tolist():
        train_rows[int(train_images.checksums[row])] = row
    pairs = []
    for row in other.rows.tolist():
        train_row = train_rows.get(int(other_images.checksums[row]))
        if train_row is None:
            continue
        if np.array_equal(train_images.array[train_row], other_images.array[row]):
            pairs.append((train.paths[train_row], other.paths[row]))
    return pairs


def _same_files(train_paths: Sequence[str], eval_paths: Sequence[str]) -> list[Pair]:
    for key in (os.path.getsize, _beginning):
        train_paths, eval_paths = _with_common_keys(train_paths, eval_paths, key)
    train_by_content = {_sha256(path): path for path in train_paths}
    pairs = []
    for path in eval_paths:
        train_path = train_by_content.get(_sha256(path))
        if train_path is not None:
            pairs.append((train_path, path))
    return pairs


def _with_common_keys(
    train_paths: Sequence[str], eval_paths: Sequence[str], key: Callable[[str], Hashable]
) -> tuple[list[str], list[str]]:
    """Return the files whose key is that of a file on the other side."""
    train_keys = {path: key(path) for path in train_paths}
    eval_keys = {path: key(path) for path in eval_paths}
    common = set(train_keys.values()) & set(eval_keys.values())
    return (
        [path for path in train_paths if train_keys[path] in common],
        [path for path in eval_paths if eval_keys[path] in common],
    )


def _beginning(path: str) -> bytes:
    with open_regular(path) as file:
        return file.read(BEGINNING_BYTES)


def _sha256(path: str) -> bytes:
    with open_regular(path) as file:
        return hashlib.sha256(file.read()).digest()
