"""Trained checkpoints: read once, checked, and turned into a network and its data."""

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from cifar_transfer import __version__
from cifar_transfer.data.augment import Augment
from cifar_transfer.data.cifar import CIFAR10DataModule
from cifar_transfer.data.folder import ImageFolderDataModule
from cifar_transfer.data.geometry import GEOMETRY_KEY, Geometry
from cifar_transfer.data.images import LARGEST_SIDE
from cifar_transfer.data.module import PERMUTATION, ImageDataModule
from cifar_transfer.data.shapes import ShapesDataModule
from cifar_transfer.errors import UserError, first_line
from cifar_transfer.files import LOGS, atomic_write
from cifar_transfer.training.average import RAW, STEPS
from cifar_transfer.training.classifier import VERSION_KEY, TransferClassifier
from cifar_transfer.untrusted import check_archive

SHOWN = 80  # letters of a value in a message
DATA_MODULES: dict[str, type[ImageDataModule]] = {
    module.__name__: module for module in (CIFAR10DataModule, ImageFolderDataModule, ShapesDataModule)
}


def newest_checkpoint(logs: str | Path = LOGS) -> Path:
    """The best checkpoint of the newest run in a folder of runs; a `UserError` if none has one."""
    found = list(Path(logs).glob("*/checkpoints/best.ckpt"))
    if not found:
        raise UserError(
            f"No run in {Path(logs).resolve()} has a checkpoint: name one with --ckpt, or train with "
            f"python -m cifar_transfer.fit."
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours as a dictionary; nothing but tensors and primitives is unpickled.

    Raises:
        UserError: The file is missing, damaged, not a checkpoint of `TransferClassifier`, or one of another version.
    """
    if not Path(path).is_file():
        raise UserError(f"The checkpoint {path} does not exist: a run keeps its own in RUN/checkpoints/best.ckpt.")
    check_archive(path)
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is damaged, or holds more than tensors and numbers, which "
            f"could be a program and is not opened."
        ) from None
    except Exception as error:  # of any kind: the file may come from anywhere
        raise UserError(f"{path} cannot be read as a checkpoint ({first_line(error)}).") from None
    options = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(options, dict) or "backbone" not in options or "state_dict" not in checkpoint:
        raise UserError(f"{path} is not a checkpoint of this project. If it holds weights, use it as weights=FILE.")
    if unknown := sorted(map(str, options.keys() - signature(TransferClassifier).parameters.keys())):
        raise UserError(
            f"{path} is of version {checkpoint.get(VERSION_KEY, '0.1.0')} of this project and has options that are "
            f"unknown here, in {__version__}: {', '.join(unknown)}. Read it with that version."
        )
    for name, (value, fits) in _fields(checkpoint).items():
        if not fits:
            shown = repr(value) if len(repr(value)) <= SHOWN else f"{repr(value)[:SHOWN]}..."
            raise UserError(f"{path} is damaged or was altered: its {name} cannot be {shown}.")
    for key in ("state_dict", RAW):
        weights = checkpoint.get(key, {})
        if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise UserError(f"{path} is damaged or was altered: its {key} holds more than tensors.")
        for name, value in weights.items():
            stored = value.nbytes <= value.untyped_storage().nbytes()  # else one value stands for many, without end
            if stored and not value.isfinite().all():
                raise UserError(f"{path} cannot be used: its weights are NaN or infinite, first in {name}.")
    return checkpoint


def _fields(checkpoint: dict[str, Any]) -> dict[str, tuple[Any, bool]]:
    """What is used of a checkpoint as it is: each value, and whether a run can have written it."""

    def side(value: Any) -> bool:
        return type(value) is int and 1 <= value <= LARGEST_SIDE

    def each(value: Any, fits: Callable[[Any], bool], count: int | None) -> bool:
        return isinstance(value, list | tuple) and count in (None, len(value)) and all(map(fits, value))

    def number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    options, geometry = checkpoint["hyper_parameters"], checkpoint.get(GEOMETRY_KEY)
    count, names, image_size = (options.get(name) for name in ("num_classes", "class_names", "image_size"))
    size, step, averaged = (checkpoint.get(name) for name in ("input_size", "global_step", STEPS))
    shape = {"size": (side, 2), "mean": (number, 3), "std": (lambda x: number(x) and x > 0, 3)}
    known = isinstance(geometry, dict) and geometry.keys() == {field.name for field in fields(Geometry)}
    whole = known and all(each(geometry[name], *kind) for name, kind in shape.items())  # type: ignore[index]
    return {
        "num_classes": (count, count is None or (type(count) is int and count >= 2)),
        "class_names": (names, names is None or each(names, lambda name: type(name) is str, count)),
        "image_size": (image_size, image_size is None or side(image_size)),
        "input_size": (size, size is None or each(size, side, 2)),
        GEOMETRY_KEY: (geometry, geometry is None or (whole and geometry["input_side"] in (None, image_size))),
        "global_step": (step, type(step) is int and step >= 0),
        STEPS: (averaged, averaged is None or (type(averaged) is int and averaged >= 0)),
    }


def load_model(path: str | Path) -> TransferClassifier:
    """The trained network of a checkpoint, in eval mode, on the CPU.

    Raises:
        UserError: As `read_checkpoint`; or its weights are not those of the network that it names.
    """
    read_checkpoint(path)
    try:
        return TransferClassifier.load_from_checkpoint(path, map_location="cpu").eval()
    except UserError:
        raise
    except Exception as error:  # of any kind: the file may come from anywhere
        raise UserError(f"{path} does not hold the network that it says it does ({first_line(error)}).") from None


def load_data(checkpoint: dict, **overrides: str | int | None) -> ImageDataModule:
    """The data module a checkpoint was trained with, whose images have the size that they had then.

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
    try:
        options["augment"] = Augment(**options["augment"])
        choice = options.pop("held_out_by", PERMUTATION)
        data = DATA_MODULES[name](**options | overrides)
        if checkpoint.get("input_size"):
            data.fixed_size = Geometry.of(checkpoint).size
    except (KeyError, TypeError) as error:
        raise UserError(f"The checkpoint's options for its data are not those of this version ({error}).") from None
    data.hparams["held_out_by"] = choice
    return data


def keep_size(data: ImageDataModule, model: TransferClassifier, checkpoint: dict) -> None:
    """Have a run that continues decode its images as before, unless its options ask for another size."""
    before = checkpoint["hyper_parameters"] | checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    now = {**model.hparams, **data.hparams}
    same = all(before.get(name) == now.get(name) for name in ("image_size", "train_sizes", "decode_size"))
    if same and checkpoint.get("input_size"):
        data.fixed_size = Geometry.of(checkpoint).size


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are never half written: the one before is kept until the new one is on the disk.

    Lightning's come from the system's folder for temporary files, which may be another disk: that is no single move.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, or raise a `UserError` and keep the one before."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch says "write failed" or "unexpected pos" when its zip file cannot grow.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            kept = "the one before is kept" if path.is_file() else "there is none before"
            raise UserError(f"The checkpoint {path} cannot be written ({cause.strerror}); {kept}.") from error

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint as everywhere, onto the CPU: no code that it may hold is run."""
        return read_checkpoint(path)
