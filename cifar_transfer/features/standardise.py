"""Standardisation of features: each one less its mean, divided by its deviation.

Features are read in blocks, so that memory is bounded however many images there are.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifar_transfer.base.errors import UserError
from cifar_transfer.features.extract import Features

BLOCK_IMAGES = 16384  # that are in memory at once
MIN_DEVIATION = 1e-6  # of a feature


class Moments(NamedTuple):
    """Mean and deviation of each feature, float32 [D]."""

    mean: Tensor
    deviation: Tensor


def blocks(values: np.ndarray) -> Iterator[Tensor]:
    """Yield the rows of an array in blocks, float32 [B, D]."""
    for start in range(0, len(values), BLOCK_IMAGES):
        yield torch.from_numpy(np.array(values[start : start + BLOCK_IMAGES], np.float32))


def standardised(
    views: Sequence[np.ndarray], labels: np.ndarray, moments: Moments
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of standardised features, float32 [B, D], and of labels, int64 [B]."""
    all_labels = torch.from_numpy(labels)
    for view in views:
        label_blocks = all_labels.split(BLOCK_IMAGES)
        for values, block_labels in zip(blocks(view), label_blocks, strict=True):
            yield (values - moments.mean) / moments.deviation, block_labels


def compute_moments(train: Features) -> Moments:
    """Return mean and deviation of each feature over all views.

    Raises:
        UserError: A feature is NaN or infinite.
    """
    sums = torch.zeros((), dtype=torch.float64)
    sums_of_squares = torch.zeros((), dtype=torch.float64)
    for view in train.views:
        for values in blocks(view):
            sums = sums + values.double().sum(0)
            sums_of_squares = sums_of_squares + values.double().square().sum(0)
    count = len(train.views) * len(train.labels)
    mean = sums / count
    mean_of_squares = sums_of_squares / count
    if not mean_of_squares.isfinite().all():
        raise UserError(
            "The features of this backbone are NaN or infinite: take other weights, or "
            "--model.normalize=weights."
        )
    variance = (mean_of_squares - mean**2).clamp_min(0)
    deviation = variance.sqrt().clamp_min(MIN_DEVIATION)
    return Moments(mean.float(), deviation.float())
