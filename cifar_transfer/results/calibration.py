"""How honest probabilities are: confidence beside accuracy, before and after a temperature."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from cifar_transfer.network.temperature import (
    NO_TEMPERATURE,
    fit_temperature,
    why_not_fitted,
)

CALIBRATION_BINS = 15  # of equal width, as in Guo et al.


@dataclass(frozen=True)
class ConfidenceBins:
    """Predictions binned by confidence. Bin i of B holds confidences from i / B to (i + 1) / B."""

    counts: np.ndarray  # predictions in each bin, int64 [B]
    confidences: np.ndarray  # mean confidence in each bin, float64 [B], 0 in empty bins
    accuracies: np.ndarray  # share of correct predictions in each bin, float64 [B], 0 in empty bins

    @property
    def calibration_error(self) -> float:
        """Expected calibration error in [0, 1] (Guo et al. 2017, https://arxiv.org/abs/1706.04599)."""
        gaps = np.abs(self.accuracies - self.confidences)
        return float(np.average(gaps, weights=self.counts))


@dataclass(frozen=True)
class Calibration:
    """The temperature of a network, and what it does to predictions for N images.

    Attributes:
        temperature: Divides the logits before the softmax.
        error_before: Expected calibration error without it, in [0, 1].
        error_after: The same with it.
        reason: Why it was not fitted and is 1; None if it was.
    """

    temperature: float
    error_before: float
    error_after: float
    reason: str | None = None

    def __str__(self) -> str:
        """Return the temperature and what it does: "1.32: calibration error 4.1 -> 1.2 % ..."."""
        if self.reason is not None:
            return f"{self.temperature:g}, not fitted: {self.reason}"
        before = 100 * self.error_before
        after = 100 * self.error_after
        return (
            f"{self.temperature:.2f}: calibration error {before:.1f} -> {after:.1f} % (validation)"
        )


def confidence_bins(
    confidences: Tensor, correct: Tensor, num_bins: int = CALIBRATION_BINS
) -> ConfidenceBins:
    """Return counts, mean confidences and accuracies in bins of equal width.

    Args:
        confidences: Probabilities of the predicted classes, float [N] in [0, 1].
        correct: Correctness of each prediction, bool [N].
        num_bins: Number of bins.
    """
    values = confidences.numpy()
    # A confidence of 1 belongs to the last bin.
    bins = np.minimum((values * num_bins).astype(int), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    divisors = np.maximum(counts, 1)
    return ConfidenceBins(
        counts,
        np.bincount(bins, values, num_bins) / divisors,
        np.bincount(bins, correct.numpy(), num_bins) / divisors,
    )


def calibrate(logits: Tensor, labels: Tensor, are_test_images: bool = False) -> Calibration:
    """Fit a temperature to the predictions for validation images.

    Args:
        logits: Logits of the network, float [N, C], on the CPU.
        labels: True classes, int64 [N].
        are_test_images: Whether these are the test images too, whose probabilities would be too
            good with a temperature that was fitted to them. It is 1 then.
    """
    error_before = _calibration_error(logits, labels, NO_TEMPERATURE)
    reason = why_not_fitted(logits, labels)
    if are_test_images:
        reason = "the validation images are the test images"
    if reason is not None:
        return Calibration(NO_TEMPERATURE, error_before, error_before, reason)
    temperature = fit_temperature(logits, labels)
    return Calibration(temperature, error_before, _calibration_error(logits, labels, temperature))


def _calibration_error(logits: Tensor, labels: Tensor, temperature: float) -> float:
    confidences = (logits.float() / temperature).softmax(1).amax(1)
    correct = logits.argmax(1) == labels
    return confidence_bins(confidences, correct).calibration_error
