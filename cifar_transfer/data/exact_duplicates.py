"""Images that are in the training and in another split alike, by their content, whatever they are called."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.untrusted import open_regular
from cifar_transfer.data.images import ArrayImages, Images

BEGINNING = 4096  # bytes, which tell almost all files of one size apart


def find(
    train: Images, train_paths: Sequence[str], other: Images, other_paths: Sequence[str]
) -> list[tuple[str, str]]:
    """Pairs of a training file and a file of another split that are the same image.

    Cached images are compared by their pixels, at no cost, because their checksums are known. Others are compared as
    files: those of one size by their beginning, and only those that still agree by the whole.

    Raises:
        UserError: A file cannot be read.
    """
    if not (isinstance(train, ArrayImages) and isinstance(other, ArrayImages)):
        try:
            return _same_files(train_paths, other_paths)
        except OSError as error:  # it has gone since the folder was listed
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}): mend or remove it."
            ) from None
    if train.sums is None or other.sums is None:
        return []
    rows = {value: row for row, value in enumerate(train.sums.tolist())}
    pairs = [(rows[value], row) for row, value in enumerate(other.sums.tolist()) if value in rows]
    return [
        (train_paths[a], other_paths[b])
        for a, b in pairs
        if np.array_equal(train.array[a], other.array[b])
    ]


def _same_files(train: Sequence[str], other: Sequence[str]) -> list[tuple[str, str]]:
    for key in (os.path.getsize, _beginning, _digest):
        trained, others = ({path: key(path) for path in paths} for paths in (train, other))
        common = {*trained.values()} & {*others.values()}
        train, other = (
            [path for path, value in found.items() if value in common]
            for found in (trained, others)
        )
    by_content = {value: path for path, value in trained.items()}
    return [(by_content[others[path]], path) for path in other]


def _beginning(path: str) -> bytes:
    with open_regular(path) as file:
        return file.read(BEGINNING)


def _digest(path: str) -> bytes:
    with open_regular(path) as file:
        return hashlib.sha256(file.read()).digest()
