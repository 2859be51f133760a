"""Folders of images, one folder a class: CIFAR-10 as fast.ai mirrors it, or anybody's own."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.files import user_path
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.base.text import composed, printable, program
from cifar_transfer.data.files import FileDataModule, Files, image_name
from cifar_transfer.data.images import EXTENSIONS, images_below
from cifar_transfer.data.splits import SPLITS, Split


class ImageFolderDataModule(FileDataModule):
    """Your own images: `root/train/<class>/*`, and `root/val/` and `root/test/` alike.

    Without `val/`, `val_fraction` of the training images are held out. Without `test/`, a run ends
    with its validation figure; so it does if the images in `test/` are in no folders of classes.
    Images are decoded once into a cache beside the data, unless that would exceed
    `cache_limit_gb`.

    Args:
        root: Folder with `train/`; for an evaluation `test/` or `val/` alone will do.
        **options: Those of `FileDataModule`.

    Raises:
        UserError: The folder is missing or has another layout, or an option is out of its range.
    """

    def __init__(self, root: str, **options: Any) -> None:
        root = as_primitive("root", root)
        check("root", root, lambda path: isinstance(path, str), "a folder")
        self.root = user_path(root)
        super().__init__(self.root, **options)
        self._train_classes: list[str] | None = None
        if not _is_for_evaluation(self.root):
            self._train_classes = train_classes(self.root)
        self._unlabelled: set[Split] = set()  # those that were told of
        self.store_options(root=str(self.root), **self.file_options())

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

    def list_files(self, split: Split) -> Files | None:
        """Return the files of a split, or None if it has no folder."""
        if not (self.root / split).is_dir():
            if split == "val" and (self.root / "valid").is_dir():
                rank_zero_warn(f"{self.root / 'valid'} is not looked at: call it val.")
            return None
        if split != "train" and _is_unlabelled(self.root / split):
            self._tell_unlabelled(split)
            return None
        return class_files(self.root / split, self.class_names)

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
    labels = np.repeat(np.arange(len(class_names)), counts)
    return Files(paths, labels, [image_name(folder, path) for path in paths])


def _refuse(error: UserError) -> NoReturn:
    raise error
