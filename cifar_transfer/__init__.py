"""Transfer learning on small images with PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from cifar_transfer.data.augment import Augment as Augment
    from cifar_transfer.data.cifar import CIFAR10DataModule as CIFAR10DataModule
    from cifar_transfer.data.folder import ImageFolderDataModule as ImageFolderDataModule
    from cifar_transfer.data.images import ArrayImages as ArrayImages
    from cifar_transfer.data.module import ImageDataModule as ImageDataModule
    from cifar_transfer.data.shapes import ShapesDataModule as ShapesDataModule
    from cifar_transfer.inference.predictor import Classifier as Classifier
    from cifar_transfer.training.classifier import TransferClassifier as TransferClassifier
    from cifar_transfer.training.freeze import BackboneFreeze as BackboneFreeze
    from cifar_transfer.training.phases import Phase as Phase

# Imported when first used: a command that needs no network should not wait for torch.
_ROOMS = {
    "ArrayImages": "data.images",
    "Augment": "data.augment",
    "BackboneFreeze": "training.freeze",
    "CIFAR10DataModule": "data.cifar",
    "Classifier": "inference.predictor",
    "ImageDataModule": "data.module",
    "ImageFolderDataModule": "data.folder",
    "Phase": "training.phases",
    "ShapesDataModule": "data.shapes",
    "TransferClassifier": "training.classifier",
}
__all__ = [*_ROOMS]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
