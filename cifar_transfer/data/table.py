"""Images that tables name: a CSV with a file and a label in each row."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.files import user_path
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.base.text import composed, printable
from cifar_transfer.data.files import FileDataModule, Files
from cifar_transfer.data.splits import Split
from cifar_transfer.data.table_rows import TableRow, read_rows

MAX_NAMES_SHOWN = 10  # of classes, in a message
MAX_STEM_CHARS = 40  # of a table's name in the name of its cache


class TableDataModule(FileDataModule):
    """Images that are listed in tables: a CSV with the columns `image` and `label`.

    `image` is a file, seen from the folder of the table, or an absolute path; `label` is the name
    of its class. Other columns are not looked at, so that what `predict --format csv` prints is
    such a table. Without `val`, `val_fraction` of the training images are held out. Without `test`,
    a run ends with its validation figure. Images are decoded once into a cache beside the training
    table, unless that would exceed `cache_limit_gb`.

    Args:
        train: Table of the training images.
        val: Table of the validation images.
        test: Table of the test images.
        tables: Folder from which the names of the tables are seen.
        image_column: Name of the column of files.
        label_column: Name of the column of classes.
        **options: Those of `FileDataModule`.

    Raises:
        UserError: An option is out of its range, or the training table is unfit: the text names
            file and line.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        tables: str = ".",
        image_column: str = "image",
        label_column: str = "label",
        **options: Any,
    ) -> None:
        names: dict[str, Any] = {"train": train, "val": val, "test": test, "tables": tables}
        names |= {"image_column": image_column, "label_column": label_column}
        for name, value in names.items():
            names[name] = as_primitive(name, value)
            if value is not None or name not in ("val", "test"):
                _check_text(name, names[name])
        self.tables: dict[Split, Path] = {}
        splits: tuple[Split, ...] = ("train", "val", "test")
        for split in splits:
            table = names[split]
            if table is not None:
                self.tables[split] = user_path(names["tables"]) / user_path(table)
        super().__init__(self.tables["train"].parent, **options)
        self.columns = (image_column, label_column)
        if self.tables["train"].exists() or not self._is_for_evaluation():
            self._train_classes = self.read_classes()
        self.store_options(**names, **self.file_options())

    def _is_for_evaluation(self) -> bool:
        """Return whether there is a table of a split, but none to train on."""
        tables = [table for split, table in self.tables.items() if split != "train"]
        return any(table.exists() for table in tables)

    def read_classes(self) -> list[str]:
        """Return the labels in the training table, sorted."""
        table = self.tables["train"]
        names = {class_name(row) for row in read_rows(table, *self.columns)}
        if not names:
            raise UserError(f"{table} has a heading and no rows: add a row for each image.")
        if len(names) == 1:
            raise UserError(f"{table} has one label only ({min(names)}): it needs two or more.")
        return sorted(names)

    def list_files(self, split: Split) -> Files | None:
        """Return the files in the table of a split, or None if there is no such table.

        Raises:
            UserError: The table is unfit: a file is not there, a label is no class's, or an image
                has two labels.
        """
        if split not in self.tables:
            return None
        table = self.tables[split]
        if split == "train" and self._train_classes is None and not table.exists():
            return None
        labels = self._labels_of_images(table)
        if not labels:
            raise UserError(f"{table} has a heading and no rows: add a row for each image.")
        return Files(
            paths=[file_of(table, image) for image in labels],
            labels=np.fromiter(labels.values(), np.int64, len(labels)),
            names=[composed(image.replace(os.sep, "/")) for image in labels],
        )

    def _labels_of_images(self, table: Path) -> dict[str, int]:
        """Return the label of each image in a table by its path, in the order of the rows."""
        labels_of_classes = {name: label for label, name in enumerate(self.class_names)}
        labels: dict[str, int] = {}
        num_repeated = 0
        first_missing: TableRow | None = None
        num_missing = 0
        for row in read_rows(table, *self.columns):
            label = labels_of_classes.get(class_name(row))
            if label is None:
                raise self._unknown_class(table, row)
            image = image_path(row)
            if image in labels:
                num_repeated += 1
                if labels[image] != label:
                    raise self._two_labels(table, row)
                continue
            labels[image] = label
            if not os.path.isfile(file_of(table, image)):
                first_missing = first_missing or row
                num_missing += 1
        if first_missing is not None:
            raise _not_there(table, first_missing, num_missing)
        if num_repeated:
            rank_zero_info(f"{table} repeats {num_repeated:,} rows, which are taken once.")
        return labels

    def _unknown_class(self, table: Path, row: TableRow) -> UserError:
        names = ", ".join(self.class_names[:MAX_NAMES_SHOWN])
        if len(self.class_names) > MAX_NAMES_SHOWN:
            names += ", ..."
        return UserError(
            f"{table}, line {row.line}: {class_name(row)} is no class of training ({names}): mend "
            f"the label, or leave the row out."
        )

    def _two_labels(self, table: Path, row: TableRow) -> UserError:
        image = image_path(row)
        rows = read_rows(table, *self.columns)
        first = next(other for other in rows if image_path(other) == image)
        return UserError(
            f"{table}, line {row.line}: {printable(row.image)} is {class_name(row)}, and "
            f"{class_name(first)} in line {first.line}: keep one of these rows."
        )

    def cache_name(self, split: Split) -> str:
        """Return the name of the cache of a split, which those of other tables do not have."""
        return f"{self.tables[split].stem[:MAX_STEM_CHARS]}-{split}"


def _check_text(name: str, value: Any) -> None:
    requirement = "the name of a column"
    if not name.endswith("_column"):
        requirement = "a folder" if name == "tables" else "a file, such as train.csv"
    check(name, value, lambda text: isinstance(text, str) and text, requirement)


def class_name(row: TableRow) -> str:
    """Return the name of the class of a row: its label in Unicode's form NFC, in one line."""
    return printable(composed(row.label))


def image_path(row: TableRow) -> str:
    """Return the path of the image of a row, seen from the table's folder or absolute."""
    return os.path.normpath(os.path.expanduser(row.image))


def file_of(table: Path, image: str) -> str:
    """Return the path of an image, seen from the current folder or absolute."""
    folder = str(table.parent)
    if folder == os.curdir:
        return image
    return os.path.join(folder, image)


def _not_there(table: Path, row: TableRow, num_missing: int) -> UserError:
    """Return the error for rows whose files are missing, of which `row` is the first."""
    others = ""
    if num_missing > 1:
        others = f", nor are those of {num_missing - 1:,} more rows"
    return UserError(
        f"{table}, line {row.line}: there is no file {printable(row.image)}{others}, seen from "
        f"{table.parent.absolute()}, the table's folder: mend the names."
    )
