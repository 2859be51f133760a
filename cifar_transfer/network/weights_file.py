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
from cifar_transfer.network.description import NETWORK_KEY, check_description

State = dict[str, Tensor]

OWN_PREFIX = "classifier.network."  # of the network's keys in checkpoints of this project
# Entries that hold the weights in published files. The first that a file has is taken.
WRAPPERS = (
    "state_dict",  # of most publishers
    "model",  # torchvision's reference scripts, DeiT, BEiT, Swin, MAE
    "model_state_dict",  # PyTorch's tutorials
    "model_state",
    "net",
    "network",
    "weights",
    "params",  # BasicSR
    "module",  # DeepSpeed
    "teacher",  # DINO
    "student",
    "state_dict_ema",  # timm
    "model_ema",  # torchvision's reference scripts, timm
)
MAX_WRAPPERS = 4  # one within another
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
            file that holds one under a name in `WRAPPERS`, or as its only one, as MoCo v1 to v3,
            DeiT, BEiT, Swin, DINO and PyTorch's tutorials do; or a Lightning checkpoint, of this
            project or of another one.

    Returns:
        The tensors by the network's own names. If the file is a checkpoint of this project, also
        the description of its network (see `NetworkDescription`), else an empty dictionary.

    Raises:
        UserError: The file is damaged or was altered, holds other objects than tensors and
            primitives, or no state dict.
    """
    content = _load(path)
    if _is_own_checkpoint(content):
        description = content[NETWORK_KEY]
        check_description(path, description)
        state = _without_prefix(content["state_dict"], OWN_PREFIX)
    else:
        description = {}
        state = _unwrap(path, content)
    if not _is_state_dict(state):
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
            f"{path} is not opened: it holds more than tensors, or is no file of weights. If you "
            f"trust it, save its state dict alone with torch.save(network.state_dict(), FILE)."
        ) from None
    except Exception as error:  # of any kind: the file may come from anywhere
        raise UserError(
            f"{path} cannot be read as weights ({first_line(error)}): it may be cut short."
        ) from None


def _is_own_checkpoint(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    is_described = isinstance(content.get(NETWORK_KEY), dict)
    return is_described and isinstance(content.get("state_dict"), Mapping)


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(tensor, Tensor) for tensor in value.values())


def _unwrap(path: Path, content: Any) -> Any:
    """Return the state dict within a published checkpoint, or what is in its place.

    Raises:
        UserError: There are several, and none has a name that publishers use.
    """
    for _ in range(MAX_WRAPPERS):
        if not isinstance(content, Mapping) or _is_state_dict(content):
            break
        key = _wrapper(path, content)
        if key is None:
            break
        content = content[key]
    return content


def _wrapper(path: Path, content: Mapping[Any, Any]) -> Any:
    """Return the key of the entry that holds the weights, or None."""
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping) and content[key]:
            return key
    keys = [key for key, value in content.items() if _is_state_dict(value)]
    if len(keys) > 1:
        raise UserError(
            f"{path} holds several state dicts ({', '.join(map(str, keys))}): save the one that is "
            f"meant with torch.save(state_dict, FILE)."
        )
    return keys[0] if keys else None


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
