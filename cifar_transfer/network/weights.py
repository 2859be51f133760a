"""Pretrained weights: chosen by name or file, and loaded into a network with another head."""

import copy
import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Size, Tensor, nn
from torchvision import models

from cifar_transfer.base.console import inform
from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import user_path
from cifar_transfer.network import catalog
from cifar_transfer.network.weights_download import published_file
from cifar_transfer.network.weights_file import State, read_weights

# Keys of the auxiliary heads of GoogLeNet and Inception v3, which are built without them.
AUXILIARY_PREFIXES = ("aux1.", "aux2.", "AuxLogits.")
MAX_KEYS_SHOWN = 5


class Pretrained(NamedTuple):
    """Weights, and what their source says of them.

    Attributes:
        state: Tensors by the network's own names. Empty for "none".
        description: Description of the network whose checkpoint holds the weights, as
            `NetworkDescription` stores it. Empty if they are no checkpoint of this project.
        published: The library's entry, if the library published the weights.
    """

    state: State
    description: dict[str, Any]
    published: catalog.Weights | None


def are_none(weights: str) -> bool:
    """Return whether the option `weights` asks for a network that has learned nothing."""
    return weights.lower() == "none"


def read(name: str, weights: str) -> Pretrained:
    """Read the weights of a network.

    Args:
        name: The network, as `catalog` has it.
        weights: "DEFAULT" or another of the library's names, a file, or "none" for no state.

    Raises:
        UserError: Nothing has that name, a file is no file of weights, or a download failed.
    """
    if are_none(weights):
        return Pretrained({}, {}, None)
    entries = catalog.weights(name)
    entry = entries.get(weights)
    if weights == "DEFAULT" and entries:
        entry = next(iter(entries.values()))
    if entry is not None:
        state, _ = read_weights(published_file(entry))
        return Pretrained(state, {}, entry)
    path = user_path(weights)
    if path.is_file():
        state, description = read_weights(path)
        return Pretrained(state, description, None)
    raise _unknown_weights(name, weights, list(entries))


def _unknown_weights(name: str, weights: str, published_names: list[str]) -> UserError:
    if not published_names:
        return UserError(
            f"No weights of {name} are published: train it from scratch with weights=none and "
            f"unfreeze_epoch=0, or name a file of your own with weights=FILE."
        )
    hint = ""
    similar_names = difflib.get_close_matches(weights, published_names, n=1)
    if similar_names:
        hint = f"Did you mean {similar_names[0]}? "
    choices = ", ".join(["DEFAULT", *published_names, "none"])
    return UserError(
        f"weights={weights!r} is neither a file nor a name of {name}'s weights. {hint}"
        f"Take one of {choices}, or a path."
    )


def load(
    network: nn.Module, state: State, heads: Sequence[str], source: str, unwanted: str = ""
) -> None:
    """Load weights into a network; a head for other classes is dropped, all other tensors must fit.

    Args:
        network: A network whose tensors are those of the weights, except for its heads' outputs.
        state: Tensors by the network's names, or in a format that timm converts from.
        heads: Names of the layers that tell classes apart.
        source: Name of the weights in messages.
        unwanted: Why the head is not wanted even if it fits; empty if it is wanted.

    Raises:
        UserError: Tensors are missing, unknown, of another shape, or not finite.
    """
    expected = network.state_dict()
    state = _converted_by_timm(network, state, expected)
    for head in heads:
        state = _without_unfit_head(state, expected, head, unwanted)
    # Without the versions of modules, a state dict counts as the oldest, and torch and torchvision
    # look for old names in it. MNASNet alone insists on a version, which a copy of its own has.
    usable: State = {}
    if isinstance(network, models.MNASNet):
        usable = copy.copy(expected)
        usable.clear()
    other_shapes = []
    for key, value in state.items():
        if key in expected and value.shape != expected[key].shape:
            other_shapes.append(key)
        else:
            usable[key] = value
    _refuse_values_that_are_not_finite(usable, source)
    result = network.load_state_dict(usable, strict=False)
    head_prefixes = tuple(f"{head}." for head in heads)
    problems = {
        "missing": _without(result.missing_keys, head_prefixes, other_shapes),
        "unknown": _without(result.unexpected_keys, AUXILIARY_PREFIXES),
        "of another shape": other_shapes,
    }
    descriptions = [f"{problem}: {_some(keys)}" for problem, keys in problems.items() if keys]
    if descriptions:
        raise UserError(
            f"The weights {source} do not fit the network. Keys {'; '.join(descriptions)}."
        )


def _converted_by_timm(network: nn.Module, state: State, expected: State) -> State:
    """Return the state as timm converts it; beside some networks timm keeps a function for that.

    timm's functions know the formats of its networks' publishers.
    """
    module = type(network).__module__
    if not module.startswith("timm."):
        return state
    convert = getattr(sys.modules[module], "checkpoint_filter_fn", None)
    if convert is None or _shapes(state) == _shapes(expected):
        return state
    # Errors of any kind: timm does not know the format, and what does not fit will be named.
    with suppress(Exception):
        return dict(convert(dict(state), network))
    return state


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Size]:
    return {key: value.shape for key, value in state.items()}


def _without_unfit_head(state: State, expected: State, head: str, unwanted: str) -> State:
    """Return the state without a head that is unwanted or has another number of outputs."""
    prefix = f"{head}."
    head_state = _with_prefix(state, prefix)
    if not head_state:
        return state
    head_expected = _with_prefix(expected, prefix)
    if not unwanted and _shapes(head_state) == _shapes(head_expected):
        return state
    weight = f"{head}.weight"
    classes = len(expected[weight])
    reason = f"the data have {classes} classes."
    if weight in state:
        reason = f"it has {len(state[weight])} outputs, the data {classes} classes."
    inform(f"The pretrained head is dropped: {unwanted or reason}")
    return {key: value for key, value in state.items() if key not in head_state}


def _with_prefix(state: State, prefix: str) -> State:
    return {key: value for key, value in state.items() if key.startswith(prefix)}


def _refuse_values_that_are_not_finite(state: State, source: str) -> None:
    """Raise a `UserError` for NaN or infinity.

    torchvision says of VGG16's IMAGENET1K_FEATURES that values are missing.
    """
    keys = []
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            keys.append(key)
    if keys:
        raise UserError(
            f"The weights {source} hold values that are NaN or infinite, in {_some(keys)}: "
            f"take others."
        )


def _without(
    keys: Iterable[str], prefixes: tuple[str, ...], exceptions: Iterable[str] = ()
) -> list[str]:
    """Return the keys that begin with none of the prefixes and are not among the exceptions."""
    return [key for key in keys if not key.startswith(prefixes) and key not in exceptions]


def _some(keys: Iterable[str]) -> str:
    """Return the first keys in alphabetical order, and how many more there are."""
    names = sorted(keys)
    text = ", ".join(names[:MAX_KEYS_SHOWN])
    if len(names) > MAX_KEYS_SHOWN:
        text += f" and {len(names) - MAX_KEYS_SHOWN} more"
    return text
