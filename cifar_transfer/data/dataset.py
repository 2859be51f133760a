"""Datasets that are at hand in Python: torchvision's, Hugging Face's, or one's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Subset
from tqdm import tqdm

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.data.dataset_images import DatasetImages, dataset_grey_range, sample_sizes
from cifar_transfer.data.decode_size import DecodeSize
from cifar_transfer.data.geometry import Fit, GreyRange, Size
from cifar_transfer.data.grey_values import TrainingGreyRange
from cifar_transfer.data.images import ArrayImages, Images
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.data.splits import Split, digest

BATCH_IMAGES = 64  # read at once


class DatasetDataModule(ImageDataModule):
    """Any map-style dataset of images and labels, from Python.

    ::

        data = DatasetDataModule(
            train=torchvision.datasets.CIFAR100("data", train=True, download=True),
            test=torchvision.datasets.CIFAR100("data", train=False),
        )

    Items are pairs of an image and a label, or mappings with both, as in Hugging Face's datasets.
    Images are PIL images or uint8 arrays of any size, before `ToTensor` and before normalisation.
    They are brought to one size and kept in memory, unless that takes more than `memory_limit_gb`
    or the dataset has a transform, which may be random: it is then read in each epoch. What a
    transform draws is not repeated by a run that is stopped and resumed.

    Args:
        train: Training images.
        test: Test images; without them a run ends with its validation figure.
        val: Validation images; without them, `val_fraction` of the training images are held out.
        class_names: Names of the classes in the order of the labels. None takes those of the
            training images, or numbers.
        decode_size: Side in pixels of the squares that images become. None chooses as
            `ImageFolderDataModule` does.
        fit: How images of another shape are brought to the size: "crop" takes the centre, "pad"
            adds black on two sides, "stretch" takes no care of the shape.
        image_key: Key of the image in items that are mappings.
        label_key: Key of the label.
        groups: A value for each training image, such as the number of a video. Images with the same
            one are held out together or not at all. None: each is by itself.
        memory_limit_gb: A split that takes more gigabytes (1e9 bytes) is read from its dataset in
            each epoch.
        **options: Those of `ImageDataModule`.

    Raises:
        UserError: An option is out of its range; or an item has another form, which is found when
            the data are set up.
    """

    def __init__(
        self,
        train: Any,
        test: Any = None,
        val: Any = None,
        class_names: Sequence[str] | None = None,
        decode_size: int | None = None,
        fit: Fit = "crop",
        image_key: str = "image",
        label_key: str = "label",
        groups: Sequence[Any] | None = None,
        memory_limit_gb: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.datasets: dict[Split, Any] = {"train": train, "val": val, "test": test}
        for split, dataset in self.datasets.items():
            is_map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
            if dataset is not None and not is_map_style:
                raise UserError(
                    f"{split} is a {type(dataset).__name__}, and no map-style dataset: it needs "
                    f"len(dataset) and dataset[i]."
                )
        self.decode_size: int | None = as_primitive("decode_size", decode_size)
        self.fit: Fit = as_primitive("fit", fit)
        self._decode_size = DecodeSize(self.decode_size, self.fit, self._sample_sizes)
        self.memory_limit_gb: float = as_primitive("memory_limit_gb", memory_limit_gb)
        check("memory_limit_gb", self.memory_limit_gb, lambda size: size >= 0, "0 or more")
        self.keys = (image_key, label_key)
        self.groups: list[str] | None = None
        if groups is not None:
            self.groups = [str(group) for group in groups]
            _check_groups(self.groups, len(train))
        self._class_names: list[str] | None = as_primitive("class_names", class_names)
        self._training_grey_range = TrainingGreyRange(self._find_grey_range)
        self.store_options(
            decode_size=self.decode_size,
            fit=self.fit,
            image_key=image_key,
            label_key=label_key,
            groups=digest(self.groups) if self.groups else None,
            memory_limit_gb=self.memory_limit_gb,
        )

    @property
    def class_names(self) -> list[str]:
        """Names of the classes: those given, or of the dataset, or the numbers of the labels."""
        if self._class_names is None:
            self._class_names = self._find_class_names()
        return self._class_names

    def group_keys(self, names: Sequence[str]) -> Sequence[str]:
        """Return the group of each training image, or its name."""
        return names if self.groups is None else self.groups

    def _find_class_names(self) -> list[str]:
        train = _without_subsets(self.datasets["train"])
        names = getattr(train, "classes", None)
        features = getattr(train, "features", None)  # of Hugging Face's datasets
        if names is None and features is not None and self.keys[1] in features:
            names = getattr(features[self.keys[1]], "names", None)
        if names is None:
            labels = self._read("train", (1, 1)).labels
            names = range(int(labels.max()) + 1)
        return [str(name) for name in names]

    def choose_size(self, largest_side: int | None) -> Size:
        """Return `decode_size`, or the size that suits the training images and the network."""
        return self._decode_size.choose(largest_side)

    def _sample_sizes(self) -> list[Size]:
        """Return the sizes of some training images."""
        return sample_sizes(self.datasets["train"], "train", *self.keys)

    def choose_grey_range(self) -> GreyRange | None:
        """Return the range of the grey values of the training images, which are read once for it.

        Raises:
            UserError: Some of them have whole numbers and others floats.
        """
        return self._training_grey_range.choose()

    def _find_grey_range(self) -> GreyRange | None:
        return dataset_grey_range(self.datasets["train"], "train", *self.keys)

    def load(self, split: Split) -> Images | None:
        """Return the images of a split, or None if there is no dataset for it."""
        if self.datasets[split] is None:
            return None
        assert self.size is not None
        return self._load(split, self.size)

    def load_larger(self) -> Images | None:
        """Return the training images with room for crops, or None if they have no more pixels."""
        assert self.size is not None
        size = self._decode_size.with_room(self.size)
        if size == self.size:
            return None
        return self._load("train", size)

    def _load(self, split: Split, size: Size) -> Images:
        images = self._read(split, size)
        height, width = size
        is_too_large = 3 * height * width * len(images) > self.memory_limit_gb * 1e9
        if is_too_large or _has_transform(self.datasets[split]):
            return images
        return in_memory(images, split)

    def _read(self, split: Split, size: Size) -> DatasetImages:
        return DatasetImages(
            self.datasets[split], split, size, *self.keys, self.fit, self.grey_range
        )


def _check_groups(groups: Sequence[str], count: int) -> None:
    if len(groups) != count:
        raise UserError(
            f"There are {len(groups)} groups and {count} training images: give one for each."
        )
    if len(set(groups)) == 1:
        raise UserError(
            f"groups has {groups[0]} for all training images: give images that are to be held out "
            f"apart different ones."
        )


def _without_subsets(dataset: Any) -> Any:
    """Return the dataset that a `Subset`, or a subset of one, is part of."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def _has_transform(dataset: Any) -> bool:
    """Return whether a dataset changes its images, as torchvision's and Hugging Face's may."""
    dataset = _without_subsets(dataset)
    for attribute in ("transform", "transforms"):
        if getattr(dataset, attribute, None) is not None:
            return True
    form = getattr(dataset, "format", None)  # of Hugging Face's: "custom" after `set_transform`
    return isinstance(form, Mapping) and form.get("type") == "custom"


def in_memory(images: Images, name: str) -> ArrayImages:
    """Return images with all their pixels in memory.

    They are read one after another, because a dataset of others may not bear threads.

    Args:
        images: The images, of one size.
        name: Text of the progress bar.
    """
    batches = []
    bar = tqdm(total=len(images), desc=f"decoding {name}", unit="img", disable=None)
    with bar:
        for start in range(0, len(images), BATCH_IMAGES):
            rows = np.arange(start, min(start + BATCH_IMAGES, len(images)))
            batches.append(images.pixels(rows))
            bar.update(len(rows))
    return ArrayImages(np.concatenate(batches), images.labels)
