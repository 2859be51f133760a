from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.primitives import as_primitive


@dataclass
class Pair:
    left: object
    right: object


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (0.5, 0.5),
        ("cat", "cat"),
        (Path("photos/train"), "photos/train"),
        (np.float64(0.25), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(4), 4),
        (np.bool_(True), True),
        (np.str_("dog"), "dog"),
        (np.unique(["b", "a"]), ["a", "b"]),
        (np.array([32]), [32]),
        (np.array(0.5), 0.5),
        (list(np.unique(["b", "a"])), ["a", "b"]),
        (np.logspace(-4, -2, 3)[1], 1e-3),
        (torch.tensor(2), 2),
        (torch.tensor([0.5]), 0.5),
        (torch.tensor([1, 2]), [1, 2]),
        ((1, Path("x")), [1, "x"]),
        ({"a": np.int8(1)}, {"a": 1}),
        (Pair(Path("x"), [np.int64(1)]), {"left": "x", "right": [1]}),
        (Colour.RED, "red"),
    ],
    ids=repr,
)
def test_a_value_is_stored_as_a_primitive(value, stored):
    primitive = as_primitive("option", value)
    assert primitive == stored
    assert type(primitive) is type(stored)
    if isinstance(primitive, list):
        assert [type(item) for item in primitive] == [type(item) for item in stored]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (object(), r"^model.lr is builtins.object, which a checkpoint cannot store"),
        ([1, {2}], r"^model.lr\[1\] is builtins.set"),
        ({"a": lambda: 0}, r"^model.lr.a is builtins.function"),
        ({1: 2}, r"^model.lr has the key 1"),
        (Pair, r"^model.lr is builtins.type"),
    ],
)
def test_what_cannot_be_stored_is_refused(value, says):
    with pytest.raises(UserError, match=says):
        as_primitive("model.lr", value)
