"""Read a file of weights in the format of any publisher, without running code that it may hold."""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cifar_transfer.base.errors import UserError, first_line

State = dict[str, Tensor]

OWN_PREFIX = "classifier.network."  # of the network's keys in checkpoints of this project
# Entries that hold the weights: of most publishers; of DeiT, BEiT and Swin; of DINO.
WRAPPERS = ("state_dict", "model", "teacher")
PREFIXES = (
    "module.",  # DistributedDataParallel
    "_orig_mod.",  # torch.compile
    "base_encoder.",  # MoCo v3
    "encoder_q.",  # MoCo v1 and v2
    "backbone.",  # DINO
    "network.",  # other people's Lightning modules
    "model.",
    "net.",
)
# torchvision's files of DenseNet have `norm.1` where its network has `norm1`.
DENSENET_KEY = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))"
    r"\.([12]\.(?:weight|bias|running_mean|running_var))$"
)


def read_weights(path: Path) -> tuple[State, dict[str, Any]]:
    """Read a file of weights.

    Args:
        path: A state dict of torchvision or timm (`.safetensors`, or as `torch.save` writes it); a
            published checkpoint that holds one (MoCo v1 to v3, DeiT, BEiT, Swin, DINO); or a
            Lightning checkpoint, of this project or of another one.

    Returns:
        The tensors by the network's own names. If the file is a checkpoint of this project, also
        the description of its network (see `NetworkDescription`), else an empty dictionary.

    Raises:
        UserError: The file is damaged, holds other objects than tensors and primitives, or no
            state dict.
    """
    content = _load(path)
    description = {}
    if _is_own_checkpoint(content):
        description = content["network"]
        state = _without_prefix(content["state_dict"], OWN_PREFIX)
    else:
        state = _unwrap(content)
    is_state = isinstance(state, Mapping) and len(state) > 0
    if not is_state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"{path} is no state dict: save one with torch.save(network.state_dict(), FILE)."
        )
    if not description:
        state = _with_the_networks_names(state)
    return dict(state), description


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Many publishers save their options beside the weights as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not opened: it holds more than tensors, or is no file of weights."
        ) from None
    except Exception as error:  # of any kind: the file may come from anywhere
        raise UserError(
            f"{path} cannot be read as weights ({first_line(error)}): it may be cut short."
        ) from None


def _is_own_checkpoint(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    is_described = isinstance(content.get("network"), dict)
    return is_described and isinstance(content.get("state_dict"), Mapping)


def _unwrap(content: Any) -> Any:
    """Return the state dict within a published checkpoint."""
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return content


def _with_the_networks_names(state: Mapping[str, Tensor]) -> State:
    """Remove the prefixes of wrappers; of several encoders keep the one that training continues."""
    names_have_changed = True
    while names_have_changed:
        names_have_changed = False
        for prefix in PREFIXES:
            inner = _without_prefix(state, prefix)
            if inner:
                state = inner
                names_have_changed = True
    return {DENSENET_KEY.sub(r"\1\2", key): value for key, value in state.items()}


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> State:
    """Return the entries whose keys begin with a prefix, without it."""
    entries = {}
    for key, value in state.items():
        if key.startswith(prefix):
            entries[key.removeprefix(prefix)] = value
    return entries
