"""Find a checkpoint file, read it safely, and build its network without Lightning."""

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from cifar_transfer.base.errors import UserError, first_line
from cifar_transfer.base.files import LOGS, user_path
from cifar_transfer.base.text import program
from cifar_transfer.network.description import (
    NETWORK_KEY,
    NetworkDescription,
    altered_file,
    check_description,
    is_int_between,
)
from cifar_transfer.network.image_classifier import ImageClassifier

VERSION_KEY = "cifar_transfer_version"
RECORDED_RUN_KEY = "recorded_run"  # identifier of the run, which its record of the splits has, too
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
    path = user_path(path)
    if not path.is_file():
        own = path / "checkpoints" / "best.ckpt"
        if own.is_file():
            raise UserError(f"The checkpoint {path} is the folder of a run: name {own}.")
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
    if not _is_state_dict(weights):
        raise UserError(f"{path} is damaged or was altered: its {key} holds more than tensors.")
    for name, value in weights.items():
        # An altered file may store a huge tensor as a view of one number, and `isfinite` would
        # allocate all of it.
        is_stored = value.nbytes <= value.untyped_storage().nbytes()
        if is_stored and not value.isfinite().all():
            raise UserError(
                f"{path} cannot be used: its weights are NaN or infinite, first in {name}."
            )


def _is_state_dict(weights: Any) -> bool:
    if not isinstance(weights, Mapping):
        return False
    return all(isinstance(value, Tensor) for value in weights.values())


def _check_values(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Refuse values that a run cannot have written."""
    check_description(path, checkpoint[NETWORK_KEY])
    for key in ("global_step", STEPS_KEY):
        steps = checkpoint.get(key, 0)
        if not is_int_between(steps, 0, math.inf):
            raise altered_file(path, key, steps)
