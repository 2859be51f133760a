"""Transfer learning on small images with PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from cifar_transfer.data.augment_options import Augment as Augment
    from cifar_transfer.data.cifar import CIFAR10DataModule as CIFAR10DataModule
    from cifar_transfer.data.dataset import DatasetDataModule as DatasetDataModule
    from cifar_transfer.data.folder import ImageFolderDataModule as ImageFolderDataModule
    from cifar_transfer.data.images import ArrayImages as ArrayImages
    from cifar_transfer.data.images import FileImages as FileImages
    from cifar_transfer.data.library import TorchvisionDataModule as TorchvisionDataModule
    from cifar_transfer.data.module import ImageDataModule as ImageDataModule
    from cifar_transfer.data.shapes import ShapesDataModule as ShapesDataModule
    from cifar_transfer.data.table import TableDataModule as TableDataModule
    from cifar_transfer.inference.predictor import Classifier as Classifier
    from cifar_transfer.training.classifier import TransferClassifier as TransferClassifier
    from cifar_transfer.training.freeze import BackboneFreeze as BackboneFreeze
    from cifar_transfer.training.phases import Phase as Phase
    from cifar_transfer.training.report import Report as Report

# Modules of the public names. They are imported when they are first used, because a command that
# needs no network should not wait for torch.
_MODULES = {
    "ArrayImages": "cifar_transfer.data.images",
    "Augment": "cifar_transfer.data.augment_options",
    "BackboneFreeze": "cifar_transfer.training.freeze",
    "CIFAR10DataModule": "cifar_transfer.data.cifar",
    "Classifier": "cifar_transfer.inference.predictor",
    "DatasetDataModule": "cifar_transfer.data.dataset",
    "FileImages": "cifar_transfer.data.images",
    "ImageDataModule": "cifar_transfer.data.module",
    "ImageFolderDataModule": "cifar_transfer.data.folder",
    "Phase": "cifar_transfer.training.phases",
    "Report": "cifar_transfer.training.report",
    "ShapesDataModule": "cifar_transfer.data.shapes",
    "TableDataModule": "cifar_transfer.data.table",
    "TorchvisionDataModule": "cifar_transfer.data.library",
    "TransferClassifier": "cifar_transfer.training.classifier",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_MODULES[name])
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
