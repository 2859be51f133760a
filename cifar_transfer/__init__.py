"""Transfer learning on small images with PyTorch Lightning."""

__version__ = "0.1.0"  # first, for checkpoints record it

from cifar_transfer.augment import Augment
from cifar_transfer.cifar10 import CIFAR10DataModule
from cifar_transfer.classifier import TransferClassifier
from cifar_transfer.data import ImageDataModule
from cifar_transfer.folder import ImageFolderDataModule
from cifar_transfer.freeze import BackboneFreeze
from cifar_transfer.inference import Classifier
from cifar_transfer.shapes import ShapesDataModule

__all__ = [
    "Augment",
    "BackboneFreeze",
    "CIFAR10DataModule",
    "Classifier",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ShapesDataModule",
    "TransferClassifier",
]
