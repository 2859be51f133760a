"""Folders of images, one folder a class: CIFAR-10 as fast.ai mirrors it, or anybody's own."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from cifar_transfer.base.errors import check
from cifar_transfer.base.files import user_path
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.base.text import program
from cifar_transfer.data.files import FileDataModule
from cifar_transfer.data.image_files import Files
from cifar_transfer.data.layout import class_files, find_layout, is_unlabelled
from cifar_transfer.data.left_aside import LeftAside
from cifar_transfer.data.splits import Split, Splits

TEST_FRACTION = 0.1  # unless another one is asked for


class ImageFolderDataModule(FileDataModule):
    """Your own images: `root/train/<class>/*`, and `root/val/` and `root/test/` alike.

    The folders may have other usual names, such as `Training` or `validation`. Without `val/`,
    `val_fraction` of the training images are held out. Without `test/`, a run ends with its
    validation figure; so it does if the images in `test/` are in no folders of classes.

    If the folders of the classes are right in `root`, `root/<class>/*`, `test_fraction` of the
    images are held out for the test, and `val_fraction` of the others for validation.

    Images are decoded once into a cache beside the data, unless that would exceed
    `cache_limit_gb`. Hidden files and thumbnails that systems make are left aside.

    Args:
        root: Folder with `train/`, or with the folders of the classes; for an evaluation `test/` or
            `val/` alone will do.
        test_fraction: About this share of every class of the training images is held out for the
            test, in [0, 1), if there is no `test/`. The images are the same for every seed. None
            holds out 0.1 if the classes are right in `root`, and else nothing.
        **options: Those of `FileDataModule`.

    Raises:
        UserError: The folder is missing or has another layout, or an option is out of its range.
    """

    def __init__(self, root: str, test_fraction: float | None = None, **options: Any) -> None:
        root = as_primitive("root", root)
        check("root", root, lambda path: isinstance(path, str), "a folder")
        self.root = user_path(root)
        super().__init__(self.root, **options)
        self.test_fraction: float | None = as_primitive("test_fraction", test_fraction)
        if self.test_fraction is not None:
            check(
                "test_fraction",
                self.test_fraction,
                lambda share: 0 <= share < 1,
                "a share of the images in [0, 1), or null",
            )
        self._layout = find_layout(self.root)
        if not self._layout.is_for_evaluation:
            self._train_classes = self.read_classes()
        self._left_aside = LeftAside()
        self._has_told_left_aside = False
        self._unlabelled: set[Split] = set()  # those that were told of
        self.store_options(
            root=str(self.root), test_fraction=self.test_fraction, **self.file_options()
        )

    def read_classes(self) -> list[str]:
        """Return the names of the folders of classes, sorted; bytes not in UTF-8 are escaped."""
        return self._layout.class_names()

    def held_out_test_fraction(self) -> float:
        """Return the share of the training images that is held out for the test."""
        if self.test_fraction is not None:
            return self.test_fraction
        return TEST_FRACTION if self._layout.is_flat else 0.0

    def list_files(self, split: Split) -> Files | None:
        """Return the files of a split, or None if it has no folder."""
        folder = self._layout.folders.get(split)
        if folder is None:
            return None
        if split != "train" and is_unlabelled(folder):
            self._tell_unlabelled(split)
            return None
        return class_files(
            folder,
            self._layout.class_folders(split, self._left_aside),
            self.class_names,
            self._left_aside,
            may_lack_classes=split != "train",
        )

    def grouped_part(self, name: str) -> str:
        """Return the part of an image's name that `group` is looked for in: without the class."""
        return name.partition("/")[2]

    def _report_splits(self, chosen: Splits) -> None:
        """Report the splits, and once what is passed over."""
        super()._report_splits(chosen)
        text = self._left_aside.text()
        if text is not None and not self._has_told_left_aside:
            rank_zero_info(text)
        self._has_told_left_aside = True

    def _tell_unlabelled(self, split: Split) -> None:
        """Say once that the images of a split are left alone."""
        if split in self._unlabelled:
            return
        self._unlabelled.add(split)
        folder = self._layout.folders[split]
        rank_zero_info(
            f"The images in {folder} are in no folders of classes, so they have no labels and are "
            f"left alone. Afterwards, {program('predict')} {folder} tells their classes."
        )
