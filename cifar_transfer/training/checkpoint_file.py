"""Trained checkpoints: read once, checked, and turned into a network, without Lightning."""

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cifar_transfer.base.errors import UserError, first_line
from cifar_transfer.base.files import LOGS
from cifar_transfer.base.text import program
from cifar_transfer.data.geometry import GEOMETRY_KEY, LARGEST_SIDE, Geometry
from cifar_transfer.network.image_classifier import MOST_CLASSES, ImageNetwork

SHOWN = 80  # letters of a value in a message
VERSION_KEY = "cifar_transfer_version"  # in checkpoints
RAW, STEPS = (
    "current_model_state",
    "averaged_steps",
)  # of a moving average; the first is Lightning's name for it
Network = TypeVar("Network", bound=ImageNetwork)


def newest_checkpoint(logs: str | Path = LOGS) -> Path:
    """The best checkpoint of the newest run in a folder of runs; a `UserError` if none has one."""
    found = list(Path(logs).glob("*/checkpoints/best.ckpt"))
    if not found:
        raise UserError(
            f"No run in {Path(logs).resolve()} has a checkpoint: name one with --ckpt, or train with {program('fit')}."
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours as a dictionary; nothing but tensors and primitives is unpickled.

    Raises:
        UserError: The file is missing, damaged, not a checkpoint of `TransferClassifier`, or one of another version.
    """
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise UserError(
            f"The checkpoint {path} {what}: a run keeps its own in RUN/checkpoints/best.ckpt."
        )
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
        raise UserError(
            f"{path} is not a checkpoint of this project. If it holds weights, use it as weights=FILE."
        )
    for name, (value, fits) in _fields(checkpoint).items():
        if not fits:
            shown = repr(value) if len(repr(value)) <= SHOWN else f"{repr(value)[:SHOWN]}..."
            raise UserError(f"{path} is damaged or was altered: its {name} cannot be {shown}.")
    for key in ("state_dict", RAW):
        weights = checkpoint.get(key, {})
        if not isinstance(weights, Mapping) or not all(
            isinstance(value, Tensor) for value in weights.values()
        ):
            raise UserError(f"{path} is damaged or was altered: its {key} holds more than tensors.")
        for name, value in weights.items():
            stored = (
                value.nbytes <= value.untyped_storage().nbytes()
            )  # else one value stands for many, without end
            if stored and not value.isfinite().all():
                raise UserError(
                    f"{path} cannot be used: its weights are NaN or infinite, first in {name}."
                )
    return checkpoint


def _fields(checkpoint: dict[str, Any]) -> dict[str, tuple[Any, bool]]:
    """What is used of a checkpoint as it is: each value, and whether a run can have written it."""

    def side(value: Any) -> bool:
        return type(value) is int and 1 <= value <= LARGEST_SIDE

    def each(value: Any, fits: Callable[[Any], bool], count: int | None) -> bool:
        return (
            isinstance(value, list | tuple)
            and count in (None, len(value))
            and all(map(fits, value))
        )

    def number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    options, geometry = checkpoint["hyper_parameters"], checkpoint.get(GEOMETRY_KEY)
    count, names, image_size = (
        options.get(name) for name in ("num_classes", "class_names", "image_size")
    )
    size, step, averaged = (checkpoint.get(name) for name in ("input_size", "global_step", STEPS))
    shape = {"size": (side, 2), "mean": (number, 3), "std": (lambda x: number(x) and x > 0, 3)}
    known = isinstance(geometry, dict) and geometry.keys() == {
        field.name for field in fields(Geometry)
    }
    whole = known and all(each(geometry[name], *kind) for name, kind in shape.items())  # type: ignore[index]
    return {
        "num_classes": (
            count,
            count is None or (type(count) is int and 2 <= count <= MOST_CLASSES),
        ),
        "class_names": (names, names is None or each(names, lambda name: type(name) is str, count)),
        "image_size": (image_size, image_size is None or side(image_size)),
        "input_size": (size, size is None or each(size, side, 2)),
        GEOMETRY_KEY: (
            geometry,
            geometry is None or (whole and geometry["input_side"] in (None, image_size)),
        ),
        "global_step": (step, type(step) is int and step >= 0),
        STEPS: (averaged, averaged is None or (type(averaged) is int and averaged >= 0)),
    }


def load(path: str | Path, make: Callable[[dict[str, Any]], Network]) -> Network:
    """The trained network of a checkpoint, in eval mode, on the CPU; no pretrained weights are fetched for it.

    Args:
        make: Makes it, untrained, from the options of `TransferClassifier` that the checkpoint has.

    Raises:
        UserError: As `read_checkpoint`; or the weights are not those of the network that it names.
    """
    checkpoint = read_checkpoint(path)
    try:
        network = make(checkpoint["hyper_parameters"] | {"weights": "none"})
        network.take_size(checkpoint)
        network.load_state_dict(checkpoint["state_dict"])
        return network.eval()
    except UserError:
        raise
    except Exception as error:  # of any kind: the file may come from anywhere
        raise UserError(
            f"{path} does not hold the network that it says it does ({first_line(error)})."
        ) from None


def load_network(path: str | Path) -> ImageNetwork:
    """As `load`, what prediction needs of it."""

    def make(options: dict[str, Any]) -> ImageNetwork:
        network = ImageNetwork()
        network.build_network(options)
        return network

    return load(path, make)
