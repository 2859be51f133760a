"""Data sets by name: those that torchvision reads, splits and downloads."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torchvision
from filelock import FileLock
from torchvision import datasets

from cifar_transfer.base.errors import UserError, check, first_line
from cifar_transfer.base.files import make_folder, user_path
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.base.time_limit import within
from cifar_transfer.data import cifar
from cifar_transfer.data.cache import cached
from cifar_transfer.data.dataset_images import DatasetImages, sample_sizes
from cifar_transfer.data.decode_size import DecodeSize
from cifar_transfer.data.geometry import Fit, Size
from cifar_transfer.data.images import Images
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.data.splits import Split

BY_FLAG: Mapping[Split, Mapping[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
TWO: Mapping[Split, Mapping[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
THREE: Mapping[Split, Mapping[str, Any]] = {**TWO, "val": {"split": "val"}}
# Arguments of torchvision's classes for each split; a split that is missing does not exist.
SPLITS_OF: Mapping[str, Mapping[Split, Mapping[str, Any]]] = {
    "CIFAR10": BY_FLAG,
    "CIFAR100": BY_FLAG,
    "Country211": {**TWO, "val": {"split": "valid"}},
    "DTD": THREE,
    "EuroSAT": {"train": {}},
    "FashionMNIST": BY_FLAG,
    "FGVCAircraft": THREE,
    "Flowers102": THREE,
    "Food101": TWO,
    "GTSRB": TWO,
    "Imagenette": {"train": {"split": "train"}, "val": {"split": "val"}},
    "KMNIST": BY_FLAG,
    "MNIST": BY_FLAG,
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "RenderedSST2": THREE,
    "STL10": TWO,
    "SVHN": TWO,
    "USPS": BY_FLAG,
}
MAX_DOWNLOAD_SECONDS = 4 * 3600  # of one data set, after which the host is given up


class TorchvisionDataModule(ImageDataModule):
    """A data set of torchvision by its name, with its own splits, class names and download.

    Grey images become RGB. Data sets without validation images hold out `val_fraction` of those of
    training. Images are decoded once into a cache beside the data, unless that would exceed
    `cache_limit_gb`. A data set that is not in `root` is downloaded when its class names are asked
    for, because some of them are in its files.

    Args:
        name: Name of the data set in torchvision, such as "CIFAR100", "SVHN", "STL10", "MNIST",
            "Flowers102", "OxfordIIITPet" or "Food101".
        root: Folder of the data.
        decode_size: Side in pixels of the squares that images become. None chooses as
            `ImageFolderDataModule` does.
        fit: How images of another shape are brought to the size: "crop" takes the centre, "pad"
            adds black on two sides, "stretch" takes no care of the shape.
        cache_limit_gb: A split whose decoded images exceed this many gigabytes (1e9 bytes) is
            decoded on the fly.
        **options: Those of `ImageDataModule`.

    Raises:
        UserError: The name is none of those that are known here, or an option is out of its range.
    """

    def __init__(
        self,
        name: str = "CIFAR100",
        root: str = "data",
        decode_size: int | None = None,
        fit: Fit = "crop",
        cache_limit_gb: float = 8.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.name: str = as_primitive("name", name)
        if self.name not in SPLITS_OF:
            raise UserError(f"name={self.name} is unknown: take {', '.join(SPLITS_OF)}.")
        root = as_primitive("root", root)
        check("root", root, lambda path: isinstance(path, str), "a folder")
        self.root = user_path(root)
        self.decode_size: int | None = as_primitive("decode_size", decode_size)
        self.fit: Fit = as_primitive("fit", fit)
        self._decode_size = DecodeSize(self.decode_size, self.fit, self._sample_sizes)
        self.cache_limit_gb: float = as_primitive("cache_limit_gb", cache_limit_gb)
        check("cache_limit_gb", self.cache_limit_gb, lambda size: size >= 0, "0 or more")
        if self.name == "CIFAR10":
            self.statistics = "cifar10"
        self._datasets: dict[Split, Any] = {}
        self.store_options(
            name=self.name,
            root=str(self.root),
            decode_size=self.decode_size,
            fit=self.fit,
            cache_limit_gb=self.cache_limit_gb,
        )

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of the labels; numbers if the data set has none."""
        train = self._dataset("train")
        names = getattr(train, "classes", None)
        if names is None:
            names = range(int(self._images("train", (1, 1)).labels.max()) + 1)
        return [str(name) for name in names]

    def choose_size(self, largest_side: int | None) -> Size:
        """Return `decode_size`, or the size that suits the training images and the network."""
        return self._decode_size.choose(largest_side)

    def _sample_sizes(self) -> list[Size]:
        """Return the sizes of some training images."""
        return sample_sizes(self._dataset("train"), self.name, "image", "label")

    def is_downloaded(self) -> bool:
        """Return whether torchvision finds the files of all splits in `root`."""
        for arguments in SPLITS_OF[self.name].values():
            if open_if_there(self.name, self.root, arguments) is None:
                return False
        return True

    def load(self, split: Split) -> Images | None:
        """Return the images of a split, or None if the data set has no such split."""
        if split not in SPLITS_OF[self.name]:
            return None
        assert self.size is not None
        return self._load(split, self.size, f"{self.name}-{split}")

    def load_larger(self) -> Images | None:
        """Return the training images with room for crops, or None if they have no more pixels."""
        assert self.size is not None
        size = self._decode_size.with_room(self.size)
        if size == self.size:
            return None
        return self._load("train", size, f"{self.name}-train-larger")

    def _load(self, split: Split, size: Size, cache: str) -> Images:
        """Return the images of a split at a size, from the cache of a name if it is used."""
        images = self._images(split, size)
        height, width = size
        if 3 * height * width * len(images) > self.cache_limit_gb * 1e9:
            return images
        fingerprint = [torchvision.__version__, len(images), size, self.fit]
        return cached(self.root, cache, fingerprint, lambda: images)

    def _images(self, split: Split, size: Size) -> DatasetImages:
        return DatasetImages(self._dataset(split), f"{self.name} {split}", size, fit=self.fit)

    def _dataset(self, split: Split) -> Any:
        """Return torchvision's dataset for a split, which is opened once."""
        if split not in self._datasets:
            self._datasets[split] = open_dataset(self.name, self.root, split)
        return self._datasets[split]


def open_dataset(name: str, root: Path, split: Split) -> Any:
    """Return a dataset of torchvision, which is downloaded if it is not there yet.

    Of several processes one downloads, and the others wait.

    Args:
        name: One of `SPLITS_OF`.
        root: Folder of the data.
        split: One that the data set has.

    Raises:
        UserError: It can be neither read nor downloaded.
    """
    arguments = SPLITS_OF[name][split]
    make_folder(root, "root")
    if not os.access(root, os.W_OK):
        return _open(name, root, arguments)
    with FileLock(root / f".{name}.lock"):
        return _open(name, root, arguments)


def open_if_there(name: str, root: Path, arguments: Mapping[str, Any]) -> Any:
    """Return a dataset of torchvision, or None if it is not there or not whole.

    Args:
        name: One of `SPLITS_OF`.
        root: Folder of the data.
        arguments: Arguments of torchvision's class that name the split.

    Raises:
        UserError: A library that reads it is missing.
    """
    kind = getattr(datasets, name)
    try:
        return kind(root, **arguments)
    except ImportError as error:  # some are in files that scipy reads
        raise _missing_library(name, error) from None
    except (RuntimeError, FileNotFoundError):
        return None


def _missing_library(name: str, error: ImportError) -> UserError:
    return UserError(f"{name} needs {error.name}: pip install {error.name}.")


def _open(name: str, root: Path, arguments: Mapping[str, Any]) -> Any:
    """Return a dataset of torchvision, which is downloaded if it is not there or not whole."""
    dataset = open_if_there(name, root, arguments)
    if dataset is not None:
        return dataset
    kind = getattr(datasets, name)
    try:
        if name == "CIFAR10":  # from the mirrors; torchvision unpacks what is there
            cifar.download(root)
        return within(MAX_DOWNLOAD_SECONDS, lambda: kind(root, download=True, **arguments))
    except ImportError as error:
        raise _missing_library(name, error) from None
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{name} is not in {root.resolve()}, and cannot be downloaded ({first_line(error)}): "
            f"put the files there that torchvision.datasets.{name} reads, or name another folder "
            f"with --data.root=FOLDER."
        ) from None
