"""Images that are files: listed by a subclass, decoded once, the same in training and evaluation.

`ImageFolderDataModule` finds its files in folders, `TableDataModule` in tables.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.files import file_version
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.base.text import composed, printable
from cifar_transfer.data.cache import cached, remembered
from cifar_transfer.data.exact_duplicates import Pair, SplitFiles, find_duplicates
from cifar_transfer.data.geometry import (
    Fit,
    GreyRange,
    Size,
    check_decode_size,
    check_fit,
    choose_size,
    pixels,
)
from cifar_transfer.data.grey_values import describe_range, find_grey_range, some_have_many
from cifar_transfer.data.images import (
    MAX_MEGAPIXELS,
    ArrayImages,
    FileImages,
    Images,
    UnreadableImages,
    sample_sizes,
)
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.data.splits import Split, Splits

FITTING: dict[Fit, str] = {
    "crop": "resized and cut to the centre",
    "pad": "resized, with black beside them",
    "stretch": "stretched",
}
MAX_EXAMPLES = 2  # images that a message names


class Files(NamedTuple):
    """Image files.

    Attributes:
        paths: Paths of N files.
        labels: Their labels, int64 [N].
        names: Their names in lists and records, all different, such as "cat/007.png".
    """

    paths: Sequence[str]
    labels: np.ndarray
    names: Sequence[str]


class FileDataModule(ImageDataModule):
    """Base class of data modules of image files; a subclass has `list_files` and `class_names`.

    Images are decoded once into a cache beside the data, unless that would exceed `cache_limit_gb`.

    Args:
        folder: Folder of the data, beside which decoded images are kept.
        decode_size: Side in pixels of the squares that images become when decoded (shorter side
            resized, centre cut out). None takes `image_size` of the network, or the images' own
            size if most of the training share a smaller one; without an `image_size` they keep one
            common size up to 256 x 256, and else become squares of 224 pixels or less.
        fit: How images of another shape are brought to the size: "crop" takes the centre, "pad"
            adds black on two sides, "stretch" takes no care of the shape.
        cache_limit_gb: A split whose decoded images exceed this many gigabytes (1e9 bytes) is
            decoded on the fly.
        max_megapixels: An image of more million pixels is refused, before it is decoded.
        **options: Those of `ImageDataModule`.

    Raises:
        UserError: An option is out of its range.
    """

    def __init__(
        self,
        folder: Path,
        decode_size: int | None = None,
        fit: Fit = "crop",
        cache_limit_gb: float = 8.0,
        max_megapixels: float = MAX_MEGAPIXELS,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.folder = folder
        self.decode_size: int | None = as_primitive("decode_size", decode_size)
        self.cache_limit_gb: float = as_primitive("cache_limit_gb", cache_limit_gb)
        self.max_megapixels: float = as_primitive("max_megapixels", max_megapixels)
        check_decode_size(self.decode_size)
        self.fit: Fit = as_primitive("fit", fit)
        check_fit(self.fit)
        check("cache_limit_gb", self.cache_limit_gb, lambda size: size >= 0, "0 or more")
        check("max_megapixels", self.max_megapixels, lambda size: size > 0, "a positive number")
        self._files: dict[Split, Files | None] = {}
        self._sampled_sizes: list[Size] = []
        self._sampling_errors: list[str] = []
        self._grey_range: GreyRange | None = None
        self._grey_range_is_known = False

    def file_options(self) -> dict[str, Any]:
        """Return the options of all data modules of files, for `store_options`."""
        return {
            "decode_size": self.decode_size,
            "fit": self.fit,
            "cache_limit_gb": self.cache_limit_gb,
            "max_megapixels": self.max_megapixels,
        }

    def list_files(self, split: Split) -> Files | None:
        """Return the files of a split, or None if the data have none of their own."""
        raise NotImplementedError

    def cache_name(self, split: Split) -> str:
        """Return the name of the cache of a split in `folder`, and text of its progress bar."""
        return split

    def files(self, split: Split) -> Files | None:
        """Return the files of a split, which are listed once: a large folder takes seconds."""
        if split not in self._files:
            self._files[split] = self.list_files(split)
        return self._files[split]

    def choose_size(self, largest_side: int | None) -> Size:
        """Return `decode_size`, or the size that suits the training images and the network.

        Raises:
            UnreadableImages: None of the files that were looked at is an image. If only some are
                not, whoever decodes them says so.
        """
        if self.decode_size is not None:
            return self.decode_size, self.decode_size
        if not self._sampled_sizes:
            files = self.files("train")
            assert files is not None, "a data module without training images is told a size"
            sizes, errors = sample_sizes(files.paths, self.max_megapixels)
            self._sampled_sizes = sizes
            self._sampling_errors = errors
        return choose_size(self._sampled_sizes, largest_side)

    def choose_grey_range(self) -> GreyRange | None:
        """Return the range of the grey values of the training images, which are read once for it.

        Raises:
            UserError: Some of them have whole numbers and others floats.
        """
        files = self.files("train")
        if files is None:
            return None
        if not self._grey_range_is_known:
            self._grey_range = self._find_grey_range(files)
            self._grey_range_is_known = True
            if self._grey_range is not None:
                rank_zero_info(f"{describe_range(self._grey_range)}.")
        return self._grey_range

    def _find_grey_range(self, files: Files) -> GreyRange | None:
        if not some_have_many(files.paths, self.max_megapixels):
            return None
        unsized = FileImages(files.paths, files.labels, (1, 1))
        grey_range = remembered(
            self.folder,
            f"{self.cache_name('train')}-grey",
            [_fingerprint(unsized, self.folder), self.max_megapixels],
            lambda: find_grey_range(files.paths, self.max_megapixels),
        )
        return None if grey_range is None else tuple(grey_range)

    def prepare_data(self) -> None:
        """Decode, and warn of images that are in the training and in another split alike."""
        first_time = not self._loaded
        super().prepare_data()
        if first_time:
            self._warn_of_duplicates()

    def load(self, split: Split) -> Images | None:
        """Return the images of a split, or None if the data have none of their own."""
        files = self.files(split)
        if files is None:
            return None
        size = self.size or self.choose_size(None)
        if split == "train":
            self._tell_resizing(size)
        images = FileImages(
            files.paths, files.labels, size, self.max_megapixels, self.fit, self.grey_range
        )
        cached_images = cached_files(
            images, files.names, self.folder, self.cache_name(split), self.cache_limit_gb
        )
        if split == "train" and cached_images.on_the_fly and self._sampling_errors:
            raise UnreadableImages(*self._sampling_errors)
        return cached_images

    def _tell_resizing(self, size: Size) -> None:
        other_sizes = [sampled for sampled in self._sampled_sizes if sampled != size]
        if other_sizes:
            rank_zero_info(
                f"Images become {pixels(size)} pixels when decoded, {FITTING[self.fit]}: "
                f"{len(other_sizes):,} of {len(self._sampled_sizes):,} looked at have another size "
                f"(decode_size=N makes them N x N)"
            )

    def _warn_of_duplicates(self) -> None:
        train = self._loaded["train"]
        train_files = self.files("train") if train else None
        if not train or train_files is None:
            return
        for split in ("val", "test"):
            images = self._loaded[split]
            files = self.files(split) if images else None
            if not images or files is None:
                continue
            pairs = find_duplicates(
                SplitFiles(train, train_files.paths, np.arange(len(train))),
                SplitFiles(images, files.paths, np.arange(len(images))),
            )
            _warn_of_pairs(self._not_left_out(split, pairs), len(files.paths), split)

    def _report_splits(self, chosen: Splits) -> None:
        """Report the splits, and warn of copies that are held out of the training images."""
        super()._report_splits(chosen)
        self._tell_of_one_colour(chosen)
        images = self._loaded["train"]
        is_first_process = self.trainer is None or self.trainer.is_global_zero
        if chosen.val_source != "train" or images is None or not is_first_process:
            return
        files = self.files("train")
        assert files is not None
        held_out = chosen.rows["val"]
        pairs = find_duplicates(
            SplitFiles(images, files.paths, chosen.rows["train"]),
            SplitFiles(images, files.paths, held_out),
        )
        _warn_of_pairs(pairs, len(held_out), "held-out val")

    def _tell_of_one_colour(self, chosen: Splits) -> None:
        """Say how many cached images of each split have one colour all over, and name some."""
        for split, rows in chosen.rows.items():
            images = self._loaded[chosen.source(split)]
            if not isinstance(images, ArrayImages) or images.names is None:
                continue
            rows_of_one_colour = np.intersect1d(images.rows_of_one_colour(), rows)
            if not len(rows_of_one_colour):
                continue
            examples = [images.names[row] for row in rows_of_one_colour[:MAX_EXAMPLES]]
            rank_zero_info(
                f"{len(rows_of_one_colour):,} of {len(rows):,} {split} images have one colour all "
                f"over, such as {printable(', '.join(examples))}: look whether they should."
            )

    def _not_left_out(self, split: Split, pairs: list[Pair]) -> list[Pair]:
        """Return the pairs of a training image and one of a split of which both stay."""
        if not pairs:
            return []
        names_of_train = self._names_by_path("train")
        names_of_split = self._names_by_path(split)
        names = []
        train_names = []
        for train_path, path in pairs:
            train_names.append(names_of_train[train_path])
            names.append(names_of_split[path])
        rows = np.intersect1d(
            self.rows_that_stay("train", train_names), self.rows_that_stay(split, names)
        )
        return [pairs[row] for row in rows]

    def _names_by_path(self, split: Split) -> dict[str, str]:
        """Return the names of the images of a split, such as "train/cat/007.png", by path."""
        files = self.files(split)
        assert files is not None
        names = {}
        for path, name in zip(files.paths, files.names, strict=True):
            names[path] = f"{split}/{name}"
        return names


def _warn_of_pairs(pairs: Sequence[Pair], count: int, split: str) -> None:
    """Warn of images of a split, of `count` in all, that are also among those of training."""
    if not pairs:
        return
    examples = [f"{path} is {train_path}" for train_path, path in pairs[:MAX_EXAMPLES]]
    rank_zero_warn(
        f"{len(pairs):,} of {count:,} {split} images are also among those of training "
        f"({printable('; '.join(examples))}), so the {split.split()[-1]} figure will be too good: "
        f"remove them from either, or list those of training for leave_out."
    )


def cached_files(
    images: FileImages, names: Sequence[str], folder: Path, cache_name: str, cache_limit_gb: float
) -> Images:
    """Return images of files with their names, from the cache if it is used.

    Args:
        images: The files.
        names: Their names in lists and records.
        folder: Folder of the data.
        cache_name: Name of the cache, and text of the progress bar.
        cache_limit_gb: Images that take more gigabytes (1e9 bytes) are decoded on the fly.

    Raises:
        UnreadableImages: Files cannot be read.
    """
    fingerprint = _fingerprint(images, folder)
    height, width = images.size
    result: Images = images
    if 3 * height * width * len(images) > cache_limit_gb * 1e9:
        rank_zero_info(
            f"{cache_name}: decoded on the fly, because all of it would take more than "
            f"{cache_limit_gb:g} GB"
        )
    else:
        result = cached(folder, cache_name, fingerprint, lambda: images)
    result.names = names
    return result


def _fingerprint(images: FileImages, folder: Path) -> list[object]:
    """Return what changes when a file or the size of the images does."""
    files = []
    for path in map(str, images.paths):
        try:
            version = file_version(path)
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}): mend or remove it."
            ) from None
        files.append([_relative_to(folder, path), *version])
    return [files, images.size, images.fit, images.grey_range]


def image_name(folder: Path, path: str) -> str:
    """Return the name of an image in lists and records, the same on all systems."""
    return composed(_relative_to(folder, path).replace(os.sep, "/"))


def _relative_to(folder: Path, path: str) -> str:
    """Return a path relative to a folder; pathlib takes twenty times as long."""
    return path.removeprefix(f"{folder}{os.sep}")
