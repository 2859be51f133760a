"""Folders of images, one folder a class: CIFAR-10 as fast.ai mirrors it, or anybody's own."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.text import printable
from cifar_transfer.data import exact_duplicates as duplicates
from cifar_transfer.data import splits
from cifar_transfer.data.cache import cached
from cifar_transfer.data.geometry import LARGEST_SIDE, Size, choose_size, pixels
from cifar_transfer.data.images import (
    EXTENSIONS,
    MAX_MEGAPIXELS,
    FileImages,
    Images,
    images_below,
    read_size,
)
from cifar_transfer.data.module import ImageDataModule, Split

LOOKED_AT = 1000  # training images, evenly spread, whose sizes decide to which all are brought


class ImageFolderDataModule(ImageDataModule):
    """Your own images: `root/train/<class>/*`, and `root/val/` and `root/test/` of the same layout where you have them.

    Without `val/`, `val_fraction` of the training images are held out; without `test/`, a run ends with its validation
    figure. Images are decoded once into a cache beside the data, unless that would exceed `cache_limit_gb`.

    Args:
        root: Folder with `train/`.
        decode_size: Side in pixels of the squares that images become when decoded (shorter side resized, centre cut
            out). None takes `image_size` of the network, or the images' own size if most of the training share a
            smaller one; without an `image_size` they keep one common size up to 256 x 256, and else become squares of
            224 pixels or less.
        cache_limit_gb: A split whose decoded images exceed this many gigabytes (1e9 bytes) is decoded on the fly.
        max_megapixels: An image of more million pixels is refused, before it is decoded.
        **options: Those of `ImageDataModule`.

    Raises:
        UserError: The folder is missing or has another layout, or an option is out of its range.
    """

    def __init__(
        self,
        root: str,
        decode_size: int | None = None,
        cache_limit_gb: float = 8.0,
        max_megapixels: float = MAX_MEGAPIXELS,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check("root", root, Path, "a folder")
        self.root = Path(root)
        if decode_size is not None:
            check(
                "decode_size",
                decode_size,
                lambda n: 1 <= n <= LARGEST_SIDE,
                f"1 to {LARGEST_SIDE} pixels",
            )
        check("cache_limit_gb", cache_limit_gb, lambda x: x >= 0, "0 or more")
        check("max_megapixels", max_megapixels, lambda x: x > 0, "a positive number")
        train = self.root / "train"
        if not train.is_dir():
            raise UserError(
                f"{train} is missing: put the images of each class into {root}/train/<class>/."
            )
        self._classes = class_folders(train)
        if not self._classes:
            raise UserError(f"{train} has no folders: it needs one for each class.")
        if len(self._classes) < 2:
            raise UserError(
                f"{train} has one class only ({self._classes[0]}): it needs two or more."
            )
        self.decode_size, self.cache_limit_gb, self.max_megapixels = (
            decode_size,
            cache_limit_gb,
            max_megapixels,
        )
        self._files: dict[Split, tuple[list[str], np.ndarray]] = {}
        self._sizes: list[Size] = []  # of the training images that were looked at
        self.record(
            root=root,
            decode_size=decode_size,
            cache_limit_gb=cache_limit_gb,
            max_megapixels=max_megapixels,
        )

    @property
    def class_names(self) -> list[str]:
        """The names of the folders in `train/`, sorted; what is no text in them is written as escapes."""
        return [printable(name) for name in self._classes]

    def prepare_data(self) -> None:
        """Decode, and warn of images that are in the training and in another split alike."""
        first = not self._loaded
        super().prepare_data()
        train = self._loaded["train"]
        out = splits.listed(self.leave_out) if self.leave_out else frozenset[str]()
        for split, images in self._loaded.items():
            if not (first and train and images) or images is train:
                continue
            paths, _ = self._listed(split)
            found = duplicates.find(train, self._listed("train")[0], images, paths)
            if pairs := [pair for pair in found if not out.intersection(map(self._name, pair))]:
                examples = "; ".join(
                    printable(f"{other} is {trained}") for trained, other in pairs[:2]
                )
                rank_zero_warn(
                    f"{len(pairs):,} of {len(paths):,} {split} images are also among those of training ({examples}), "
                    f"so the {split} figure will be too good: remove them from either, or list them for leave_out."
                )

    def _name(self, path: str) -> str:
        """As a list of images to leave out has it."""
        return splits.as_listed(Path(path).relative_to(self.root).as_posix())

    def load(self, split: Split) -> Images | None:
        """The images of a split, or None where it has no folder."""
        if not (self.root / split).is_dir():
            if split == "val" and (self.root / "valid").is_dir():
                rank_zero_warn(f"{self.root / 'valid'} is not looked at: call it val.")
            return None
        size = self.size or self.choose_size(None)
        if split == "train" and (other := sum(found != size for found in self._sizes)):
            rank_zero_info(
                f"Images become {pixels(size)} pixels when decoded, resized and cut to the centre: {other:,} of "
                f"{len(self._sizes):,} looked at have another size (decode_size=N makes them N x N)"
            )
        images = FileImages(*self._listed(split), size, self.max_megapixels)
        return folder_images(images, self.root, split, self.cache_limit_gb)

    def choose_size(self, largest: int | None) -> Size:
        """`decode_size`, or what suits the training images and the network; a `UserError` names a file that is none."""
        if self.decode_size:
            return self.decode_size, self.decode_size
        if not self._sizes:
            paths, _ = self._listed("train")
            rows = np.linspace(0, len(paths) - 1, min(LOOKED_AT, len(paths))).astype(int)
            self._sizes = [read_size(paths[row], self.max_megapixels) for row in rows]
        return choose_size(self._sizes, largest)

    def _listed(self, split: Split) -> tuple[list[str], np.ndarray]:
        """Files and labels of a split, kept, because to look through a large folder takes seconds."""
        if split not in self._files:
            self._files[split] = class_files(self.root / split, self._classes)
        return self._files[split]


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted; those that are hidden left out, as `.ipynb_checkpoints`."""
    return sorted(
        e.name for e in os.scandir(folder) if not e.name.startswith(".") and os.path.isdir(e.path)
    )


def class_files(folder: Path, classes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The image files anywhere below `folder/<class>/`, and their labels, int64 [N], places in `classes`.

    Raises:
        UserError: A folder is no class's, cannot be read, or has no images; outside "train" some class must have any.
    """

    def refuse(error: UserError) -> NoReturn:
        raise error

    if unknown := set(class_folders(folder)) - set(classes):
        names = ", ".join(sorted(unknown))
        raise UserError(
            f"{folder} has classes that training has not ({names}): remove or rename them."
        )
    files = [
        list(images_below(str(folder / name), refuse)) if (folder / name).is_dir() else []
        for name in classes
    ]
    empty = [name for name, found in zip(classes, files, strict=True) if not found]
    if empty and (folder.name == "train" or len(empty) == len(classes)):
        raise UserError(
            f"{folder} has no images of {', '.join(empty)} ({' '.join(EXTENSIONS)}): add some, or remove the class."
        )
    return [path for found in files for path in found], np.repeat(
        np.arange(len(classes)), [*map(len, files)]
    )


def folder_images(images: FileImages, folder: Path, split: str, limit_gb: float) -> Images:
    """Images of files below `folder/split/`, named; decoded on the fly if above `limit_gb` (1e9 bytes), else cached."""
    try:
        stats = [os.stat(path) for path in images.paths]
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}): mend or remove it."
        ) from None
    found: Images = images
    if 3 * images.size[0] * images.size[1] * len(images) > limit_gb * 1e9:
        rank_zero_info(
            "%s: decoded on the fly, because all of it would take more than %g GB", split, limit_gb
        )
    else:
        paths = [path.removeprefix(f"{folder}{os.sep}") for path in images.paths]
        content = [
            [path, file.st_size, file.st_mtime_ns] for path, file in zip(paths, stats, strict=True)
        ]
        found = cached(folder, split, [content, images.size], lambda: images)
    found.names = [
        path.removeprefix(f"{folder / split}{os.sep}").replace(os.sep, "/") for path in images.paths
    ]
    return found
