"""Standardisation of features: each one less its mean, divided by its deviation.

All heads and findings use this one standardisation, so that what it does about features that hardly
vary holds for all of them. Features are read in blocks, so that memory is bounded however many
images there are.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifar_transfer.base.errors import UserError
from cifar_transfer.features.chosen_rows import FeatureArray
from cifar_transfer.features.extract import Features

BLOCK_IMAGES = 16384  # that are in memory at once
# A feature whose deviation is a smaller share of its root mean square is constant: float32 has
# seven digits, and the last one depends on the other images of the batch.
MIN_RELATIVE_DEVIATION = 1e-6
# Features are divided by no less than this share of the typical deviation. Many features are nearly
# always 0. Divided by their own deviation, which is tiny, the few images in which they are not
# would be far from all others, and would get weights of hundreds, which fine-tuning does not
# survive.
MIN_SHARE_OF_TYPICAL = 0.1


class Standardisation(NamedTuple):
    """What standardises features, by the training images.

    Attributes:
        mean: Mean of each feature, float32 [D].
        divisor: What each feature is divided by, float32 [D], positive. Infinite for a feature that
            is constant in training, which becomes 0 in all images.
    """

    mean: Tensor
    divisor: Tensor


def blocks(values: FeatureArray) -> Iterator[Tensor]:
    """Yield the rows of an array in blocks, float32 [B, D]."""
    for start in range(0, len(values), BLOCK_IMAGES):
        yield torch.from_numpy(np.array(values[start : start + BLOCK_IMAGES], np.float32))


def standardised(
    views: Sequence[FeatureArray], labels: np.ndarray, standardisation: Standardisation
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of standardised features, float32 [B, D], and of labels, int64 [B]."""
    all_labels = torch.from_numpy(labels)
    for view in views:
        label_blocks = all_labels.split(BLOCK_IMAGES)
        for values, block_labels in zip(blocks(view), label_blocks, strict=True):
            yield (values - standardisation.mean) / standardisation.divisor, block_labels


def fit_standardisation(train: Features) -> Standardisation:
    """Return the standardisation by all views of the training images.

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
    deviation = (mean_of_squares - mean**2).clamp_min(0).sqrt()
    varies = deviation > MIN_RELATIVE_DEVIATION * mean_of_squares.sqrt()
    divisor = torch.full_like(deviation, torch.inf)
    if varies.any():
        least = MIN_SHARE_OF_TYPICAL * _typical(deviation[varies])
        divisor[varies] = deviation[varies].clamp_min(least)
    return Standardisation(mean.float(), divisor.float())


def _typical(deviations: Tensor) -> Tensor:
    """Return the deviation at which the features with larger ones make up half of the sum.

    The median would be that of the features that are nearly always 0, where most of them are.
    """
    ascending = deviations.sort().values
    sums = ascending.cumsum(0)
    return ascending[torch.searchsorted(sums, sums[-1] / 2)]
