"""The cache of decoded image files, and the fingerprint that says whether it is still theirs."""

import os
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import file_version
from cifar_transfer.data.cache import cached
from cifar_transfer.data.images import FileImages, Images
from cifar_transfer.data.partly_read import PartlyReadImages


def cached_files(
    images: FileImages,
    names: Sequence[str],
    folder: Path,
    cache_name: str,
    cache_limit_gb: float,
    rows_to_read: np.ndarray,
) -> Images:
    """Return images of files with their names, from the cache if it is used.

    Args:
        images: The files.
        names: Their names in lists and records.
        folder: Folder of the data.
        cache_name: Name of the cache, and text of the progress bar.
        cache_limit_gb: Images that take more gigabytes (1e9 bytes) are decoded on the fly.
        rows_to_read: Rows of the images, int64, to decode for the cache. The others are black.

    Raises:
        UnreadableImages: Files cannot be read.
    """
    height, width = images.size
    result: Images = images
    if 3 * height * width * len(images) > cache_limit_gb * 1e9:
        rank_zero_info(
            f"{cache_name}: decoded on the fly, because all of it would take more than "
            f"{cache_limit_gb:g} GB"
        )
    elif len(rows_to_read) == len(images):
        result = cached(folder, cache_name, fingerprint(images, folder), lambda: images)
    else:
        some_images = PartlyReadImages(images, rows_to_read)
        own_fingerprint = [*fingerprint(images, folder, rows_to_read), rows_to_read.tolist()]
        with_all_images = []
        with suppress(UserError):  # a file that is not read may be anything, and not even there
            with_all_images.append(fingerprint(images, folder))
        result = cached(folder, cache_name, own_fingerprint, lambda: some_images, with_all_images)
    result.names = names
    return result


def fingerprint(images: FileImages, folder: Path, rows: np.ndarray | None = None) -> list[object]:
    """Return what changes when a file, of some rows or of all, or the size of the images does.

    Raises:
        UserError: A file cannot be looked at.
    """
    if rows is None:
        rows = np.arange(len(images))
    files = sha256()
    for row in rows.tolist():
        path = str(images.paths[row])
        try:
            version = file_version(path)
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}): mend or remove it."
            ) from None
        text = repr((_relative_to(folder, path), version))
        files.update(text.encode(errors="backslashreplace"))
    return [files.hexdigest(), images.size, images.fit, images.grey_range]


def _relative_to(folder: Path, path: str) -> str:
    """Return a path relative to a folder; pathlib takes twenty times as long."""
    return path.removeprefix(f"{folder}{os.sep}")
