"""Heads on features: what the frozen features of a backbone tell of the classes."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_transfer.data.classes import mean_of_classes
from cifar_transfer.data.splits import Split
from cifar_transfer.features.extract import Features
from cifar_transfer.features.logistic import LinearHead, accuracy, fit_logistic
from cifar_transfer.features.standardise import (
    Standardisation,
    fit_standardisation,
    standardised,
)

NEIGHBOURS = (1, 5, 20)  # numbers of nearest training images that vote
SHOTS = (1, 5, 10, 50)  # numbers of training images of each class
NUM_DRAWS = 5  # random choices of images for each number of shots
# A neighbour's vote is 1 and this times its cosine. That decides between classes with equally many
# votes, and nothing else: the cosines of twenty neighbours add up to less than one vote.
COSINE_WEIGHT = 1e-3


class HeadScores(NamedTuple):
    """Scores of all heads. Accuracies are shares of 1, of the test images if there are any.

    Attributes:
        penalty: Penalty of the best logistic regression.
        width: Number of features.
        val: Accuracy of the best logistic regression on the validation images.
        test: The same on the test images; None without any.
        balanced_accuracy: Mean of its accuracies on each class.
        nearest_neighbours: Accuracy of a vote, by the number of neighbours that vote.
        nearest_mean: Accuracy of the nearest class mean.
        few_shot: Accuracies of logistic regression from few images: those of each draw, by the
            number of images of a class.
        images_per_class: Training images of a class, on average.
    """

    penalty: float
    width: int
    val: float
    test: float | None
    balanced_accuracy: float
    nearest_neighbours: dict[str, float]
    nearest_mean: float
    few_shot: dict[str, list[float]]
    images_per_class: int


def balanced_accuracy(logits: Tensor, labels: np.ndarray, num_classes: int) -> float:
    """Return the mean of the accuracies on each class that has images."""
    correct = logits.argmax(1).numpy() == labels
    counts = np.bincount(labels, minlength=num_classes)
    correct_counts = np.bincount(labels, correct, num_classes)
    return float(mean_of_classes(correct_counts / counts.clip(1), counts))


def nearest_mean(
    train: Features, queries: Features, num_classes: int, standardisation: Standardisation
) -> Tensor:
    """Return scores of the classes, float32 [N, C]: minus the distance to the mean of each class.

    Features are standardised, and means are taken over all views.
    """
    sums = torch.zeros(num_classes, len(standardisation.mean))
    for values, labels in standardised(train.views, train.labels, standardisation):
        sums.index_add_(0, labels, values)
    counts = len(train.views) * np.bincount(train.labels, minlength=num_classes).clip(1)
    means = sums / torch.from_numpy(counts)[:, None]
    scores = []
    for values, _ in standardised(queries.views[:1], queries.labels, standardisation):
        scores.append(-torch.cdist(values, means))
    return torch.cat(scores)


def nearest_neighbours(
    train: Features, queries: Features, num_classes: int, standardisation: Standardisation
) -> dict[int, Tensor]:
    """Return votes of the nearest training images, float32 [N, C], by the number of neighbours.

    The nearest ones have the largest cosine of standardised features. Only the images themselves
    vote, not their other views. Of classes with equally many votes the one with larger cosines is
    first.
    """
    votes: dict[int, list[Tensor]] = {count: [] for count in NEIGHBOURS}
    for values, _ in standardised(queries.views[:1], queries.labels, standardisation):
        cosines, labels = _nearest_labels(F.normalize(values), train, standardisation)
        for count in NEIGHBOURS:
            weights = 1 + COSINE_WEIGHT * cosines[:, :count]
            block_votes = torch.zeros(len(values), num_classes)
            votes[count].append(block_votes.scatter_add_(1, labels[:, :count], weights))
    return {count: torch.cat(parts) for count, parts in votes.items()}


def _nearest_labels(
    points: Tensor, train: Features, standardisation: Standardisation
) -> tuple[Tensor, Tensor]:
    """Return cosines and labels of the nearest training images, [B, K], the nearest first.

    Args:
        points: Normalised features, float32 [B, D].
        train: Features of the training images.
        standardisation: Standardisation by which features are standardised.
    """
    most = NEIGHBOURS[-1]
    cosine_blocks = []
    label_blocks = []
    for values, labels in standardised(train.views[:1], train.labels, standardisation):
        cosines = points @ F.normalize(values).T
        nearest = cosines.topk(min(most, len(labels)))
        cosine_blocks.append(nearest.values)
        label_blocks.append(labels[nearest.indices])
    candidates = torch.cat(cosine_blocks, 1)
    nearest = candidates.topk(min(most, candidates.shape[1]))
    return nearest.values, torch.cat(label_blocks, 1).gather(1, nearest.indices)


def few_shot(
    train: Features,
    val: Features,
    test: Features,
    num_classes: int,
    standardisation: Standardisation,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return accuracies of logistic regression by the number of images of each class.

    Args:
        train: Features of the training images, of which a few are drawn, `NUM_DRAWS` times for each
            of `SHOTS`. Numbers that a class does not have are left out.
        val: Features of the images that choose the penalty.
        test: Features of the images that the accuracies are of.
        num_classes: Number of classes.
        standardisation: Standardisation by all training images.
        seed: Another one draws other images.

    Returns:
        The accuracy of each draw, in [0, 1], by the number of images of a class as text.
    """
    least = np.bincount(train.labels, minlength=num_classes).min()
    accuracies: dict[str, list[float]] = {}
    for shots in SHOTS:
        if shots > least:
            break
        accuracies[str(shots)] = []
        for draw in range(NUM_DRAWS):
            rows = _draw(train.labels, num_classes, shots, seed * NUM_DRAWS + draw)
            sample = Features([train.views[0][rows]], train.labels[rows])
            head, _ = fit_logistic(sample, val, num_classes, standardisation)
            accuracies[str(shots)].append(accuracy(head.logits(test), test.labels))
    return accuracies


def _draw(labels: np.ndarray, num_classes: int, shots: int, draw: int) -> np.ndarray:
    """Return sorted rows of `shots` random images of each class; `draw` is the seed."""
    order = np.random.default_rng([shots, draw]).permutation(len(labels))
    rows = []
    for label in range(num_classes):
        rows.append(order[labels[order] == label][:shots])
    return np.sort(np.concatenate(rows))


def evaluate_heads(
    features: dict[Split, Features], num_classes: int, seed: int = 0
) -> tuple[LinearHead, HeadScores]:
    """Fit all heads on the training images, and return the best logistic regression and all scores.

    Args:
        features: Features of each split; "test" may be missing.
        num_classes: Number of classes.
        seed: Seed of the images that few-shot heads are fitted on.

    Raises:
        UserError: A feature is NaN or infinite.
    """
    train = features["train"]
    val = features["val"]
    queries = features.get("test", val)
    standardisation = fit_standardisation(train)
    head, penalty = fit_logistic(train, val, num_classes, standardisation)
    logits = head.logits(queries)
    neighbour_accuracies = {}
    for count, votes in nearest_neighbours(train, queries, num_classes, standardisation).items():
        neighbour_accuracies[str(count)] = accuracy(votes, queries.labels)
    mean_scores = nearest_mean(train, queries, num_classes, standardisation)
    scores = HeadScores(
        penalty=penalty,
        width=head.weight.shape[1],
        val=accuracy(head.logits(val), val.labels),
        test=accuracy(logits, queries.labels) if "test" in features else None,
        balanced_accuracy=balanced_accuracy(logits, queries.labels, num_classes),
        nearest_neighbours=neighbour_accuracies,
        nearest_mean=accuracy(mean_scores, queries.labels),
        few_shot=few_shot(train, val, queries, num_classes, standardisation, seed),
        images_per_class=len(train.labels) // num_classes,
    )
    return head, scores
