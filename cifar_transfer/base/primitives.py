"""Options as primitives: what a checkpoint can store and read back without running code."""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_transfer.base.errors import UserError


class StoredOptions(dict[str, Any]):
    """Options as primitives, for Lightning's `save_hyperparameters`.

    Lightning compares every argument of the constructor with what it is to save, to find its name
    (2.6.6). NumPy would compare an array with it element by element, which has no truth value;
    without `__array_ufunc__` it leaves the comparison to the dict.
    """

    __array_ufunc__ = None


def as_primitive(name: str, value: Any) -> Any:
    """Return a value as a checkpoint stores it: numbers, text, None, lists and dicts of these.

    Checkpoints are read with `torch.load(weights_only=True)`, which refuses everything else but
    tensors. An option that is no primitive would train for hours and leave a checkpoint that
    nothing opens.

    Args:
        name: Name of the option, for the message.
        value: Primitives, paths, NumPy scalars, strings and arrays, tensors, dataclasses, and
            lists, tuples and dicts with string keys of all these. Arrays become lists; a tensor
            with one element becomes a number.

    Raises:
        UserError: The value holds anything else.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, str):  # of a subclass, such as a member of an enum
        return str.__str__(value)
    if is_dataclass(value) and not isinstance(value, type):
        return as_primitive(name, asdict(value))
    if isinstance(value, list | tuple):
        return [as_primitive(f"{name}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        _check_keys(name, value)
        return {str(key): as_primitive(f"{name}.{key}", item) for key, item in value.items()}
    raise UserError(
        f"{name} is {type(value).__module__}.{type(value).__name__}, which a checkpoint cannot "
        f"store: give numbers, text, or lists of these."
    )


def _check_keys(name: str, value: Mapping[Any, Any]) -> None:
    for key in value:
        if not isinstance(key, str):
            raise UserError(f"{name} has the key {key!r}: keys that are stored are text.")
