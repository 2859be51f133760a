"""Logistic regression on standardised features, computed until it has converged.

For each penalty, L-BFGS minimises the mean cross-entropy and half the penalty times the squares of
the weights.
Penalties go from strong to weak, and each begins with the weights of the one before.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cifar_transfer.features.extract import Features
from cifar_transfer.features.standardise import Standardisation, blocks, standardised

PENALTIES = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
# Standardised features are kept in memory up to this size, because they are read many times.
MAX_CACHED_BYTES = 2**32
# Converged means: the weights are off by less than this share of their norm. The loss curves at
# least as much as the penalty does, so that they are off by no more than gradient / penalty.
WEIGHT_TOLERANCE = 1e-2
# Up to so many numbers (images times features) are computed with in float64, more in float32, which
# is twice as fast. The rounding of many images averages out in the loss.
MAX_DOUBLE_NUMBERS = 2**25
MIN_WEIGHT_NORM = 0.1  # that the tolerance is a share of, where the weights are nearly 0
ITERATIONS_PER_CHECK = 10  # of L-BFGS, between two looks at the gradient
MAX_CHECKS = 100
MIN_CURVATURE = 1e-6  # so that probabilities of 0 and 1 leave something to divide by


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


def accuracy(logits: Tensor, labels: np.ndarray) -> float:
    """Return the share of images whose largest logit is that of their label."""
    return float((logits.argmax(1).numpy() == labels).mean())


def fit_logistic(
    train: Features,
    val: Features,
    num_classes: int,
    standardisation: Standardisation,
    penalties: Sequence[float] = PENALTIES,
) -> tuple[LinearHead, float]:
    """Fit logistic regression on all views, with the penalty that is best on `val`.

    A warning names the penalties for which it has not converged.

    Args:
        train: Features of the training images.
        val: Features of the validation images.
        num_classes: Number of classes, C.
        standardisation: Standardisation of the features.
        penalties: Penalties to try, positive. Of equally good ones the strongest is taken.

    Returns:
        The head, with the standardisation folded in, and its penalty.
    """
    regression = _Regression(train, num_classes, standardisation)
    candidates = []
    accuracies = []
    unconverged = []
    for penalty in sorted(penalties, reverse=True):
        if not regression.minimise(penalty):
            unconverged.append(f"{penalty:g}")
        head = regression.head()
        candidates.append((head, penalty))
        accuracies.append(accuracy(head.logits(val), val.labels))
    if unconverged:
        rank_zero_warn(
            f"Logistic regression has not converged with the penalty {', '.join(unconverged)}: "
            f"its probabilities may be off."
        )
    return candidates[int(np.argmax(accuracies))]


class _Point(NamedTuple):
    """The loss at some weights.

    Attributes:
        loss: The loss, float64, a scalar.
        weight_gradient: float64 [C, R].
        bias_gradient: float64 [C].
        curvature: Mean of p (1 - p) over all images and classes, float64, a scalar.
    """

    loss: Tensor
    weight_gradient: Tensor
    bias_gradient: Tensor
    curvature: Tensor


class _Regression:
    """Logistic regression with R numbers for each image.

    These are the D standardised features or, of fewer images than features, as many numbers as
    images. That loses nothing, because the best weights are then sums of the images' features.

    Attributes:
        weights: float64 [C, R].
        biases: float64 [C].
    """

    def __init__(self, train: Features, num_classes: int, standardisation: Standardisation) -> None:
        width = len(standardisation.mean)
        self.train = train
        self.standardisation = standardisation
        self.count = len(train.labels) * len(train.views)
        self.dtype = torch.float32
        if self.count * width <= MAX_DOUBLE_NUMBERS:
            self.dtype = torch.float64
        self.cached_blocks: list[tuple[Tensor, Tensor]] | None = None
        self.basis: Tensor | None = None  # orthonormal columns, float64 [D, R]
        if self.dtype.itemsize * self.count * width <= MAX_CACHED_BYTES:
            self.cached_blocks = list(self._blocks())
            if self.count < width:
                width = self._reduce(self.cached_blocks)
        self.covariance = self._covariance(width)
        self.weights = torch.zeros(num_classes, width, dtype=torch.float64)
        self.biases = torch.zeros(num_classes, dtype=torch.float64)

    def _reduce(self, feature_blocks: Sequence[tuple[Tensor, Tensor]]) -> int:
        """Cache as many numbers as images in place of the features; return how many these are."""
        values = torch.cat([block for block, _ in feature_blocks])
        labels = torch.cat([block_labels for _, block_labels in feature_blocks])
        self.basis, triangle = torch.linalg.qr(values.double().T)
        self.cached_blocks = [(triangle.T.contiguous().to(self.dtype), labels)]
        return self.count

    def head(self) -> LinearHead:
        """Return the head for features as the network gives them."""
        weights = self.weights
        if self.basis is not None:
            weights = weights @ self.basis.T
        weights = weights / self.standardisation.divisor
        biases = self.biases - weights @ self.standardisation.mean.double()
        return LinearHead(weights.float(), biases.float())

    def minimise(self, penalty: float) -> bool:
        """Go on from the current weights to the minimum, and return whether it was reached.

        L-BFGS works on the weights times a triangular matrix. That makes the loss about equally
        curved in all directions, and convergence ten times as fast.
        """
        point = self._evaluate(penalty)
        curvature = point.curvature.clamp_min(MIN_CURVATURE)
        ridge = penalty * torch.eye(len(self.covariance), dtype=torch.float64)
        factor = torch.linalg.cholesky(curvature * self.covariance + ridge)
        scaled_weights = (self.weights @ factor).contiguous()
        scaled_biases = self.biases * curvature.sqrt()

        def evaluate() -> Tensor:
            """Return the loss, and set the gradients, because no graph is needed."""
            self.weights = _divide(scaled_weights, factor, upper=False)
            self.biases = scaled_biases / curvature.sqrt()
            at = self._evaluate(penalty)
            scaled_weights.grad = _divide(at.weight_gradient, factor.T, upper=True)
            scaled_biases.grad = at.bias_gradient / curvature.sqrt()
            return at.loss

        solver = torch.optim.LBFGS(
            [scaled_weights, scaled_biases],
            max_iter=ITERATIONS_PER_CHECK,
            tolerance_grad=0,
            tolerance_change=0,
            history_size=10,
            line_search_fn="strong_wolfe",
        )
        for _ in range(MAX_CHECKS):
            if self._has_converged(point, penalty):
                return True
            solver.step(evaluate)
            # The last weights that the line search tried need not be the ones that it chose.
            self.weights = _divide(scaled_weights, factor, upper=False)
            self.biases = scaled_biases / curvature.sqrt()
            point = self._evaluate(penalty)
        return self._has_converged(point, penalty)

    def _has_converged(self, point: _Point, penalty: float) -> bool:
        """Return whether the gradient says that the weights are within `WEIGHT_TOLERANCE`."""
        squares = point.weight_gradient.square().sum() + point.bias_gradient.square().sum()
        norm = max(float(self.weights.norm()), MIN_WEIGHT_NORM)
        return float(squares.sqrt()) <= WEIGHT_TOLERANCE * penalty * norm

    def _evaluate(self, penalty: float) -> _Point:
        """Return the loss and its gradients at the current weights."""
        loss = penalty / 2 * self.weights.square().sum()
        weight_gradient = penalty * self.weights
        bias_gradient = torch.zeros_like(self.biases)
        curvature = torch.zeros_like(loss)
        for values, labels in self._blocks():
            logits = values @ self.weights.to(self.dtype).T + self.biases.to(self.dtype)
            log_probabilities = logits.log_softmax(1)
            label_index = labels[:, None]
            loss -= log_probabilities.gather(1, label_index).double().sum() / self.count
            probabilities = log_probabilities.exp_()
            curvature += (probabilities * (1 - probabilities)).double().sum()
            # The derivative by the logits: the probabilities, less 1 at the label.
            minus_one = torch.full_like(label_index, -1, dtype=self.dtype)
            errors = probabilities.scatter_add_(1, label_index, minus_one) / self.count
            weight_gradient += errors.T @ values
            bias_gradient += errors.double().sum(0)
        curvature /= self.count * len(self.biases)
        return _Point(loss, weight_gradient, bias_gradient, curvature)

    def _covariance(self, width: int) -> Tensor:
        """Return the mean of the products of an image's numbers, float64 [R, R]."""
        covariance = torch.zeros(width, width, dtype=torch.float64)
        for values, _ in self._blocks():
            covariance += values.T @ values / self.count
        return covariance

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield blocks of the images' numbers, [B, R], and of labels, int64 [B]."""
        if self.cached_blocks is not None:
            yield from self.cached_blocks
            return
        train = self.train
        for values, labels in standardised(train.views, train.labels, self.standardisation):
            yield values.to(self.dtype), labels


def _divide(rows: Tensor, triangle: Tensor, upper: bool) -> Tensor:
    """Return the matrix whose product with a triangular one, lower or upper, is `rows`."""
    solution = torch.linalg.solve_triangular(triangle, rows, upper=upper, left=False)
    return solution.contiguous()
