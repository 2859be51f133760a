"""Images that tables name: a CSV with a file and a label in each row."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.files import user_path
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.base.text import composed, printable
from cifar_transfer.data.files import FileDataModule
from cifar_transfer.data.groups import refuse_one_group
from cifar_transfer.data.image_files import Files, portable_name
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
        group_column: Name of a column of the training table that says which images belong together,
            by patient or scene for example: images with the same text in it are held out together
            or not at all. In place of `group`, which finds groups in the names of files.
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
        group_column: str | None = None,
        **options: Any,
    ) -> None:
        names: dict[str, Any] = {"train": train, "val": val, "test": test, "tables": tables}
        names |= {"image_column": image_column, "label_column": label_column}
        names["group_column"] = group_column
        for name, value in names.items():
            names[name] = as_primitive(name, value)
            if value is not None or name not in ("val", "test", "group_column"):
                _check_text(name, names[name])
        self.tables: dict[Split, Path] = {}
        splits: tuple[Split, ...] = ("train", "val", "test")
        for split in splits:
            table = names[split]
            if table is not None:
                self.tables[split] = user_path(names["tables"]) / user_path(table)
        super().__init__(self.tables["train"].parent, **options)
        if group_column is not None and self.group is not None:
            raise UserError(
                "group and group_column both say which images belong together: leave one out."
            )
        self.columns = (image_column, label_column)
        self.group_column: str | None = group_column
        self._groups_of_images: dict[str, str] = {}  # by names; of training images, with a column
        if self.tables["train"].exists() or not self._is_for_evaluation():
            self._train_classes = self.read_classes()
        self.store_options(**names, **self.file_options())

    def _is_for_evaluation(self) -> bool:
        """Return whether there is a table of a split, but none to train on."""
        tables = [table for split, table in self.tables.items() if split != "train"]
        return any(table.exists() for table in tables)

    @property
    def group_option(self) -> str | None:
        """The option that says which images belong together, with its value; None without one."""
        if self.group_column is None:
            return super().group_option
        return f"group_column={self.group_column}"

    def read_classes(self) -> list[str]:
        """Return the labels in the training table, sorted.

        Raises:
            UserError: The table cannot be read, or has fewer than two labels.
        """
        table = self.tables["train"]
        names = {class_name(row) for row in self._rows("train")}
        if not names:
            raise _no_rows(table)
        if len(names) == 1:
            raise UserError(f"{table} has one label only ({min(names)}): it needs two or more.")
        return sorted(names)

    def list_files(self, split: Split) -> Files | None:
        """Return the files in the table of a split, or None if there is no such table.

        Raises:
            UserError: The table is unfit: a file is not there, a label is no class's, or an image
                has two labels or is in two groups.
        """
        if split not in self.tables:
            return None
        table = self.tables[split]
        if split == "train" and self._train_classes is None and not table.exists():
            return None
        labels = self._labels_of_images(split)
        if not labels:
            raise _no_rows(table)
        return Files(
            paths=[file_of(table, image) for image in labels],
            labels=np.fromiter(labels.values(), np.int64, len(labels)),
            names=[portable_name(image) for image in labels],
        )

    def _rows(self, split: Split) -> Iterator[TableRow]:
        """Yield the rows of the table of a split; only that of training has groups."""
        group_column = self.group_column if split == "train" else None
        return read_rows(self.tables[split], *self.columns, group_column)

    def _labels_of_images(self, split: Split) -> dict[str, int]:
        """Return the label of each image of a split by its path, in the order of the rows.

        Of training images the groups are kept, too, in `_groups_of_images`.

        Raises:
            UserError: As `list_files`.
        """
        table = self.tables[split]
        labels_of_classes = {name: label for label, name in enumerate(self.class_names)}
        labels: dict[str, int] = {}
        has_groups = split == "train" and self.group_column is not None
        groups = self._groups_of_images
        num_repeated = 0
        first_missing: TableRow | None = None
        num_missing = 0
        for row in self._rows(split):
            label = labels_of_classes.get(class_name(row))
            if label is None:
                raise self._unknown_class(table, row)
            image = image_path(row)
            if image in labels:
                num_repeated += 1
                if labels[image] != label:
                    raise self._two_labels(split, row)
                if has_groups and groups[portable_name(image)] != group_of(row):
                    raise self._two_groups(row)
                continue
            labels[image] = label
            if has_groups:
                groups[portable_name(image)] = group_of(row)
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

    def _two_labels(self, split: Split, row: TableRow) -> UserError:
        first = self._first_row(split, row)
        return UserError(
            f"{self.tables[split]}, line {row.line}: {printable(row.image)} is {class_name(row)}, "
            f"and {class_name(first)} in line {first.line}: keep one of these rows."
        )

    def _two_groups(self, row: TableRow) -> UserError:
        first = self._first_row("train", row)
        return UserError(
            f"{self.tables['train']}, line {row.line}: {printable(row.image)} is of the group "
            f"{printable(row.group)}, and of {printable(first.group)} in line {first.line}: keep "
            f"one of these rows."
        )

    def _first_row(self, split: Split, row: TableRow) -> TableRow:
        """Return the first row with the image of a row."""
        image = image_path(row)
        return next(other for other in self._rows(split) if image_path(other) == image)

    def _keys_of_names(self, names: Sequence[str]) -> Sequence[str]:
        """Return the group of each training image, or without `group_column` as for folders."""
        if self.group_column is None:
            return super()._keys_of_names(names)
        keys = [self._groups_of_images[name] for name in names]
        refuse_one_group(f"group_column={self.group_column}", keys, "a column")
        self._tell_groups(keys, f"the column {self.group_column}")
        return keys

    def cache_name(self, split: Split) -> str:
        """Return the name of the cache of a split, which those of other tables do not have."""
        return f"{self.tables[split].stem[:MAX_STEM_CHARS]}-{split}"


def _no_rows(table: Path) -> UserError:
    return UserError(f"{table} has a heading and no rows: add a row for each image.")


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


def group_of(row: TableRow) -> str:
    """Return the group of a row, in Unicode's form NFC."""
    return composed(row.group)


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
