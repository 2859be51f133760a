"""The temperature of a network: one number that makes its probabilities honest.

Logits are divided by it before the softmax (Guo et al. 2017, https://arxiv.org/abs/1706.04599). The
order of the classes, and with it the accuracy, stays the same.
"""

import math

import torch
from torch import Tensor, nn

NO_TEMPERATURE = 1.0  # of a network whose temperature was never fitted
MIN_TEMPERATURE = 0.1
MAX_TEMPERATURE = 10.0
MIN_IMAGES = 20  # fewer would say nothing of other images
# Golden-section steps from the whole range to 1e-8 of it.
NUM_STEPS = 40
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Calibrated(nn.Module):
    """A classifier whose logits are divided by a temperature, for exported graphs.

    Args:
        classifier: Takes images, float [B, 3, H, W], and gives logits, float [B, C].
        temperature: Divides the logits.
    """

    def __init__(self, classifier: nn.Module, temperature: float) -> None:
        super().__init__()
        self.classifier = classifier
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float [B, C], whose softmax is what `predict` says.

        Args:
            images: Float [B, 3, H, W], as the classifier takes them.
        """
        logits: Tensor = self.classifier(images)
        return logits / self.temperature


def is_temperature(value: object) -> bool:
    """Return whether a value can be a temperature: a number from 0.1 to 10."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return MIN_TEMPERATURE <= value <= MAX_TEMPERATURE


def why_not_fitted(logits: Tensor, labels: Tensor) -> str | None:
    """Return why no temperature can be fitted to predictions; None if one can.

    Where every image is right, the lower the temperature the better, without end. A few images
    would say nothing of others.

    Args:
        logits: Float [N, C].
        labels: True classes, int64 [N].
    """
    if len(labels) < MIN_IMAGES:
        return f"there are fewer than {MIN_IMAGES} validation images"
    if not logits.isfinite().all():
        return "some logits are NaN or infinite"
    if bool((logits.argmax(1) == labels).all()):
        return "no image is mistaken"
    return None


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature that minimises the negative log-likelihood (NLL) of the labels.

    The NLL is convex in 1 / temperature, so it has one minimum on the scale of log(temperature),
    which golden-section search finds, in float64. It stays from `MIN_TEMPERATURE` to
    `MAX_TEMPERATURE`.

    Args:
        logits: Finite logits of the network, float [N, C].
        labels: True classes, int64 [N].
    """
    logits = logits.double()
    low = math.log(MIN_TEMPERATURE)
    high = math.log(MAX_TEMPERATURE)
    left = high - GOLDEN_RATIO * (high - low)
    right = low + GOLDEN_RATIO * (high - low)
    left_nll = nll(logits, labels, math.exp(left))
    right_nll = nll(logits, labels, math.exp(right))
    for _ in range(NUM_STEPS):
        if left_nll <= right_nll:
            high = right
            right = left
            right_nll = left_nll
            left = high - GOLDEN_RATIO * (high - low)
            left_nll = nll(logits, labels, math.exp(left))
        else:
            low = left
            left = right
            left_nll = right_nll
            right = low + GOLDEN_RATIO * (high - low)
            right_nll = nll(logits, labels, math.exp(right))
    temperature = math.exp((low + high) / 2)
    return min(max(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE)


def nll(logits: Tensor, labels: Tensor, temperature: float = NO_TEMPERATURE) -> float:
    """Return the mean negative log-likelihood of the labels, computed in float64.

    Args:
        logits: Float [N, C].
        labels: True classes, int64 [N].
        temperature: Divides the logits.
    """
    scaled = logits.double() / temperature
    return float(torch.nn.functional.cross_entropy(scaled, labels))
