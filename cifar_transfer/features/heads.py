"""Heads on features: what the frozen features of a backbone tell of the classes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_transfer.data.splits import Split
from cifar_transfer.features.extract import Features
from cifar_transfer.features.standardise import Moments, blocks, compute_moments, standardised

# Standardised features are kept in memory up to this size, because they are read many times.
MAX_CACHED_BYTES = 2**32
# Weights of half the squared weights, beside the mean cross-entropy. All are tried at once.
PENALTIES = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
MAX_ITERATIONS = 100  # of L-BFGS
NEIGHBOURS = (1, 5, 20)
SHOTS = (1, 5, 10, 50)  # training images of each class
NUM_DRAWS = 5  # of images for each number of shots
# Least deviation for logistic regression, as a share of the median one. A feature that is nearly
# always 0 would get a weight of hundreds, which fine-tuning does not survive.
MIN_SHARE_OF_MEDIAN = 0.2
# Weight of a cosine beside a vote: twenty of them are less than one vote.
COSINE_WEIGHT = 1e-3


class LinearHead(NamedTuple):
    """A linear head on features as the network gives them.

    Attributes:
        weight: float32 [C, D].
        bias: float32 [C].
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Features) -> Tensor:
        """Return the logits of the images themselves, float32 [N, C]."""
        parts = []
        for values in blocks(features.views[0]):
            parts.append(values @ self.weight.T + self.bias)
        return torch.cat(parts)


class HeadScores(NamedTuple):
    """What all heads achieve. Accuracies are shares of 1, of the test images if there are any.

    Attributes:
        penalty: Penalty of the best logistic regression.
        width: Number of features.
        val: Accuracy of the best logistic regression on the validation images.
        test: The same on the test images; None without any.
        balanced: Mean of its accuracies on each class.
        neighbours: Accuracy by the number of nearest neighbours.
        means: Accuracy of the nearest class mean.
        few_shot: Accuracies of each draw by the number of images of a class.
        per_class: Training images of a class, on average.
    """

    penalty: float
    width: int
    val: float
    test: float | None
    balanced: float
    neighbours: dict[str, float]
    means: float
    few_shot: dict[str, list[float]]
    per_class: int


def accuracy(logits: Tensor, labels: np.ndarray) -> float:
    """Return the share of images whose largest logit is that of their label."""
    return float((logits.argmax(1).numpy() == labels).mean())


def balanced_accuracy(logits: Tensor, labels: np.ndarray, num_classes: int) -> float:
    """Return the mean of the accuracies on each class that has images."""
    correct = logits.argmax(1).numpy() == labels
    counts = np.bincount(labels, minlength=num_classes)
    correct_counts = np.bincount(labels, correct, num_classes)
    with_images = counts > 0
    return float((correct_counts[with_images] / counts[with_images]).mean())


def logistic(
    train: Features,
    val: Features,
    num_classes: int,
    moments: Moments,
    penalties: Sequence[float] = PENALTIES,
) -> tuple[LinearHead, float]:
    """Fit logistic regression on standardised features, with the penalty best on `val`.

    All penalties are fitted at once, because reading the features takes the time, and they share
    that.

    Returns:
        The head, with the standardisation folded in, and its penalty.
    """
    least = MIN_SHARE_OF_MEDIAN * float(moments.deviation.median())
    moments = moments._replace(deviation=moments.deviation.clamp_min(least))
    loss = _LogisticLoss(train, num_classes, moments, penalties)
    solver = torch.optim.LBFGS(
        [loss.weights, loss.biases],
        max_iter=MAX_ITERATIONS,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    solver.step(loss)
    weights = loss.weights / moments.deviation
    biases = loss.biases - (weights * moments.mean).sum(2)
    heads = []
    accuracies = []
    for weight, bias in zip(weights, biases, strict=True):
        head = LinearHead(weight, bias)
        heads.append(head)
        accuracies.append(accuracy(head.logits(val), val.labels))
    best = int(np.argmax(accuracies))
    return heads[best], penalties[best]


class _LogisticLoss:
    """Sum of the losses of P logistic regressions, one for each penalty, with its gradients.

    Attributes:
        weights: float32 [P, C, D], on standardised features.
        biases: float32 [P, C].
    """

    def __init__(
        self,
        train: Features,
        num_classes: int,
        moments: Moments,
        penalties: Sequence[float],
    ) -> None:
        width = len(moments.mean)
        self.train = train
        self.moments = moments
        self.count = len(train.labels) * len(train.views)
        self.penalties = torch.tensor(penalties)
        self.weights = torch.zeros(len(penalties), num_classes, width)
        self.biases = torch.zeros(len(penalties), num_classes)
        self.cached_blocks: list[tuple[Tensor, Tensor]] | None = None
        if 4 * self.count * width <= MAX_CACHED_BYTES:
            self.cached_blocks = list(standardised(train.views, train.labels, moments))

    def __call__(self) -> Tensor:
        """Return the loss, a scalar, and set the gradients, because no graph is needed."""
        self.weights.grad = self.weights * self.penalties[:, None, None]
        self.biases.grad = torch.zeros_like(self.biases)
        squares = self.weights.square().sum((1, 2))
        total = float((self.penalties * squares).sum() / 2)
        for values, labels in self._blocks():
            flat_logits = values @ self.weights.flatten(0, 1).T
            logits = flat_logits.view(-1, *self.biases.shape) + self.biases  # [B, P, C]
            log_shares = logits.log_softmax(2)
            label_index = labels[:, None, None].expand(-1, len(self.penalties), 1)
            total -= float(log_shares.gather(2, label_index).sum()) / self.count
            # The derivative by the logits: the shares, less 1 at the label.
            minus_one = torch.full_like(label_index, -1, dtype=torch.float32)
            errors = log_shares.exp_().scatter_add_(2, label_index, minus_one) / self.count
            self.weights.grad += (errors.flatten(1).T @ values).view_as(self.weights)
            self.biases.grad += errors.sum(0)
        return torch.tensor(total)

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield blocks of standardised features and labels."""
        if self.cached_blocks is not None:
            return iter(self.cached_blocks)
        return standardised(self.train.views, self.train.labels, self.moments)


def nearest_mean(train: Features, queries: Features, num_classes: int, moments: Moments) -> Tensor:
    """Return scores of the classes, float32 [N, C]: minus the distance to the mean of each class.

    Features are standardised, and means are taken over all views.
    """
    sums = torch.zeros(num_classes, len(moments.mean))
    for values, labels in standardised(train.views, train.labels, moments):
        sums.index_add_(0, labels, values)
    counts = len(train.views) * np.bincount(train.labels, minlength=num_classes).clip(1)
    means = sums / torch.from_numpy(counts)[:, None]
    scores = []
    for values, _ in standardised(queries.views[:1], queries.labels, moments):
        scores.append(-torch.cdist(values, means))
    return torch.cat(scores)


def nearest_neighbours(
    train: Features, queries: Features, num_classes: int, moments: Moments
) -> dict[int, Tensor]:
    """Return votes of the nearest training images, float32 [N, C], by the number of neighbours.

    The nearest ones have the largest cosine of standardised features. Only the images themselves
    vote, not their other views. Of classes with equally many votes the one with larger cosines is
    first.
    """
    votes: dict[int, list[Tensor]] = {count: [] for count in NEIGHBOURS}
    for values, _ in standardised(queries.views[:1], queries.labels, moments):
        cosines, labels = _nearest_labels(F.normalize(values), train, moments)
        for count in NEIGHBOURS:
            weights = 1 + COSINE_WEIGHT * cosines[:, :count]
            block_votes = torch.zeros(len(values), num_classes)
            votes[count].append(block_votes.scatter_add_(1, labels[:, :count], weights))
    return {count: torch.cat(parts) for count, parts in votes.items()}


def _nearest_labels(points: Tensor, train: Features, moments: Moments) -> tuple[Tensor, Tensor]:
    """Return cosines and labels of the nearest training images, [B, K], the nearest first.

    Args:
        points: Normalised features, float32 [B, D].
        train: Features of the training images.
        moments: Moments by which features are standardised.
    """
    most = NEIGHBOURS[-1]
    cosine_blocks = []
    label_blocks = []
    for values, labels in standardised(train.views[:1], train.labels, moments):
        cosines = points @ F.normalize(values).T
        nearest = cosines.topk(min(most, len(labels)))
        cosine_blocks.append(nearest.values)
        label_blocks.append(labels[nearest.indices])
    candidates = torch.cat(cosine_blocks, 1)
    nearest = candidates.topk(min(most, candidates.shape[1]))
    return nearest.values, torch.cat(label_blocks, 1).gather(1, nearest.indices)


def few_shot(
    train: Features, val: Features, test: Features, num_classes: int, moments: Moments
) -> dict[str, list[float]]:
    """Return accuracies of `logistic` from few images of each class, by the number of images.

    Each number is drawn `NUM_DRAWS` times; numbers that a class does not have are left out.
    Features are standardised by the moments of all images.
    """
    least = np.bincount(train.labels, minlength=num_classes).min()
    accuracies: dict[str, list[float]] = {}
    for shots in SHOTS:
        if shots > least:
            break
        accuracies[str(shots)] = []
        for draw in range(NUM_DRAWS):
            rows = _draw(train.labels, num_classes, shots, draw)
            sample = Features([train.views[0][rows]], train.labels[rows])
            head, _ = logistic(sample, val, num_classes, moments)
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
    features: dict[Split, Features], num_classes: int
) -> tuple[LinearHead, HeadScores]:
    """Fit all heads on the training images, and return the best logistic regression and all scores.

    Raises:
        UserError: A feature is NaN or infinite.
    """
    train = features["train"]
    val = features["val"]
    queries = features.get("test", val)
    moments = compute_moments(train)
    head, penalty = logistic(train, val, num_classes, moments)
    logits = head.logits(queries)
    neighbours = {}
    for count, votes in nearest_neighbours(train, queries, num_classes, moments).items():
        neighbours[str(count)] = accuracy(votes, queries.labels)
    mean_scores = nearest_mean(train, queries, num_classes, moments)
    scores = HeadScores(
        penalty=penalty,
        width=head.weight.shape[1],
        val=accuracy(head.logits(val), val.labels),
        test=accuracy(logits, queries.labels) if "test" in features else None,
        balanced=balanced_accuracy(logits, queries.labels, num_classes),
        neighbours=neighbours,
        means=accuracy(mean_scores, queries.labels),
        few_shot=few_shot(train, val, queries, num_classes, moments),
        per_class=len(train.labels) // num_classes,
    )
    return head, scores
