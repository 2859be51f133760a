"""Folders of images, one folder a class: CIFAR-10 as fast.ai mirrors it, or anybody's own."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.files import file_version, user_path
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.base.text import composed, printable, program
from cifar_transfer.data.cache import cached
from cifar_transfer.data.exact_duplicates import Pair, SplitFiles, find_duplicates
from cifar_transfer.data.geometry import (
    Fit,
    Size,
    check_decode_size,
    check_fit,
    choose_size,
    pixels,
)
from cifar_transfer.data.images import (
    EXTENSIONS,
    MAX_MEGAPIXELS,
    FileImages,
    Images,
    UnreadableImages,
    images_below,
    read_size,
)
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.data.splits import SPLITS, Split, Splits

MAX_SAMPLED_IMAGES = 1000  # training images, evenly spread, whose sizes decide the common size
FITTING: dict[Fit, str] = {
    "crop": "resized and cut to the centre",
    "pad": "resized, with black beside them",
    "stretch": "stretched",
}
MAX_EXAMPLES = 2  # duplicates that a warning names

Files = tuple[list[str], np.ndarray]  # paths of N images, and their labels, int64 [N]


class ImageFolderDataModule(ImageDataModule):
    """Your own images: `root/train/<class>/*`, and `root/val/` and `root/test/` alike.

    Without `val/`, `val_fraction` of the training images are held out. Without `test/`, a run ends
    with its validation figure; so it does if the images in `test/` are in no folders of classes.
    Images are decoded once into a cache beside the data, unless that
    would exceed `cache_limit_gb`.

    Args:
        root: Folder with `train/`; for an evaluation `test/` or `val/` alone will do.
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
        UserError: The folder is missing or has another layout, or an option is out of its range.
    """

    def __init__(
        self,
        root: str,
        decode_size: int | None = None,
        fit: Fit = "crop",
        cache_limit_gb: float = 8.0,
        max_megapixels: float = MAX_MEGAPIXELS,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        root = as_primitive("root", root)
        self.decode_size: int | None = as_primitive("decode_size", decode_size)
        self.cache_limit_gb: float = as_primitive("cache_limit_gb", cache_limit_gb)
        self.max_megapixels: float = as_primitive("max_megapixels", max_megapixels)
        check("root", root, lambda path: isinstance(path, str), "a folder")
        check_decode_size(self.decode_size)
        self.fit: Fit = as_primitive("fit", fit)
        check_fit(self.fit)
        check("cache_limit_gb", self.cache_limit_gb, lambda size: size >= 0, "0 or more")
        check("max_megapixels", self.max_megapixels, lambda size: size > 0, "a positive number")
        self.root = user_path(root)
        self._train_classes: list[str] | None = None
        if not _is_for_evaluation(self.root):
            self._train_classes = train_classes(self.root)
        self._files: dict[Split, Files] = {}
        self._sampled_sizes: list[Size] = []
        self._sampling_errors: list[str] = []
        self._unlabelled: set[Split] = set()  # those that were told of
        self.store_options(
            root=str(self.root),
            decode_size=self.decode_size,
            fit=self.fit,
            cache_limit_gb=self.cache_limit_gb,
            max_megapixels=self.max_megapixels,
        )

    @property
    def class_names(self) -> list[str]:
        """Names of the folders in `train/`, sorted; bytes that are not UTF-8 are escaped.

        Without that folder they are the classes of the run that is evaluated.

        Raises:
            UserError: They are not known.
        """
        if self._train_classes is not None:
            return self._train_classes
        if self._earlier.class_names is not None:
            return list(self._earlier.class_names)
        return train_classes(self.root)  # which says what is missing

    def choose_size(self, largest_side: int | None) -> Size:
        """Return `decode_size`, or the size that suits the training images and the network.

        Raises:
            UnreadableImages: None of the files that were looked at is an image. If only some are
                not, whoever decodes them says so.
        """
        if self.decode_size is not None:
            return self.decode_size, self.decode_size
        if not self._sampled_sizes:
            paths, _ = self._list_files("train")
            count = min(MAX_SAMPLED_IMAGES, len(paths))
            rows = np.linspace(0, len(paths) - 1, count).astype(int)
            self._sample_sizes([paths[row] for row in rows])
        return choose_size(self._sampled_sizes, largest_side)

    def _sample_sizes(self, paths: Sequence[str]) -> None:
        self._sampling_errors = []
        for path in paths:
            try:
                self._sampled_sizes.append(read_size(path, self.max_megapixels))
            except UserError as error:
                self._sampling_errors.append(str(error))
        if not self._sampled_sizes:
            raise UnreadableImages(*self._sampling_errors)

    def prepare_data(self) -> None:
        """Decode, and warn of images that are in the training and in another split alike."""
        first_time = not self._loaded
        super().prepare_data()
        if first_time:
            self._warn_of_duplicates()

    def load(self, split: Split) -> Images | None:
        """Return the images of a split, or None if it has no folder."""
        if not (self.root / split).is_dir():
            if split == "val" and (self.root / "valid").is_dir():
                rank_zero_warn(f"{self.root / 'valid'} is not looked at: call it val.")
            return None
        if split != "train" and _is_unlabelled(self.root / split):
            self._tell_unlabelled(split)
            return None
        size = self.size or self.choose_size(None)
        if split == "train":
            self._tell_resizing(size)
        paths, labels = self._list_files(split)
        images = FileImages(paths, labels, size, self.max_megapixels, self.fit)
        cached_images = folder_images(images, self.root, split, self.cache_limit_gb)
        if split == "train" and cached_images.on_the_fly and self._sampling_errors:
            raise UnreadableImages(*self._sampling_errors)
        return cached_images

    def _tell_unlabelled(self, split: Split) -> None:
        """Say once that the images of a split are left alone."""
        if split in self._unlabelled:
            return
        self._unlabelled.add(split)
        folder = self.root / split
        rank_zero_info(
            f"The images in {folder} are in no folders of classes, so they have no labels and are "
            f"left alone. Afterwards, {program('predict')} {folder} tells their classes."
        )

    def _tell_resizing(self, size: Size) -> None:
        other_sizes = [sampled for sampled in self._sampled_sizes if sampled != size]
        if other_sizes:
            rank_zero_info(
                f"Images become {pixels(size)} pixels when decoded, {FITTING[self.fit]}: "
                f"{len(other_sizes):,} of {len(self._sampled_sizes):,} looked at have another size "
                f"(decode_size=N makes them N x N)"
            )

    def _list_files(self, split: Split) -> Files:
        """Return the files of a split, which are kept: listing a large folder takes seconds."""
        if split not in self._files:
            self._files[split] = class_files(self.root / split, self.class_names)
        return self._files[split]

    def _warn_of_duplicates(self) -> None:
        train = self._loaded["train"]
        if not train:
            return
        train_paths, _ = self._list_files("train")
        for split in ("val", "test"):
            images = self._loaded[split]
            if not images:
                continue
            paths, _ = self._list_files(split)
            pairs = find_duplicates(
                SplitFiles(train, train_paths, np.arange(len(train))),
                SplitFiles(images, paths, np.arange(len(images))),
            )
            _warn_of_pairs(self._not_left_out(split, pairs), len(paths), split)

    def _report_splits(self, chosen: Splits) -> None:
        """Report the splits, and warn of copies that are held out of the training images."""
        super()._report_splits(chosen)
        images = self._loaded["train"]
        is_first_process = self.trainer is None or self.trainer.is_global_zero
        if chosen.val_source != "train" or images is None or not is_first_process:
            return
        paths, _ = self._list_files("train")
        held_out = chosen.rows["val"]
        pairs = find_duplicates(
            SplitFiles(images, paths, chosen.rows["train"]), SplitFiles(images, paths, held_out)
        )
        _warn_of_pairs(pairs, len(held_out), "held-out val")

    def _not_left_out(self, split: Split, pairs: list[Pair]) -> list[Pair]:
        """Return the pairs of a training image and one of a split of which both stay."""
        names = []
        train_names = []
        for train_path, path in pairs:
            train_names.append(_image_name(self.root, train_path))
            names.append(_image_name(self.root, path))
        rows = np.intersect1d(
            self.rows_that_stay("train", train_names), self.rows_that_stay(split, names)
        )
        return [pairs[row] for row in rows]


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


def _is_for_evaluation(root: Path) -> bool:
    """Return whether a folder has images of a split, but none to train on."""
    if (root / "train").is_dir():
        return False
    return (root / "test").is_dir() or (root / "val").is_dir()


def _is_unlabelled(folder: Path) -> bool:
    """Return whether a folder has images, but no folders for their classes."""
    if class_folders(folder):
        return False
    return has_images(folder)


def train_classes(root: Path) -> list[str]:
    """Return the names of the classes with a folder in `root/train`, sorted.

    Raises:
        UserError: There is no such folder, or fewer than two folders in it.
    """
    train = root / "train"
    if not train.is_dir():
        raise _train_is_missing(root)
    names = list(class_folders(train))
    if not names:
        raise UserError(f"{train} has no folders: it needs one for each class.")
    if len(names) == 1:
        raise UserError(f"{train} has one class only ({names[0]}): it needs two or more.")
    return names


def _train_is_missing(root: Path) -> UserError:
    train = root / "train"
    if root.is_file():
        return UserError(
            f"{root} is a file: unpack it if it is an archive, and name the folder with `train/`."
        )
    if not root.is_dir():
        return UserError(f"{train} is missing, because there is no folder {root}: name another.")
    if root.name in SPLITS and class_folders(root):
        return UserError(
            f"{train} is missing: name the folder above, {root.absolute().parent}, whose "
            f"{root.name}/ has the folders of the classes."
        )
    return UserError(
        f"{train} is missing: put the images of each class into {root}/train/<class>/."
    )


def class_folders(folder: Path) -> dict[str, str]:
    """Return the names of the folders in a folder by the class that each is for, sorted.

    A class is called like its folder, in Unicode's form NFC and with escapes for bytes that are not
    UTF-8. Hidden folders are left out: Jupyter leaves `.ipynb_checkpoints` anywhere.

    Raises:
        UserError: Two folders are for one class.
    """
    folders: dict[str, str] = {}
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or not os.path.isdir(entry.path):
            continue
        name = printable(composed(entry.name))
        if name in folders:
            raise UserError(
                f"{folder} has two folders called {name}, whose names differ only in how Unicode "
                f"writes them (NFC and NFD): put the images of both into one."
            )
        folders[name] = entry.name
    return dict(sorted(folders.items()))


def has_images(folder: Path) -> bool:
    """Return whether a folder has files that are named as images, itself and not below it."""
    for entry in os.scandir(folder):
        is_hidden = entry.name.startswith(".")
        if not is_hidden and entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
            return True
    return False


def class_files(folder: Path, class_names: Sequence[str]) -> Files:
    """Return the image files anywhere below `folder/<class>/`.

    Args:
        folder: Folder of a split.
        class_names: Names of the classes; the label of an image is the place in this list.

    Returns:
        Paths and labels, int64 [N].

    Raises:
        UserError: A folder is no class's, cannot be read, or has no images. Outside of "train" a
            class may have none, but not all.
    """
    folders = class_folders(folder)
    unknown = folders.keys() - set(class_names)
    if unknown:
        raise UserError(
            f"{folder} has folders that are no classes of training ({', '.join(sorted(unknown))}): "
            f"rename them, or move them elsewhere."
        )
    paths: list[str] = []
    counts: list[int] = []
    for name in class_names:
        class_paths: list[str] = []
        if name in folders:
            class_paths = list(images_below(str(folder / folders[name]), _refuse))
        paths += class_paths
        counts.append(len(class_paths))
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty and (folder.name == "train" or len(empty) == len(class_names)):
        raise UserError(
            f"{folder} has no images of {', '.join(empty)} ({' '.join(EXTENSIONS)}): add some, "
            f"or remove the class."
        )
    return paths, np.repeat(np.arange(len(class_names)), counts)


def _refuse(error: UserError) -> NoReturn:
    raise error


def folder_images(images: FileImages, root: Path, split: Split, cache_limit_gb: float) -> Images:
    """Return images of files below `root/split/` with their names, from the cache if it is used.

    Args:
        images: The files.
        root: Folder of the data.
        split: Name of the folder in it.
        cache_limit_gb: Images that take more gigabytes (1e9 bytes) are decoded on the fly.

    Raises:
        UnreadableImages: Files cannot be read.
    """
    fingerprint = _fingerprint(images, root)
    height, width = images.size
    result: Images = images
    if 3 * height * width * len(images) > cache_limit_gb * 1e9:
        rank_zero_info(
            f"{split}: decoded on the fly, because all of it would take more than "
            f"{cache_limit_gb:g} GB"
        )
    else:
        result = cached(root, split, fingerprint, lambda: images)
    result.names = [_image_name(root / split, path) for path in images.paths]
    return result


def _fingerprint(images: FileImages, root: Path) -> list[object]:
    """Return what changes when a file or the size of the images does."""
    files = []
    for path in images.paths:
        try:
            version = file_version(path)
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}): mend or remove it."
            ) from None
        files.append([_relative_to(root, path), *version])
    return [files, images.size, images.fit]


def _image_name(folder: Path, path: str) -> str:
    """Return the name of an image in lists and records, the same on all systems."""
    return composed(_relative_to(folder, path).replace(os.sep, "/"))


def _relative_to(folder: Path, path: str) -> str:
    """Return a path relative to a folder; pathlib takes twenty times as long."""
    return path.removeprefix(f"{folder}{os.sep}")
