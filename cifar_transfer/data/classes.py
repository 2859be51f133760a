"""Classes: whether data and network mean the same ones, in the same order, and what each weighs in the loss."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from cifar_transfer.base.errors import UserError

SHOWN_CLASSES = 10  # names in a message
UNEQUAL = (
    3  # times the images of the rarest class: if the commonest has so many, it is said what helps
)
Balance = Literal["balanced"]


def check_classes(trained: Sequence[str], found: Sequence[str]) -> None:
    """Refuse data whose classes, in the order of the labels, are not those that a network was trained for.

    Raises:
        UserError: The names or their order differ; the message has both lists, of long ones what differs.
    """
    lists, reordered = [list(trained), list(found)], sorted(trained) == sorted(found)
    if lists[0] == lists[1]:
        return
    if max(map(len, lists)) > SHOWN_CLASSES:  # only what differs
        if reordered:
            lists = [
                [name for name, other in zip(a, b, strict=True) if name != other]
                for a, b in (lists, lists[::-1])
            ]
        else:
            lists = [[name for name in a if name not in b] for a, b in (lists, lists[::-1])]
    ours, theirs = (
        ", ".join(names[:SHOWN_CLASSES]) + (", ..." if len(names) > SHOWN_CLASSES else "")
        or "none besides"
        for names in lists
    )
    raise UserError(
        f"The data have {'their classes in another order' if reordered else 'other classes'} than the network was "
        f"trained for: the network {ours}; the data {theirs}. Name the classes as they were, or begin a new run."
    )


def loss_weights(
    labels: np.ndarray,
    names: Sequence[str],
    weights: Balance | list[float] | None,
    sampler: Balance | None,
) -> Tensor | None:
    """Weights of the classes in the training loss, float32 [C], of mean 1 over the images drawn; says what is done.

    `labels`, int64 [N], are those of the training images of all processes, places in `names`; the others are options of
    `ImageDataModule`.

    Raises:
        UserError: A class has no training images, or there is not one number for each.
    """
    counts = np.bincount(labels, minlength=len(names))
    rare, common = int(counts.argmin()), int(counts.argmax())
    ends = (
        f"{counts[rare]:,} ({names[rare]}) to {counts[common]:,} ({names[common]}) training images"
    )
    if not weights and not sampler:
        if 0 < UNEQUAL * counts[rare] <= counts[common]:
            hint = "--data.class_weights=balanced or --data.sampler=balanced makes up for it"
            rank_zero_info(f"Classes are unequal, of {ends}: {hint}.")
        return None
    if empty := ", ".join(name for name, count in zip(names, counts, strict=True) if not count):
        option = "class_weights" if weights else "sampler"
        raise UserError(
            f"{option} needs training images of every class: add some of {empty}, or leave it out."
        )
    given = 1 / counts if weights == "balanced" else np.array(weights or [1.0] * len(names))
    if len(given) != len(names):
        raise UserError(
            f"class_weights has {len(given)} numbers for {len(names)} classes: give one for each."
        )
    drawn = np.ones_like(counts) if sampler else counts
    scaled = given * drawn.sum() / (given @ drawn)
    done = ["drawn equally often"] * bool(sampler)
    done += [f"with weights from {scaled.min():.3g} to {scaled.max():.3g} in the loss"] * bool(
        weights
    )
    rank_zero_info(f"Classes of {ends}, {', '.join(done)}.")
    return torch.tensor(scaled, dtype=torch.float32) if weights else None
