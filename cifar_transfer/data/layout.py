"""Which folder of somebody's images is for which split, and which for which class."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.text import composed, printable
from cifar_transfer.data.image_files import Files, portable_name
from cifar_transfer.data.images import EXTENSIONS
from cifar_transfer.data.left_aside import LeftAside, is_left_aside
from cifar_transfer.data.listing import has_images_below, images_below, is_image_name
from cifar_transfer.data.splits import SPLITS, Split
from cifar_transfer.data.text_list import TextList

# What people call the folder of a split, in small or capital letters.
FOLDER_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Layout:
    """The folders of the splits in a folder of images.

    Attributes:
        root: The folder.
        folders: Folder of each split that has one. Without one for training, it is `root` itself if
            that has folders of classes.
    """

    root: Path
    folders: dict[Split, Path]

    @property
    def is_flat(self) -> bool:
        """Whether the folders of the classes are right in `root`."""
        return self.folders.get("train") == self.root

    @property
    def is_for_evaluation(self) -> bool:
        """Whether there are images of a split, but none to train on."""
        return bool(self.folders) and "train" not in self.folders

    def class_folders(self, split: Split, left_aside: LeftAside) -> dict[str, str]:
        """Return the folders of the classes in the folder of a split, as `class_folders` does."""
        folder = self.folders[split]
        if folder != self.root:
            return class_folders(folder, left_aside)
        others = [path.name for path in self.folders.values() if path != self.root]
        return _classes_in_root(self.root, others, left_aside)

    def class_names(self) -> list[str]:
        """Return the names of the classes of the training images, sorted.

        Raises:
            UserError: There is no folder for training, or fewer than two folders in it.
        """
        if "train" not in self.folders:
            raise _train_is_missing(self.root)
        train = self.folders["train"]
        names = list(self.class_folders("train", LeftAside()))
        if not names:
            raise UserError(f"{train} has no folders: it needs one for each class.")
        if len(names) == 1:
            raise UserError(f"{train} has one class only ({names[0]}): it needs two or more.")
        return names


def find_layout(root: Path) -> Layout:
    """Return which folder in a folder of images is for which split.

    Raises:
        UserError: Two folders are for one split, or a folder cannot be read.
    """
    if not root.is_dir():
        return Layout(root, {})
    folders = _folders_of_splits(root)
    as_splits = Layout(root, folders)
    if root.absolute().name.lower() in FOLDER_NAMES:  # it is a folder of a split itself
        return as_splits
    min_classes = 2
    if "train" in folders:
        if len(folders) > 1 or not is_unlabelled(folders["train"]):
            return as_splits
        min_classes = 3  # images of trains, beside those of two other classes
    flat = Layout(root, {**folders, "train": root})
    if any(class_folders(folder) for split, folder in folders.items() if split != "train"):
        return as_splits
    if len(flat.class_folders("train", LeftAside())) < min_classes:
        return as_splits
    return flat


def _folders_of_splits(root: Path) -> dict[Split, Path]:
    """Return the folders in `root` that are called like a split.

    One of another name than "train", "val" or "test" needs images: it may be anything else.

    Raises:
        UserError: Two folders are for one split.
    """
    candidates: dict[Split, list[Path]] = {}
    for entry in sorted(_scan(root), key=lambda entry: entry.name):
        split = FOLDER_NAMES.get(entry.name.lower())
        if split is not None and os.path.isdir(entry.path):
            candidates.setdefault(split, []).append(root / entry.name)
    folders: dict[Split, Path] = {}
    for split in SPLITS:
        paths = candidates.get(split, [])
        with_images = [path for path in paths if has_images_below(str(path))]
        if len(with_images) > 1:
            names = " and ".join(path.name for path in with_images)
            raise UserError(
                f"{root} has two folders for {split} images, {names}: put the images of both into "
                f"one, or move one of them elsewhere."
            )
        if with_images:
            folders[split] = with_images[0]
        elif root / split in paths:
            folders[split] = root / split
    return folders


def _classes_in_root(
    root: Path, passed_over: Collection[str], left_aside: LeftAside
) -> dict[str, str]:
    """Return the folders with images in `root`, but for some, as `class_folders` does."""
    classes = {}
    for name, folder_name in class_folders(root, left_aside).items():
        if folder_name in passed_over:
            continue
        if has_images_below(str(root / folder_name)):
            classes[name] = folder_name
    return classes


def _train_is_missing(root: Path) -> UserError:
    train = root / "train"
    if root.is_file():
        return UserError(
            f"{root} is a file: unpack it if it is an archive, and name the folder with `train/`."
        )
    if not root.is_dir():
        return UserError(f"{train} is missing, because there is no folder {root}: name another.")
    if root.absolute().name.lower() in FOLDER_NAMES and class_folders(root):
        return UserError(
            f"{train} is missing: name the folder above, {root.absolute().parent}, whose "
            f"{root.absolute().name}/ has the folders of the classes."
        )
    return UserError(
        f"{train} is missing: put the images of each class into {root}/train/<class>/."
    )


def class_folders(folder: Path, left_aside: LeftAside | None = None) -> dict[str, str]:
    """Return the names of the folders in a folder by the class that each is for, sorted.

    A class is called like its folder, in Unicode's form NFC and with escapes for bytes that are not
    UTF-8. Hidden folders are left out: Jupyter leaves `.ipynb_checkpoints` anywhere. So are those
    that systems make, see `left_aside`.

    Args:
        folder: The folder.
        left_aside: Counts what is left out, and images that lie beside the folders.

    Raises:
        UserError: Two folders are for one class, or the folder cannot be read.
    """
    if left_aside is None:
        left_aside = LeftAside()
    folders: dict[str, str] = {}
    for entry in _scan(folder):
        if not os.path.isdir(entry.path):
            if is_image_name(entry.name):
                left_aside.add("beside the folders of classes")
            continue
        if is_left_aside(entry.name):
            left_aside.add_folder(entry.name, entry.path)
            continue
        name = printable(composed(entry.name))
        if name in folders:
            raise UserError(
                f"{folder} has two folders called {name}, whose names differ only in how Unicode "
                f"writes them (NFC and NFD): put the images of both into one."
            )
        folders[name] = entry.name
    return dict(sorted(folders.items()))


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}).") from None


def has_images(folder: Path) -> bool:
    """Return whether a folder has files that are named as images, itself and not below it."""
    return any(is_image_name(entry.name) and entry.is_file() for entry in _scan(folder))


def is_unlabelled(folder: Path) -> bool:
    """Return whether a folder has images, but no folders for their classes."""
    return not class_folders(folder) and has_images(folder)


def class_files(
    folder: Path,
    folders: Mapping[str, str],
    class_names: Sequence[str],
    left_aside: LeftAside,
    may_lack_classes: bool,
) -> Files:
    """Return the image files anywhere below the folders of the classes.

    Args:
        folder: Folder of a split.
        folders: Names of the folders in it by the class that each is for, see `class_folders`.
        class_names: Names of the classes; the label of an image is the place in this list.
        left_aside: Counts the files that are passed over.
        may_lack_classes: Whether a class may have no images, as outside of training; but not all.

    Raises:
        UserError: A folder is no class's, cannot be read, or has no images.
    """
    unknown = folders.keys() - set(class_names)
    if unknown:
        raise UserError(
            f"{folder} has folders that are no classes of training ({', '.join(sorted(unknown))}): "
            f"rename them, or move them elsewhere."
        )
    counts = np.zeros(len(class_names), np.int64)
    beginning = os.path.join(folder, "")

    def relative_paths() -> Iterator[str]:
        for label, name in enumerate(class_names):
            if name not in folders:
                continue
            for path in images_below(beginning + folders[name], _refuse, left_aside):
                counts[label] += 1
                yield path.removeprefix(beginning)

    paths = TextList(relative_paths(), beginning)
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty and (not may_lack_classes or len(empty) == len(class_names)):
        raise UserError(
            f"{folder} has no images of {', '.join(empty)} ({' '.join(EXTENSIONS)}): add some, "
            f"or remove the class."
        )
    labels = np.repeat(np.arange(len(class_names)), counts)
    names = TextList(portable_name(paths.ending(row)) for row in range(len(paths)))
    return Files(paths, labels, names)


def _refuse(error: UserError) -> NoReturn:
    raise error
