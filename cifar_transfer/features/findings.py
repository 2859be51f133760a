"""What is wrong with images: labels, outliers, blanks; and which images are most like each other.

All images of all splits are one sequence of N rows here, in the order of the splits, the training
images first.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_transfer.data.splits import Split
from cifar_transfer.features.extract import Features
from cifar_transfer.features.logistic import fit_logistic
from cifar_transfer.features.standardise import fit_standardisation, standardised

NUM_FOLDS = 5  # of the cross-validation
PROJECTED_WIDTH = (
    512  # numbers that stand for the features of an image when neighbours are searched
)
NUM_NEIGHBOURS = 5
MAX_COSINES = 2**26  # that are in memory at once
COMPARED_SIDE = 32  # pixels of the square images that are compared
# Weights of R, G, B in grey, as in programs that take the colours away (ITU-R BT.601).
LUMINANCE = (0.299, 0.587, 0.114)
MAX_BLANK_DEVIATION = 4.0  # of the pixels of a blank image, which are 0 to 255
MAX_OUTLIERS = 100


class Finding(NamedTuple):
    """Something about an image.

    Attributes:
        row: Row of the image.
        score: Confidence, the higher the surer.
        like: For a label the likelier class, for a near-duplicate the row of the earlier image.
    """

    row: int
    score: float
    like: int | None = None


class Neighbours(NamedTuple):
    """The images nearest to each image, the nearest first.

    Attributes:
        cosines: Cosines of their features, float32 [N, K].
        rows: Their rows, int64 [N, K].
    """

    cosines: Tensor
    rows: Tensor


class ComparedImages(NamedTuple):
    """Images reduced to what is compared.

    Attributes:
        grey: uint8 [N, COMPARED_SIDE, COMPARED_SIDE].
        deviations: Standard deviation of the original pixels, float32 [N], 0 to 255.
    """

    grey: Tensor
    deviations: Tensor


def out_of_sample_probabilities(features: Mapping[Split, Features], num_classes: int) -> Tensor:
    """Return the probabilities of regressions that have not seen the image, float32 [N, C].

    Training images are judged in cross-validation, other images by a regression on all training
    images.
    """
    train = features["train"]
    val = features["val"]
    standardisation = fit_standardisation(train)
    head, penalty = fit_logistic(train, val, num_classes, standardisation)
    logits = {}
    for split, split_features in features.items():
        logits[split] = head.logits(split_features)
    folds = np.random.default_rng(0).permutation(len(train.labels)) % NUM_FOLDS
    for fold in np.unique(folds):  # fewer than NUM_FOLDS if there are few images
        inside = folds == fold
        fitted = _rows_of(train, ~inside)
        fold_head, _ = fit_logistic(fitted, val, num_classes, standardisation, (penalty,))
        logits["train"][inside] = fold_head.logits(_rows_of(train, inside))
    return torch.cat(list(logits.values())).softmax(1)


def _rows_of(features: Features, rows: np.ndarray) -> Features:
    """Return the features of some images themselves, without their other views."""
    return Features([features.views[0][rows]], features.labels[rows])


def wrong_labels(probabilities: Tensor, labels: Tensor) -> list[Finding]:
    """Return images whose label is probably wrong, the surest first.

    These are the images whose label is least probable. On CIFAR-10 with changed labels this order
    was better than that by the margin to the likeliest class (see docs/audit.md).

    Args:
        probabilities: Of models that have not seen the image, float32 [N, C].
        labels: int64 [N].
    """
    label_probabilities = probabilities.gather(1, labels[:, None])[:, 0]
    likeliest = probabilities.argmax(1)
    doubted = (likeliest != labels).nonzero()[:, 0]
    order = label_probabilities[doubted].argsort(stable=True)
    findings = []
    for row in doubted[order][: expected_label_errors(probabilities, labels)].tolist():
        findings.append(Finding(row, 1 - float(label_probabilities[row]), int(likeliest[row])))
    return findings


def expected_label_errors(probabilities: Tensor, labels: Tensor) -> int:
    """Return how many labels are wrong, by confident learning.

    See Northcutt et al. 2021, https://arxiv.org/abs/1911.00068. A class is possible for an image if
    it is at least as probable as it is on average for the images with its label. The likeliest of
    the possible classes counts as the true one. Images without a possible class do not count.

    Args:
        probabilities: Of models that have not seen the image, float32 [N, C].
        labels: int64 [N].
    """
    num_classes = probabilities.shape[1]
    label_probabilities = probabilities.gather(1, labels[:, None])[:, 0]
    # A class without images is never possible.
    thresholds = torch.full((num_classes,), torch.inf).scatter_reduce(
        0, labels, label_probabilities, "mean", include_self=False
    )
    possible = torch.where(probabilities >= thresholds, probabilities, -1)
    confident = possible.amax(1) >= 0
    true_classes = possible[confident].argmax(1)
    pairs = labels[confident] * num_classes + true_classes
    # The images with label i whose true class is j.
    joint = pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes).double()
    correct_shares = joint.diag() / joint.sum(1).clamp_min(1)
    images_of_class = labels.bincount(minlength=num_classes)
    return round(float((images_of_class * (1 - correct_shares)).sum()))


def nearest_images(features: Mapping[Split, Features]) -> Neighbours:
    """Return the images nearest to each image, by the cosine of standardised features.

    Many features are projected at random first, which keeps cosines up to some hundredths.
    """
    points = _projected(features)
    return most_similar(points, points, NUM_NEIGHBOURS)


def most_similar(points: Tensor, others: Tensor, count: int) -> Neighbours:
    """Return the rows of `others` with the largest cosine to each row of `points`, but not its own.

    Args:
        points: Unit vectors, float32 [N, P].
        others: Unit vectors of the same images, float32 [N, P].
        count: Number of neighbours; fewer if there are not as many other images.
    """
    count = min(count, len(others) - 1)
    cosine_blocks = []
    row_blocks = []
    first = 0
    for block in points.split(max(1, MAX_COSINES // len(others))):
        cosines = block @ others.T
        block_rows = torch.arange(len(block))
        cosines[block_rows, first + block_rows] = -1  # the image itself
        nearest = cosines.topk(count)
        cosine_blocks.append(nearest.values)
        row_blocks.append(nearest.indices)
        first += len(block)
    return Neighbours(torch.cat(cosine_blocks), torch.cat(row_blocks))


def _projected(features: Mapping[Split, Features]) -> Tensor:
    """Return standardised features of all images, projected to unit vectors, float32 [N, P].

    Features that are few enough are not projected.
    """
    standardisation = fit_standardisation(features["train"])
    width = len(standardisation.mean)
    projection = torch.eye(width)
    if width > PROJECTED_WIDTH:
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(width, PROJECTED_WIDTH, generator=generator)
    points = []
    for split_features in features.values():
        first_view = split_features.views[:1]
        for values, _ in standardised(first_view, split_features.labels, standardisation):
            points.append(F.normalize(values @ projection))
    return torch.cat(points)


def outliers(neighbours: Neighbours) -> list[Finding]:
    """Return the images that are least like their neighbours, the least alike first."""
    distances = 1 - neighbours.cosines.mean(1)
    farthest = distances.topk(min(MAX_OUTLIERS, len(distances)))
    findings = []
    for row, distance in zip(farthest.indices.tolist(), farthest.values.tolist(), strict=True):
        findings.append(Finding(row, distance))
    return findings


def compared_images(batches: Iterable[Tensor]) -> ComparedImages:
    """Return what is compared of images, given in batches, uint8 [B, 3, H, W]."""
    weights = torch.tensor(LUMINANCE)[:, None, None]
    grey_batches = []
    deviation_batches = []
    for images in batches:
        floats = images.float()
        grey = F.interpolate(
            (floats * weights).sum(1, keepdim=True),
            (COMPARED_SIDE, COMPARED_SIDE),
            mode="bilinear",
            antialias=True,
        )
        grey_batches.append(grey[:, 0].round().byte())
        deviation_batches.append(floats.std((1, 2, 3)))
    return ComparedImages(torch.cat(grey_batches), torch.cat(deviation_batches))


def blank_images(deviations: Tensor) -> list[Finding]:
    """Return images of nothing, the emptiest first.

    Args:
        deviations: See `ComparedImages`.
    """
    findings = []
    for row in deviations.argsort(stable=True).tolist():
        deviation = float(deviations[row])
        if deviation < MAX_BLANK_DEVIATION:
            findings.append(Finding(row, 1 - deviation / 255))
    return findings
