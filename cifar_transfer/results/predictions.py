"""Predictions of a network: for one image, and for all images of a split."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifar_transfer.base.files import atomic_write
from cifar_transfer.base.untrusted import open_regular

MAX_GALLERY_IMAGES = 24
FIGURES_FOLDER = "figures"


def predictions_path(run: Path, split: str) -> Path:
    """Return where a run keeps its predictions for a split, "val" or "test"."""
    return run / FIGURES_FOLDER / f"predictions-{split}.npz"


class ImagePrediction(NamedTuple):
    """Prediction of a network for one image."""

    source: Any  # the image as the caller named it: a path, or something in memory
    pixels: np.ndarray  # what the network was shown, uint8 [3, H, W], RGB
    classes: list[tuple[str, float]]  # likeliest classes and probabilities, the likeliest first


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
class Predictions:
    """Predicted probabilities for the N images of a split, C classes, and some of the images.

    Attributes:
        names: Names of the classes.
        labels: True classes, int64 [N].
        probabilities: float32 [N, C]; each row sums to 1.
        rows: Which images are kept, int64 [K]: the most confident mistakes and some correct
            predictions.
        images: Pixels of these images, uint8 [K, 3, H, W], RGB.
    """

    names: Sequence[str]
    labels: Tensor
    probabilities: Tensor
    rows: Tensor
    images: Tensor

    @property
    def predicted(self) -> Tensor:
        """Predicted classes, int64 [N]."""
        return self.probabilities.argmax(1)

    @property
    def confidences(self) -> Tensor:
        """Probabilities of the predicted classes, float32 [N] in [0, 1]."""
        return self.probabilities.amax(1)

    @property
    def correct(self) -> Tensor:
        """Correctness of each prediction, bool [N]."""
        return self.predicted == self.labels

    def confusion(self) -> np.ndarray:
        """Return the confusion matrix, int64 [C, C]: images by true (row) and predicted class."""
        num_classes = len(self.names)
        cells = self.labels * num_classes + self.predicted
        counts = cells.bincount(minlength=num_classes**2)
        return counts.view(num_classes, num_classes).numpy()

    def confidence_bins(self, num_bins: int) -> ConfidenceBins:
        """Return counts, mean confidences and accuracies in bins of equal width."""
        confidences = self.confidences.numpy()
        # A confidence of 1 belongs to the last bin.
        bins = np.minimum((confidences * num_bins).astype(int), num_bins - 1)
        counts = np.bincount(bins, minlength=num_bins)
        divisors = np.maximum(counts, 1)
        return ConfidenceBins(
            counts,
            np.bincount(bins, confidences, num_bins) / divisors,
            np.bincount(bins, self.correct.numpy(), num_bins) / divisors,
        )

    def save(self, path: Path) -> None:
        """Write an `.npz` file of plain arrays."""
        with atomic_write(path) as file:
            np.savez_compressed(
                file,
                names=np.array(self.names),
                labels=self.labels.numpy(),
                probabilities=self.probabilities.numpy(),
                rows=self.rows.numpy(),
                images=self.images.numpy(),
            )

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Read a file that `save` has written.

        Raises:
            OSError: The file cannot be read.
            ValueError, KeyError, BadZipFile: The file is damaged, or holds something else.
        """
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            return cls(
                arrays["names"].tolist(),
                torch.from_numpy(arrays["labels"]),
                torch.from_numpy(arrays["probabilities"]),
                torch.from_numpy(arrays["rows"]),
                torch.from_numpy(arrays["images"]),
            )
