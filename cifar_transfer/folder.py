"""Folders of images, one folder a class: CIFAR-10 as fast.ai mirrors it, or anybody's own."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from cifar_transfer.data import ImageDataModule, Split
from cifar_transfer.errors import UserError
from cifar_transfer.images import FileImages, Images, MixedSizes, cached, read_image

MIXED_SIZE = 224  # pixels: what images of unequal or large sizes are brought to unless `decode_size` says otherwise
LARGEST_KEPT = 256  # pixels: up to this, images that all have one size keep it


class ImageFolderDataModule(ImageDataModule):
    """Your own images: `root/train/<class>/*`, and `root/val/` and `root/test/` of the same layout where you have them.

    Without `val/`, `val_fraction` of the training images are held out; without `test/`, a run ends with its validation
    figure. Images are decoded once into a cache beside the data, unless that would exceed `cache_limit_gb`.

    Args:
        root: Folder with `train/`.
        decode_size: Height and width in pixels that images are brought to when decoded (shorter side resized, centre
            cut out). None keeps one common size of up to 256 pixels and makes 224 of anything else.
        cache_limit_gb: A split whose decoded images exceed this many gigabytes (1e9 bytes) is decoded on the fly.
        **options: Those of `ImageDataModule`.

    Raises:
        UserError: The folder is missing or has another layout.
    """

    def __init__(
        self,
        root: str,
        decode_size: int | None = None,
        cache_limit_gb: float = 8.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root = Path(root)
        if decode_size is not None and decode_size < 1:
            raise UserError(f"decode_size is {decode_size}: take a number of pixels.")
        if not (self.root / "train").is_dir():
            raise UserError(
                f"{self.root / 'train'} is missing: put the images of each class into {root}/train/<class>/."
            )
        try:
            self._classes, _ = find_classes(self.root / "train")
        except FileNotFoundError:
            raise UserError(f"{self.root / 'train'} has no folders: it needs one for each class.") from None
        if len(self._classes) < 2:
            raise UserError(f"{self.root / 'train'} has one class only ({self._classes[0]}): it needs two or more.")
        self.decode_size, self.cache_limit_gb = decode_size, cache_limit_gb
        self.record(root=root, decode_size=decode_size, cache_limit_gb=cache_limit_gb)

    @property
    def class_names(self) -> list[str]:
        """The names of the folders in `train/`, sorted."""
        return self._classes

    def load(self, split: Split) -> Images | None:
        """The images of a split, or None where it has no folder."""
        folder = self.root / split
        if not folder.is_dir():
            return None
        return class_folder(folder, self.class_names, self.root, self.decode_size, self.cache_limit_gb)


def class_folder(folder: Path, class_names: list[str], root: Path, size: int | None, limit_gb: float) -> Images:
    """The images of `folder/<class>/*`.

    Args:
        folder: One split.
        class_names: The classes; their order gives the labels.
        root: Where the cache goes.
        size: See `folder_images`.
        limit_gb: See `folder_images`.

    Raises:
        UserError: A class of the folder is not among `class_names`, or there are no images.
    """
    unknown = {entry.name for entry in os.scandir(folder) if entry.is_dir()} - set(class_names)
    if unknown:
        raise UserError(
            f"{folder} has classes that training has not ({', '.join(sorted(unknown))}): remove or rename them."
        )
    index = {name: label for label, name in enumerate(class_names)}
    try:
        files = make_dataset(folder, index, extensions=IMG_EXTENSIONS, allow_empty=folder.name != "train")
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {error}") from None
    if not files:
        raise UserError(f"{folder} has no images in its classes' folders ({', '.join(class_names)}).")
    paths, labels = zip(*files, strict=True)
    return folder_images(paths, np.array(labels), root, folder.name, size, limit_gb)


def folder_images(
    paths: Sequence[str], labels: np.ndarray, folder: Path, name: str, size: int | None, limit_gb: float
) -> Images:
    """The images of a list of files: decoded once into the cache, or on the fly when that would take too much disk.

    Args:
        paths: N files below `folder`.
        labels: int64 [N].
        folder: Where the cache goes, in a subfolder of its own.
        name: What the images are called in progress bars and file names, say "train".
        size: As in `read_image`; None keeps one common size of up to 256 pixels and makes 224 of anything else.
        limit_gb: Above this many gigabytes (1e9 bytes) of decoded images, they are decoded on the fly.
    """
    if size is None and max(read_image(paths[0]).shape) > LARGEST_KEPT:
        size = MIXED_SIZE
    stats = [os.stat(path) for path in paths]
    below = f"{folder}{os.sep}"
    content = [[p.removeprefix(below), s.st_size, s.st_mtime_ns] for p, s in zip(paths, stats, strict=True)]
    while True:
        height, width = read_image(paths[0], size).shape[1:]
        if 3 * height * width * len(paths) > limit_gb * 1e9:
            rank_zero_info("%s: decoded on the fly, for all of it would take more than %g GB", name, limit_gb)
            return FileImages(paths, labels, size)
        try:
            return cached(folder, name, [content, size], partial(FileImages, paths, labels, size))
        except MixedSizes:
            rank_zero_info("%s: images of different sizes; each becomes %d x %d pixels", name, MIXED_SIZE, MIXED_SIZE)
            size = MIXED_SIZE
