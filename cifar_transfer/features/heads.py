"""Heads on features: what frozen features of a backbone tell of the classes.

Features are read in blocks, so that memory is bounded however many images there are.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Tensor

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.data.splits import Split
from cifar_transfer.features.extract import FeatureExtractor, Features

BLOCK = 16384  # images that are in memory at once, beside those kept
KEPT = (
    2**32
)  # bytes of standardised features that may be kept in memory, because they are gone through often
# L2 penalties on the weights, of half their squares, beside the mean cross-entropy; all are tried at once.
PENALTIES = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
ITERATIONS = 100  # of L-BFGS
NEIGHBOURS = (1, 5, 20)
SHOTS, DRAWS = (1, 5, 10, 50), 5  # images a class, and how often they are drawn anew
SMALLEST = 1e-6  # deviation of a feature
# Least deviation for a head, of the median one: a feature that is nearly always 0 would get a weight of hundreds, which
# fine-tuning does not survive.
LEAST = 0.2
TIE = 1e-3  # what a cosine weighs beside a vote; twenty of them are less than one vote
Moments = tuple[Tensor, Tensor]  # mean and deviation of each feature, float32 [D]


class Linear(NamedTuple):
    """A linear head on features as the network gives them: weight float32 [C, D], bias [C]."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Features) -> Tensor:
        """float32 [N, C] of the images as they are."""
        views = blocks(features.views[0])
        return torch.cat([values @ self.weight.T + self.bias for values in views])


def blocks(values: np.ndarray) -> Iterator[Tensor]:
    """Rows as float32 [B, D], a block after the other."""
    for start in range(0, len(values), BLOCK):
        yield torch.from_numpy(np.array(values[start : start + BLOCK], np.float32))


def accuracy(logits: Tensor, labels: np.ndarray) -> float:
    """Share of 1."""
    return float((logits.argmax(1).numpy() == labels).mean())


def moments(train: Features) -> Moments:
    """Mean and deviation of each feature over all views, float32 [D] each.

    Raises:
        UserError: A feature is NaN or infinite, or beyond half precision, in which those of training are kept.
    """
    sums = (
        (v.double().sum(0), v.double().square().sum(0))
        for view in train.views
        for v in blocks(view)
    )
    count = len(train.views) * len(train.labels)
    mean, squares = (sum(parts, torch.zeros(())) / count for parts in zip(*sums, strict=True))
    if not squares.isfinite().all():
        raise UserError(
            "The features of this backbone are NaN, infinite or above 65,504, which is the most that is kept of them: "
            "take other weights, or --model.normalize=weights."
        )
    return mean.float(), (squares - mean**2).clamp_min(0).sqrt().clamp_min(SMALLEST).float()


def standardised(
    views: Sequence[np.ndarray], labels: np.ndarray, standard: Moments
) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of standardised features, float32 [B, D], with their labels, int64 [B]: one view after the other."""
    mean, deviation = standard
    for view in views:
        for values, those in zip(blocks(view), torch.from_numpy(labels).split(BLOCK), strict=True):
            yield (values - mean) / deviation, those


def logistic(
    train: Features,
    val: Features,
    classes: int,
    standard: Moments,
    penalties: Sequence[float] = PENALTIES,
) -> tuple[Linear, float]:
    """Logistic regression on standardised features, with the penalty that is best on the images held out.

    All penalties are fitted at once: what takes time is to go through the features, and they share that.

    Returns:
        The head, with the standardisation folded in, and its penalty.
    """
    mean, deviation = standard[0], standard[1].clamp_min(LEAST * float(standard[1].median()))
    count, width = len(train.labels) * len(train.views), len(mean)
    read = partial(standardised, train.views, train.labels, (mean, deviation))
    kept = list(read()) if 4 * count * width <= KEPT else None
    strengths = torch.tensor(penalties)
    weights = torch.zeros(len(strengths), classes, width)
    biases = torch.zeros(len(strengths), classes)
    solver = torch.optim.LBFGS(
        [weights, biases], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        weights.grad, biases.grad = weights * strengths[:, None, None], torch.zeros_like(biases)
        total = float((strengths * weights.square().sum((1, 2))).sum() / 2)
        for values, those in kept or read():
            logits = (values @ weights.flatten(0, 1).T).view(-1, *biases.shape) + biases
            chosen = those[:, None, None].expand(-1, len(strengths), 1)
            errors = logits.log_softmax(2)
            total -= float(errors.gather(2, chosen).sum()) / count
            errors = (
                errors.exp_().scatter_add_(
                    2, chosen, torch.full_like(chosen, -1, dtype=torch.float32)
                )
                / count
            )
            weights.grad += (errors.flatten(1).T @ values).view_as(weights)
            biases.grad += errors.sum(0)
        return torch.tensor(total)

    solver.step(loss)  # which sets the gradients itself, and needs no graph
    weights /= deviation
    biases -= (weights * mean).sum(2)
    heads = [Linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    scores = [accuracy(head.logits(val), val.labels) for head in heads]
    best = int(np.argmax(scores))
    return heads[best], penalties[best]


def nearest_mean(train: Features, other: Features, classes: int, standard: Moments) -> Tensor:
    """Scores [N, C] by the distance to the mean of each class over all views, of standardised features."""
    sums = torch.zeros(classes, len(standard[0]))
    for values, those in standardised(train.views, train.labels, standard):
        sums.index_add_(0, those, values)
    counts = len(train.views) * np.bincount(train.labels, minlength=classes).clip(1)
    means = sums / torch.from_numpy(counts)[:, None]
    asked = standardised(other.views[:1], other.labels, standard)
    return torch.cat([-torch.cdist(values, means) for values, _ in asked])


def nearest_neighbours(
    train: Features, other: Features, classes: int, standard: Moments
) -> dict[int, Tensor]:
    """Votes [N, C] of the most alike training images, `NEIGHBOURS` of them, by the cosine of standardised features.

    Views beyond the images themselves do not vote. Of classes with as many votes the one whose images are more alike is
    first.
    """
    votes: dict[int, list[Tensor]] = {k: [] for k in NEIGHBOURS}
    for values, _ in standardised(other.views[:1], other.labels, standard):
        asked, near = F.normalize(values), []
        for theirs, those in standardised(train.views[:1], train.labels, standard):
            best = (asked @ F.normalize(theirs).T).topk(min(NEIGHBOURS[-1], len(those)))
            near.append((best.values, those[best.indices]))
        likeness, labelled = (torch.cat(parts, 1) for parts in zip(*near, strict=True))
        likeness, order = likeness.topk(min(NEIGHBOURS[-1], likeness.shape[1]))
        labelled = labelled.gather(1, order)
        for k in NEIGHBOURS:
            weight = 1 + TIE * likeness[:, :k]
            votes[k].append(
                torch.zeros(len(values), classes).scatter_add_(1, labelled[:, :k], weight)
            )
    return {k: torch.cat(parts) for k, parts in votes.items()}


def few_shot(
    train: Features, val: Features, test: Features, classes: int, standard: Moments
) -> dict[str, list[float]]:
    """Accuracies of `logistic` from so many images of each class, drawn anew for each; standardised as all are."""
    scores: dict[str, list[float]] = {}
    for shots in SHOTS:
        if np.bincount(train.labels, minlength=classes).min() < shots:
            break
        for draw in range(DRAWS):
            order = np.random.default_rng([shots, draw]).permutation(len(train.labels))
            rows = np.sort(
                np.concatenate([order[train.labels[order] == c][:shots] for c in range(classes)])
            )
            head, _ = logistic(
                Features([train.views[0][rows]], train.labels[rows]), val, classes, standard
            )
            scores.setdefault(str(shots), []).append(accuracy(head.logits(test), test.labels))
    return scores


def best(found: dict[Split, Features], classes: int) -> tuple[Linear, dict[str, Any]]:
    """The best logistic regression, and the accuracies of all heads on the test images, or those held out if none are.

    Returns:
        The head, and as shares of 1 `val` (and `test`, `balanced`), `neighbours` (by their number), `means`, `few_shot`
        (by the images of a class, a list); the `penalty`, the `width` of the features and how many training images
        `per_class` there are on average.

    Raises:
        UserError: As `moments`.
    """
    train, val = found["train"], found["val"]
    other = found.get("test", val)
    standard = moments(train)
    head, penalty = logistic(train, val, classes, standard)
    logits = head.logits(other)
    right = logits.argmax(1).numpy() == other.labels
    scores: dict[str, Any] = {
        "penalty": penalty,
        "width": len(head.weight[0]),
        "val": accuracy(head.logits(val), val.labels),
    }
    if "test" in found:
        scores["test"] = accuracy(logits, other.labels)
    counts = np.bincount(other.labels, minlength=classes)
    scores["balanced"] = float(
        (np.bincount(other.labels, right, classes)[counts > 0] / counts[counts > 0]).mean()
    )
    votes = nearest_neighbours(train, other, classes, standard)
    scores["neighbours"] = {str(k): accuracy(votes[k], other.labels) for k in votes}
    scores["means"] = accuracy(nearest_mean(train, other, classes, standard), other.labels)
    scores["few_shot"] = few_shot(train, val, other, classes, standard)
    scores["per_class"] = len(train.labels) // classes
    return head, scores


def begin_with_logistic(trainer: Trainer, classifier: Any) -> None:
    """Within a fit, give the network that is fitted the best logistic regression on its backbone's features.

    Raises:
        UserError: As `FeatureExtractor`; or network or data are not of this package.
    """
    data = getattr(trainer, "datamodule", None)
    if not (isinstance(data, ImageDataModule) and hasattr(classifier, "classifier")):
        raise UserError(
            "probe=true needs a TransferClassifier and a data module of this package: leave it out."
        )
    if next(classifier.network.parameters()).dtype != torch.float32:
        raise UserError(
            "probe=true needs a network in 32 bits: take precision=32-true, bf16-mixed or 16-mixed."
        )
    # In eval mode such a one does not even give what it gives in training.
    if str(classifier.hparams["weights"]).lower() == "none":
        raise UserError(
            "probe=true needs a backbone that has learned something, not weights=none: leave it out."
        )
    modes = {module: module.training for module in classifier.modules()}
    extractor = FeatureExtractor(classifier, data, test=False)
    found, head = extractor.within(trainer), None
    if trainer.is_global_zero:
        head, _ = logistic(found["train"], found["val"], data.num_classes, moments(found["train"]))
    extractor.put(trainer.strategy.broadcast(head), found["val"])
    for module, training in modes.items():
        module.training = training
