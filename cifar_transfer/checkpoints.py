"""Trained checkpoints: read once, checked, and turned into a network and its data."""

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule

from cifar_transfer.augment import Augment
from cifar_transfer.cifar10 import CIFAR10DataModule
from cifar_transfer.classifier import TransferClassifier
from cifar_transfer.data import ImageDataModule
from cifar_transfer.errors import UserError
from cifar_transfer.folder import ImageFolderDataModule
from cifar_transfer.shapes import ShapesDataModule

LOGS = "lightning_logs"  # where runs are, in the current folder
DATA_MODULES: dict[str, type[ImageDataModule]] = {
    module.__name__: module for module in (CIFAR10DataModule, ImageFolderDataModule, ShapesDataModule)
}


def newest(logs: str | Path = LOGS) -> Path:
    """The best checkpoint of the newest run.

    Args:
        logs: Folder with the runs' folders.

    Raises:
        UserError: No run there has one.
    """
    found = list(Path(logs).glob("*/checkpoints/best.ckpt"))
    if not found:
        raise UserError(
            f"No run in {Path(logs).resolve()} has a checkpoint: name one with --ckpt, or train with "
            f"python -m cifar_transfer.fit."
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours as a dictionary; nothing but tensors and primitives is unpickled.

    Raises:
        UserError: The file is missing, damaged, or not a checkpoint of `TransferClassifier`.
    """
    if not Path(path).is_file():
        raise UserError(f"The checkpoint {path} does not exist: a run keeps its own in RUN/checkpoints/best.ckpt.")
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]}).") from None
    if not isinstance(checkpoint, dict) or "backbone" not in checkpoint.get("hyper_parameters", {}):
        raise UserError(f"{path} is not a checkpoint of this project, but perhaps weights: use it as --model.weights.")
    return checkpoint


def load(path: str | Path) -> TransferClassifier:
    """The trained network of a checkpoint, in eval mode, on the CPU.

    Raises:
        UserError: As `read`.
    """
    read(path)
    return TransferClassifier.load_from_checkpoint(path, map_location="cpu").eval()


def load_data(checkpoint: dict, **overrides: str | int | None) -> ImageDataModule:
    """The data module a checkpoint was trained with.

    Args:
        checkpoint: As loaded; only the modules of this package are made from it.
        overrides: Options to change, say `root` on another machine.

    Raises:
        UserError: The checkpoint has no data module of this package's.
    """
    options = dict(checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    name = options.pop("data", None)
    if name not in DATA_MODULES:
        raise UserError(
            "The checkpoint does not say which data it was trained on: it has no data module of this package's."
        )
    options["augment"] = Augment(**options["augment"])
    return DATA_MODULES[name](**options | overrides)
