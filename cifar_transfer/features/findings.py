"""What is wrong with images, as the features of a network tell: labels, near-duplicates, outliers, images of nothing.

All images of all splits are one row of N here, the training images first.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_transfer.data.splits import Split
from cifar_transfer.features import heads
from cifar_transfer.features.extract import Features

FOLDS = 5  # of the cross-validation
PROJECTED = 512  # numbers that stand for the features of an image where neighbours are looked for
NEAREST = 5  # neighbours of each image
BLOCK = 2**26  # likenesses at once
SIDE, MARGIN = 32, 4  # pixels of an image that is compared, and by how many two may be shifted
ALIKE, SAME = 0.5, 0.9  # least likeness of features, and correlation of pixels, of near-duplicates
FLAT = 4.0  # deviation of the pixels, of 255, of an image of nothing
OUTLIERS = 100


class Finding(NamedTuple):
    """Something about an image."""

    row: int
    score: float  # the higher, the surer
    like: int  # of a label: the likelier class; of a near-duplicate: the image it is like, an earlier one; else -1


def probabilities(found: Mapping[Split, Features], classes: int) -> Tensor:
    """What logistic regression says of each image without having seen it, float32 [N, C].

    That is cross-validation of the training images; of others it is what all training images say.
    """
    train, val = found["train"], found["val"]
    standard = heads.moments(train)
    head, penalty = heads.logistic(train, val, classes, standard)
    logits = {split: head.logits(features) for split, features in found.items()}
    folds = np.random.default_rng(0).permutation(len(train.labels)) % FOLDS
    for fold in np.unique(folds):  # of few images some are empty
        fitted, asked = (
            Features([train.views[0][rows]], train.labels[rows])
            for rows in (folds != fold, folds == fold)
        )
        head, _ = heads.logistic(fitted, val, classes, standard, (penalty,))
        logits["train"][folds == fold] = head.logits(asked)
    return torch.cat([*logits.values()]).softmax(1)


def wrong_labels(shares: Tensor, labels: Tensor) -> list[Finding]:
    """Images whose label is probably wrong, the surest first.

    How many, is estimated by confident learning (Northcutt et al. 2021, https://arxiv.org/abs/1911.00068): an image is
    counted to the likeliest of the classes that are at least as probable for it as on average for the images with their
    label. They are those whose label is least probable beside the likeliest class.

    Args:
        shares: Probabilities of images that have not been fitted on, float32 [N, C].
        labels: int64 [N].
    """
    classes = shares.shape[1]
    given = shares.gather(1, labels[:, None])[:, 0]
    means = torch.full((classes,), torch.inf).scatter_reduce(
        0, labels, given, "mean", include_self=False
    )
    confident = torch.where(shares >= means, shares, -1)
    counted = confident.amax(1) >= 0
    pairs = labels[counted] * classes + confident[counted].argmax(1)
    joint = pairs.bincount(minlength=classes**2).view(classes, classes).double()
    right = joint.diag() / joint.sum(1).clamp_min(1)
    count = round(float((labels.bincount(minlength=classes) * (1 - right)).sum()))
    likely = shares.argmax(1)
    scores = shares.amax(1) - given
    order = scores.argsort(descending=True, stable=True)[
        : min(count, int((likely != labels).sum()))
    ]
    columns = (values[order].tolist() for values in (torch.arange(len(labels)), scores, likely))
    return [Finding(*found) for found in zip(*columns, strict=True)]


def nearest(found: Mapping[Split, Features]) -> tuple[Tensor, Tensor]:
    """Cosines of standardised features and rows of each image's nearest ones, float32 and int64 [N, NEAREST].

    The features are projected at random first, which keeps cosines up to some hundredths.
    """
    standard = heads.moments(found["train"])
    width = len(standard[0])
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(width, min(width, PROJECTED), generator=generator)
    parts = []
    for features in found.values():
        for values, _ in heads.standardised(features.views[:1], features.labels, standard):
            parts.append(F.normalize(values @ projection))
    points, cosines, rows = torch.cat(parts), [], []
    for first, block in _blocks(points):
        likeness = block @ points.T
        likeness[torch.arange(len(block)), first + torch.arange(len(block))] = -1  # itself
        best = likeness.topk(min(NEAREST, len(points) - 1))
        cosines.append(best.values)
        rows.append(best.indices)
    return torch.cat(cosines), torch.cat(rows)


def _blocks(points: Tensor) -> Iterator[tuple[int, Tensor]]:
    first = 0
    for block in points.split(max(1, BLOCK // len(points))):
        yield first, block
        first += len(block)


def outliers(cosines: Tensor) -> list[Finding]:
    """The images that are least like their nearest ones, the least first; of the cosines of `nearest`."""
    scores = 1 - cosines.mean(1)
    best = scores.topk(min(OUTLIERS, len(scores)))
    return [
        Finding(row, score, -1)
        for row, score in zip(best.indices.tolist(), best.values.tolist(), strict=False)
    ]


def small(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images to compare, uint8 [B, SIDE, SIDE], grey, and the deviation of their pixels, of 255, float32 [B].

    Args:
        images: uint8 [B, 3, H, W].
    """
    floats = images.float()
    grey = F.interpolate(
        floats.mean(1, keepdim=True), (SIDE, SIDE), mode="bilinear", antialias=True
    )[:, 0]
    return grey.round().byte(), floats.std((1, 2, 3))


def blank(deviations: Tensor) -> list[Finding]:
    """Images of nothing, the emptiest first, by what `small` says of their pixels."""
    order = deviations.argsort(stable=True)
    return [
        Finding(row, 1 - deviations[row].item() / 255, -1)
        for row in order.tolist()
        if deviations[row] < FLAT
    ]


def near_duplicates(cosines: Tensor, rows: Tensor, images: Tensor) -> list[Finding]:
    """Images that are an earlier one, shifted, mirrored, brightened or compressed a little; the surest first.

    Args:
        cosines: Of `nearest`.
        rows: Of `nearest`.
        images: Of `small`, uint8 [N, SIDE, SIDE].
    """
    ones = torch.arange(len(rows))[:, None].expand_as(rows)
    pairs = torch.stack((torch.maximum(ones, rows), torch.minimum(ones, rows)), 2)[
        cosines >= ALIKE
    ].unique(dim=0)
    best: dict[int, Finding] = {}
    for block in pairs.split(256) if len(pairs) else ():
        scores = correlations(images[block[:, 0]], images[block[:, 1]])
        for (later, earlier), score in zip(block.tolist(), scores.tolist(), strict=True):
            if score >= SAME and (
                later not in best or score > best[later].score + 1e-6
            ):  # the earliest of equal ones
                best[later] = Finding(later, score, earlier)
    return sorted(best.values(), key=lambda finding: -finding.score)


def correlations(ones: Tensor, others: Tensor) -> Tensor:
    """The highest correlation of the middle of one with any part of the other or its mirror image, float32 [B].

    Args:
        ones: uint8 [B, SIDE, SIDE].
        others: The same.
    """
    side = SIDE - 2 * MARGIN
    middle = ones[:, MARGIN:-MARGIN, MARGIN:-MARGIN].flatten(1).float()
    middle = F.normalize(middle - middle.mean(1, keepdim=True), eps=1.0).view(-1, 1, side, side)
    found = []
    for mirrored in (others.float()[None], others.flip(2).float()[None]):
        products = F.conv2d(mirrored, middle, groups=len(middle))[0]  # of each shift, [B, 9, 9]
        variances = F.avg_pool2d(mirrored**2, side, 1) - F.avg_pool2d(mirrored, side, 1) ** 2
        found.append((products / (side**2 * variances[0]).clamp_min(1).sqrt()).amax((1, 2)))
    return torch.maximum(*found)
