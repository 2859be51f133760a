"""Classes: whether data and network have the same ones, and what each weighs in loss and scores."""

from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from cifar_transfer.base.errors import UserError

MAX_NAMES_SHOWN = 10  # class names in a message
UNEQUAL_RATIO = (
    3  # images of the commonest class to those of the rarest, from which a hint is given
)
Balance = Literal["balanced"]
Numbers = TypeVar("Numbers", np.ndarray, Tensor)


def check_classes(network_names: Sequence[str], data_names: Sequence[str]) -> None:
    """Check that data have the classes that a network was trained for, in the same order.

    Args:
        network_names: Names of the network's classes, in the order of its outputs.
        data_names: Names of the data's classes, in the order of their labels.

    Raises:
        UserError: The names or their order differ; the message has both lists, or what differs if
            they are long.
    """
    network_list = list(network_names)
    data_list = list(data_names)
    if network_list == data_list:
        return
    reordered = sorted(network_list) == sorted(data_list)
    difference = "their classes in another order" if reordered else "other classes"
    if max(len(network_list), len(data_list)) > MAX_NAMES_SHOWN:
        network_list, data_list = _differing_names(network_list, data_list, reordered)
    raise UserError(
        f"The data have {difference} than the network was trained for: "
        f"the network {_enumerate(network_list)}; the data {_enumerate(data_list)}. "
        f"Name the classes as they were, or begin a new run."
    )


def _differing_names(
    network_names: list[str], data_names: list[str], reordered: bool
) -> tuple[list[str], list[str]]:
    """Return the names at other places, or those that only one of the lists has."""
    if not reordered:
        return (
            [name for name in network_names if name not in data_names],
            [name for name in data_names if name not in network_names],
        )
    moved_in_network: list[str] = []
    moved_in_data: list[str] = []
    for network_name, data_name in zip(network_names, data_names, strict=True):
        if network_name != data_name:
            moved_in_network.append(network_name)
            moved_in_data.append(data_name)
    return moved_in_network, moved_in_data


def _enumerate(names: list[str]) -> str:
    if not names:
        return "none besides"
    text = ", ".join(names[:MAX_NAMES_SHOWN])
    return f"{text}, ..." if len(names) > MAX_NAMES_SHOWN else text


def loss_weights(
    labels: np.ndarray,
    names: Sequence[str],
    weights: Balance | list[float] | None,
    sampler: Balance | None,
) -> Tensor | None:
    """Return the weights of the classes in the training loss, and say what is done about them.

    Args:
        labels: Labels of the training images of all processes, int64 [N], places in `names`.
        names: Names of the C classes.
        weights: The option `class_weights` of `ImageDataModule`.
        sampler: The option `sampler` of `ImageDataModule`.

    Returns:
        float32 [C], of mean 1 over the images drawn; None if classes are not weighted.

    Raises:
        UserError: A class has no training images, or there is not one number for each class.
    """
    counts = np.bincount(labels, minlength=len(names))
    if not weights and not sampler:
        _hint_at_unequal_classes(counts, names)
        return None
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        option = "class_weights" if weights else "sampler"
        raise UserError(
            f"{option} needs training images of every class: add some of {', '.join(empty)}, "
            f"or leave it out."
        )
    drawn = np.ones_like(counts) if sampler else counts
    measures = []
    if sampler:
        measures.append("drawn equally often")
    scaled = None
    if weights:
        scaled = _scaled_weights(weights, counts, drawn)
        measures.append(f"with weights from {scaled.min():.3g} to {scaled.max():.3g} in the loss")
    rank_zero_info(f"Classes of {_range_of_counts(counts, names)}, {', '.join(measures)}.")
    return None if scaled is None else torch.tensor(scaled, dtype=torch.float32)


def _scaled_weights(
    weights: Balance | list[float], counts: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """Return one weight for each class, float64 [C], of mean 1 over the images drawn."""
    unscaled = 1 / counts if weights == "balanced" else np.array(weights)
    if len(unscaled) != len(counts):
        raise UserError(
            f"class_weights has {len(unscaled)} numbers for {len(counts)} classes: "
            f"give one for each."
        )
    return unscaled * drawn.sum() / (unscaled @ drawn)


def _hint_at_unequal_classes(counts: np.ndarray, names: Sequence[str]) -> None:
    if 0 < UNEQUAL_RATIO * counts.min() <= counts.max():
        rank_zero_info(
            f"Classes are unequal, of {_range_of_counts(counts, names)}: "
            f"--data.class_weights=balanced or --data.sampler=balanced makes up for it."
        )


def _range_of_counts(counts: np.ndarray, names: Sequence[str]) -> str:
    rarest = int(counts.argmin())
    commonest = int(counts.argmax())
    return (
        f"{counts[rarest]:,} ({names[rarest]}) to {counts[commonest]:,} ({names[commonest]}) "
        f"training images"
    )


def mean_of_classes(scores: Numbers, num_images: Numbers) -> Numbers:
    """Return the mean of a score of each class over the classes that have images.

    That of the recall is the balanced accuracy, that of F1 the macro F1.

    Args:
        scores: Score of each class, [C]. That of a class without images may be anything.
        num_images: Number of images of each class, [C].

    Returns:
        A scalar.
    """
    return scores[num_images > 0].mean()
