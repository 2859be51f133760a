"""Images that are files: listed by a subclass, decoded once, the same in training and evaluation.

`ImageFolderDataModule` finds its files in folders, `TableDataModule` in tables.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.base.text import printable
from cifar_transfer.data.broken_files import (
    BrokenFiles,
    Reasons,
    find_broken,
    remember_broken,
    still_broken,
)
from cifar_transfer.data.cache import remembered
from cifar_transfer.data.decode_size import DecodeSize
from cifar_transfer.data.exact_duplicates import (
    SplitFiles,
    content_numbers,
    copies_among,
    warn_of_copies,
)
from cifar_transfer.data.file_cache import cached_files, fingerprint
from cifar_transfer.data.geometry import Fit, GreyRange, Size, pixels
from cifar_transfer.data.grey_values import TrainingGreyRange, find_grey_range, some_have_many
from cifar_transfer.data.groups import GroupNames, with_copies_together
from cifar_transfer.data.image_files import Files
from cifar_transfer.data.images import (
    MAX_MEGAPIXELS,
    ArrayImages,
    FileImages,
    Images,
    UnreadableImages,
    sample_sizes,
)
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.data.splits import SPLITS, Split, Splits

FITTING: dict[Fit, str] = {
    "crop": "resized and cut to the centre",
    "pad": "resized, with black beside them",
    "stretch": "stretched",
}
MAX_EXAMPLES = 2  # images that a message names


class FileDataModule(ImageDataModule):
    """Base class of data modules of image files; a subclass has `list_files` and `read_classes`.

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
        group: Regular expression over the names of files, such as `(.+)_[0-9]+`: images of one
            group, frames of a video for example, are held out together or not at all. The group is
            what the first brackets match, or all of the match if there are none; a name without a
            match is its own group. Copies of one image are always held out together.
        skip_broken: Leave out files that cannot be read. Otherwise they end a run before training,
            which names them. All files are decoded once to find them.
        **options: Those of `ImageDataModule`.

    Attributes:
        broken: The files that cannot be read.

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
        group: str | None = None,
        skip_broken: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.folder = folder
        self.decode_size: int | None = as_primitive("decode_size", decode_size)
        self.cache_limit_gb: float = as_primitive("cache_limit_gb", cache_limit_gb)
        self.max_megapixels: float = as_primitive("max_megapixels", max_megapixels)
        self.fit: Fit = as_primitive("fit", fit)
        self._decode_size = DecodeSize(self.decode_size, self.fit, self._sample_sizes)
        check("cache_limit_gb", self.cache_limit_gb, lambda size: size >= 0, "0 or more")
        check("max_megapixels", self.max_megapixels, lambda size: size > 0, "a positive number")
        self.group: str | None = as_primitive("group", group)
        self._groups: GroupNames | None = None
        if self.group is not None:
            check("group", self.group, lambda text: isinstance(text, str), "a regular expression")
            self._groups = GroupNames(self.group, self.grouped_part)
        self._has_told_groups = False
        self._train_classes: list[str] | None = None  # set by a subclass that has them
        self._content_numbers: dict[Split, np.ndarray] = {}  # of copies the same
        self._rows_never_read: dict[Split, np.ndarray] | None = None
        self.skip_broken: bool = as_primitive("skip_broken", skip_broken)
        if not isinstance(self.skip_broken, bool):
            raise UserError(f"skip_broken is {self.skip_broken}: take true or false.")
        self.broken = BrokenFiles(folder)
        self._files: dict[Split, Files | None] = {}
        self._training_grey_range = TrainingGreyRange(self._find_grey_range)

    def file_options(self) -> dict[str, Any]:
        """Return the options of all data modules of files, for `store_options`."""
        return {
            "decode_size": self.decode_size,
            "fit": self.fit,
            "cache_limit_gb": self.cache_limit_gb,
            "max_megapixels": self.max_megapixels,
            "group": self.group,
            "skip_broken": self.skip_broken,
        }

    @property
    def group_option(self) -> str | None:
        """The option that says which images belong together, with its value; None without one."""
        if self.group is None:
            return None
        return f"group={self.group}"

    @property
    def class_names(self) -> list[str]:
        """Names of the classes of the training images, sorted.

        Without training images they are the classes of the run that is evaluated.

        Raises:
            UserError: They are not known.
        """
        if self._train_classes is not None:
            return self._train_classes
        if self._earlier.class_names is not None:
            return list(self._earlier.class_names)
        return self.read_classes()  # which says what is missing

    def read_classes(self) -> list[str]:
        """Return the names of the classes of the training images, sorted.

        Raises:
            UserError: There are no training images, or fewer than two classes.
        """
        raise NotImplementedError

    def list_files(self, split: Split) -> Files | None:
        """Return the files of a split, or None if the data have none of their own."""
        raise NotImplementedError

    def grouped_part(self, name: str) -> str:
        """Return the part of an image's name that `group` is looked for in."""
        return name

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
        return self._decode_size.choose(largest_side)

    def _sample_sizes(self) -> list[Size]:
        """Return the sizes of some training files."""
        if self.files("train") is None:
            raise UserError(
                f"{self.folder} has no training images, whose size the others would get: give "
                f"decode_size."
            )
        return sample_sizes(self._paths_to_read("train"), self.max_megapixels)

    def choose_grey_range(self) -> GreyRange | None:
        """Return the range of the grey values of the training images, which are read once for it.

        Raises:
            UserError: Some of them have whole numbers and others floats.
        """
        return self._training_grey_range.choose()

    def _find_grey_range(self) -> GreyRange | None:
        """Return the range, remembered beside the data as long as the files are the same."""
        files = self.files("train")
        if files is None:
            return None
        paths = self._paths_to_read("train")
        if not some_have_many(paths, self.max_megapixels):
            return None
        rows = self._rows_to_read("train")
        unsized = FileImages(files.paths, files.labels, (1, 1))
        grey_range = remembered(
            self.folder,
            f"{self.cache_name('train')}-grey",
            [fingerprint(unsized, self.folder, rows), self.max_megapixels],
            lambda: find_grey_range(paths, self.max_megapixels),
        )
        return None if grey_range is None else tuple(grey_range)

    def prepare_data(self) -> None:
        """Decode, and warn of images that are in the training and in another split alike."""
        first_time = not self._loaded
        super().prepare_data()
        if first_time:
            self._warn_of_duplicates()

    def _load_splits(self) -> dict[Split, Images | None]:
        """Load all splits, and say which files cannot be read.

        Raises:
            UnreadableImages: There are such files, and they are not to be skipped.
        """
        try:
            loaded = super()._load_splits()
        except UnreadableImages as error:
            if not self.broken:
                raise
            raise self.broken.error(error) from None
        if self.broken:
            self.broken.tell()
        return loaded

    def load(self, split: Split) -> Images | None:
        """Return the images of a split, or None if the data have none of their own.

        Raises:
            UnreadableImages: Files are broken, and not to be skipped; or all of a class are.
        """
        files = self.files(split)
        if files is None:
            return None
        name = self.cache_name(split)
        broken_before: Reasons = {}
        if self.skip_broken:
            paths = self._paths_to_read(split)
            broken_before = still_broken(paths, self.max_megapixels, self.folder, name)
            self._skip(split, broken_before)
        try:
            return self._read_files(split)
        except UnreadableImages as error:
            if not error.paths:
                raise
            reasons = dict(zip(error.paths, error.reasons, strict=True))
            if not self.skip_broken:
                self.broken.set(split, files.by_name(reasons, f"{split}/"))
                raise
        remember_broken(broken_before | reasons, self.folder, name)
        self._skip(split, reasons)
        return self._read_files(split, are_checked=True)

    def _skip(self, split: Split, reasons: Reasons) -> None:
        """Take broken files out of the list of a split.

        Raises:
            UserError: A class of training has no other files.
        """
        files = self._files[split]
        if files is None or not reasons:
            return
        known = self.broken.reasons.get(split, {})
        self.broken.set(split, known | files.by_name(reasons, f"{split}/"))
        left = files.without(reasons)
        if split == "train":
            _require_all_classes(files.labels, left.labels, self.class_names)
        self._files[split] = left
        self._rows_never_read = None  # they are counted anew
        self._content_numbers = {}

    def _read_files(self, split: Split, are_checked: bool = False) -> Images:
        """Return the images of a split's files, all of which can be read.

        Args:
            split: The split.
            are_checked: Whether all of them were decoded before.

        Raises:
            UnreadableImages: Some cannot; the error has the paths of all of them.
        """
        files = self.files(split)
        assert files is not None
        size = self.size or self.choose_size(None)
        if split == "train" and not are_checked:
            self._tell_resizing(size)
        self._content_numbers = {}
        images = self._file_images(files, size)
        cached_images = self._cached(split, images, self.cache_name(split))
        if cached_images.on_the_fly:
            name = self.cache_name(split)
            rows = self._rows_to_read(split)
            versions = [fingerprint(images, self.folder, rows), self.max_megapixels]
            reasons = find_broken(images.subset(rows), self.folder, name, versions, are_checked)
            if reasons:
                raise UnreadableImages(*reasons.values(), paths=list(reasons))
        return cached_images

    def load_larger(self) -> Images | None:
        """Return the training images with room for crops, or None if the files have no more pixels.

        They are cached beside those of `load`, which features of a backbone are computed from.
        """
        files = self.files("train")
        assert files is not None
        assert self.size is not None
        size = self._decode_size.with_room(self.size)
        if size == self.size:
            return None
        images = self._file_images(files, size)
        return self._cached("train", images, f"{self.cache_name('train')}-larger")

    def _file_images(self, files: Files, size: Size) -> FileImages:
        return FileImages(
            files.paths, files.labels, size, self.max_megapixels, self.fit, self.grey_range
        )

    def _cached(self, split: Split, images: FileImages, cache_name: str) -> Images:
        """Return the images of a split, from the cache of a name if it is used."""
        files = self.files(split)
        assert files is not None
        return cached_files(
            images,
            files.names,
            self.folder,
            cache_name,
            self.cache_limit_gb,
            self._rows_to_read(split),
        )

    def _tell_resizing(self, size: Size) -> None:
        sampled_sizes = self._decode_size.sampled_sizes
        other_sizes = [sampled for sampled in sampled_sizes if sampled != size]
        if other_sizes:
            rank_zero_info(
                f"Images become {pixels(size)} pixels when decoded, {FITTING[self.fit]}: "
                f"{len(other_sizes):,} of {len(sampled_sizes):,} looked at have another size "
                f"(decode_size=N makes them N x N)"
            )

    def _rows_to_read(self, split: Split) -> np.ndarray:
        """Return the rows, int64, of the files of a split that may be decoded.

        The others are in no split, because `leave_out` lists them: they may be broken.
        """
        files = self.files(split)
        assert files is not None
        rows = np.arange(len(files.paths))
        if self.leave_out is None:
            return rows
        if self._rows_never_read is None:
            self._rows_never_read = self._find_rows_never_read()
        return np.setdiff1d(rows, self._rows_never_read[split])

    def _paths_to_read(self, split: Split) -> Sequence[str]:
        """Return the paths of `_rows_to_read`."""
        files = self.files(split)
        assert files is not None
        rows = self._rows_to_read(split)
        if len(rows) == len(files.paths):
            return files.paths
        return [files.paths[row] for row in rows.tolist()]

    def _find_rows_never_read(self) -> dict[Split, np.ndarray]:
        """Return the rows, int64, of each split's files that are in no split, by names alone."""
        names: dict[Split, Sequence[str]] = {}
        labels: dict[Split, np.ndarray] = {}
        for split in SPLITS:
            files = self.files(split)
            if files is not None:
                names[split] = [f"{split}/{name}" for name in files.names]
                labels[split] = files.labels
        chosen = self.choose_splits(names, labels, self.seed, self._keys_of_names)
        rows_never_read = {}
        for source, source_names in names.items():
            is_left = np.ones(len(source_names), dtype=bool)
            for split, rows in chosen.rows.items():
                if chosen.sources[split] == source:
                    is_left[rows] = False
            rows_never_read[source] = np.flatnonzero(is_left)
        return rows_never_read

    def _choose_splits(self, seed: int) -> Splits:
        """Return which images are in which split; those that were never read are in none."""
        chosen = super()._choose_splits(seed)
        if self._rows_never_read is None:
            return chosen
        rows = {}
        for split, source in chosen.sources.items():
            if split in chosen.rows:
                rows[split] = np.setdiff1d(chosen.rows[split], self._rows_never_read[source])
        return replace(chosen, rows=rows)

    def group_keys(self, names: Sequence[str]) -> Sequence[str]:
        """Return a text for each training image; those of a group and copies have the same one."""
        return with_copies_together(self._keys_of_names(names), self._numbers_of("train"))

    def _keys_of_names(self, names: Sequence[str]) -> Sequence[str]:
        """Return the name of the group of each training image, or without `group` its own."""
        if self._groups is None:
            return names
        keys, num_unmatched = self._groups.keys(names)
        self._tell_groups(
            keys, f"group={self.group} matches all but {num_unmatched:,} of their names"
        )
        return keys

    def _tell_groups(self, keys: Sequence[str], origin: str) -> None:
        """Say once how many groups there are.

        Args:
            keys: Group of each training image.
            origin: What the groups were found by.
        """
        if not self._has_told_groups:
            self._has_told_groups = True
            rank_zero_info(
                f"Groups: {len(set(keys)):,} of {len(keys):,} training images; {origin}."
            )

    def _numbers_of(self, split: Split) -> np.ndarray:
        """Return a number for each image of a split, int64 [N]; copies have the same one.

        Images that are never read have numbers of their own, below 0.
        """
        if not self._content_numbers:
            splits = []
            files_of_splits = []
            for loaded_split, images in self._loaded.items():
                files = self.files(loaded_split)
                if images is not None and files is not None:
                    rows = self._rows_to_read(loaded_split)
                    splits.append(loaded_split)
                    files_of_splits.append(SplitFiles(images, files.paths, rows))
            numbers_of_splits = content_numbers(files_of_splits)
            for read_split, read, numbers in zip(
                splits, files_of_splits, numbers_of_splits, strict=True
            ):
                all_numbers = -1 - np.arange(len(read.paths))
                all_numbers[read.rows] = numbers
                self._content_numbers[read_split] = all_numbers
        return self._content_numbers[split]

    def _report_splits(self, chosen: Splits) -> None:
        """Report the splits, images of one colour, and a group that has no use."""
        super()._report_splits(chosen)
        self._tell_of_one_colour(chosen)
        holds_out = "train" in (chosen.sources["val"], chosen.sources["test"])
        if self.group_option is not None and not holds_out:
            rank_zero_info(
                f"{self.group_option} is not used, because no training images are held out."
            )

    def _tell_of_one_colour(self, chosen: Splits) -> None:
        """Say how many cached images of each split have one colour all over, and name some."""
        for split, rows in chosen.rows.items():
            images = self._loaded[chosen.sources[split]]
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

    def _warn_of_duplicates(self) -> None:
        """Warn of images that are in the training and in another split alike."""
        train_files = self.files("train")
        if train_files is None:
            return
        for split in ("val", "test"):
            files = self.files(split)
            if files is None:
                continue
            train_rows = self._rows_left("train", train_files)
            rows = self._rows_left(split, files)
            copies = copies_among(
                self._numbers_of("train")[train_rows], self._numbers_of(split)[rows]
            )
            pairs = []
            for train_place, place in copies:
                train_path = train_files.paths[train_rows[train_place]]
                pairs.append((train_path, files.paths[rows[place]]))
            warn_of_copies(pairs, len(files.paths), split)

    def _rows_left(self, split: Split, files: Files) -> np.ndarray:
        """Return the rows, int64, of the files of a split that no list leaves out."""
        if self.leave_out is None:
            return np.arange(len(files.paths))
        return self.rows_that_stay(split, [f"{split}/{name}" for name in files.names])


def _require_all_classes(
    labels: np.ndarray, labels_left: np.ndarray, class_names: Sequence[str]
) -> None:
    """Refuse to train if all files of a class are broken."""
    empty = np.setdiff1d(labels, labels_left).tolist()
    if empty:
        names = ", ".join(class_names[label] for label in empty)
        raise UserError(
            f"None of the training images of {names} can be read: mend some, or remove the class."
        )
