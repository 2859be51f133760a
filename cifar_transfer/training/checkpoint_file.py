"""Find a checkpoint file, read it safely, and build its network without Lightning."""

import math
import pickle
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from cifar_transfer.base.errors import UserError, first_line
from cifar_transfer.base.files import LOGS
from cifar_transfer.base.text import program
from cifar_transfer.data.geometry import LARGEST_SIDE, Geometry
from cifar_transfer.network.image_classifier import (
    MAX_CLASSES,
    NETWORK_KEY,
    ImageClassifier,
    NetworkDescription,
)

MAX_VALUE_CHARS = 80  # of a value in a message
VERSION_KEY = "cifar_transfer_version"
# Of a moving average of the weights; the first is Lightning's name for the weights that train.
RAW_STATE_KEY = "current_model_state"
STEPS_KEY = "averaged_steps"
CLASSIFIER_PREFIX = "classifier."  # of the weights of `TransferClassifier.classifier`


def newest_checkpoint(logs: str | Path = LOGS) -> Path:
    """Return the best checkpoint of the newest run in a folder of runs.

    Raises:
        UserError: No run has one.
    """
    checkpoints = list(Path(logs).glob("*/checkpoints/best.ckpt"))
    if not checkpoints:
        raise UserError(
            f"No run in {Path(logs).resolve()} has a checkpoint: name one with --ckpt, or train "
            f"with {program('fit')}."
        )
    return max(checkpoints, key=lambda path: path.stat().st_mtime)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of `TransferClassifier`; only tensors and primitives are unpickled.

    Raises:
        UserError: The file is missing, damaged, altered, or not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"The checkpoint {path} {reason}: a run keeps its own in RUN/checkpoints/best.ckpt."
        )
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is damaged, or holds more than tensors and "
            f"numbers, which could be a program and is not opened."
        ) from None
    except Exception as error:  # of any kind, because the file may come from anywhere
        raise UserError(f"{path} cannot be read as a checkpoint ({first_line(error)}).") from None
    is_ours = isinstance(checkpoint, dict) and isinstance(checkpoint.get(NETWORK_KEY), dict)
    if not is_ours or "state_dict" not in checkpoint:
        raise UserError(
            f"{path} is not a checkpoint of this project. If it holds weights, use it as "
            f"weights=FILE."
        )
    _check_values(path, checkpoint)
    for key in ("state_dict", RAW_STATE_KEY):
        _check_weights(path, key, checkpoint.get(key, {}))
    return checkpoint


def load_classifier(path: str | Path) -> ImageClassifier:
    """Return the trained network of a checkpoint, in eval mode, on the CPU.

    No pretrained weights are fetched for it.

    Raises:
        UserError: See `read_checkpoint`; or the weights are not those of the described network.
    """
    checkpoint = read_checkpoint(path)
    try:
        classifier = ImageClassifier.from_description(
            NetworkDescription.from_checkpoint(checkpoint)
        )
        state = checkpoint["state_dict"]
        # It keeps the state's metadata, without which MNASNet takes no weights.
        consume_prefix_in_state_dict_if_present(state, CLASSIFIER_PREFIX)
        classifier.load_state_dict(state)
    except UserError:
        raise
    except Exception as error:  # of any kind, because the file may come from anywhere
        raise UserError(
            f"{path} does not hold the network that it says it does ({first_line(error)})."
        ) from None
    return classifier.eval()


def _check_weights(path: Path, key: str, weights: Any) -> None:
    """Refuse a state dict with anything but finite tensors."""
    if not isinstance(weights, Mapping) or not _all_are(weights.values(), Tensor):
        raise UserError(f"{path} is damaged or was altered: its {key} holds more than tensors.")
    for name, value in weights.items():
        # An altered file may store a huge tensor as a view of one number, and `isfinite` would
        # allocate all of it.
        is_stored = value.nbytes <= value.untyped_storage().nbytes()
        if is_stored and not value.isfinite().all():
            raise UserError(
                f"{path} cannot be used: its weights are NaN or infinite, first in {name}."
            )


def _all_are(values: Any, kind: type) -> bool:
    return all(isinstance(value, kind) for value in values)


def _check_values(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Refuse values that a run cannot have written."""
    network = checkpoint[NETWORK_KEY]
    names = {field.name for field in fields(NetworkDescription)}
    if network.keys() != names:
        raise _altered(path, NETWORK_KEY, sorted(map(str, network)))
    num_classes = network["num_classes"]
    if not _is_int_between(num_classes, 2, MAX_CLASSES):
        raise _altered(path, "num_classes", num_classes)
    class_names = network["class_names"]
    if class_names is not None and not _is_list(class_names, num_classes, str):
        raise _altered(path, "class_names", class_names)
    if type(network["backbone"]) is not str:
        raise _altered(path, "backbone", network["backbone"])
    if type(network["small_images"]) is not bool:
        raise _altered(path, "small_images", network["small_images"])
    patch_size = network["patch_size"]
    if patch_size is not None and not _is_side(patch_size):
        raise _altered(path, "patch_size", patch_size)
    if not _is_geometry(network["geometry"]):
        raise _altered(path, "geometry", network["geometry"])
    for key in ("global_step", STEPS_KEY):
        steps = checkpoint.get(key, 0)
        if not _is_int_between(steps, 0, math.inf):
            raise _altered(path, key, steps)


def _altered(path: Path, name: str, value: Any) -> UserError:
    text = repr(value)
    if len(text) > MAX_VALUE_CHARS:
        text = f"{text[:MAX_VALUE_CHARS]}..."
    return UserError(f"{path} is damaged or was altered: its {name} cannot be {text}.")


def _is_int_between(value: Any, lowest: float, highest: float) -> bool:
    return type(value) is int and lowest <= value <= highest


def _is_side(value: Any) -> bool:
    return _is_int_between(value, 1, LARGEST_SIDE)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_list(value: Any, length: int, kind: type) -> bool:
    return isinstance(value, list) and len(value) == length and _all_are(value, kind)


def _is_geometry(value: Any) -> bool:
    """Return whether a value describes a `Geometry` with possible sizes and statistics."""
    if not isinstance(value, dict) or value.keys() != {field.name for field in fields(Geometry)}:
        return False
    if not _is_list(value["size"], 2, int) or not all(map(_is_side, value["size"])):
        return False
    if value["input_side"] is not None and not _is_side(value["input_side"]):
        return False
    for name in ("mean", "std"):
        channels = value[name]
        if not isinstance(channels, list) or len(channels) != 3:
            return False
        if not all(map(_is_number, channels)):
            return False
    return min(value["std"]) > 0
