"""Predictions of a network: for one image, and for all images of a split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifar_transfer.base.files import atomic_write
from cifar_transfer.base.untrusted import open_regular
from cifar_transfer.network.temperature import NO_TEMPERATURE, is_temperature
from cifar_transfer.results.calibration import CALIBRATION_BINS, ConfidenceBins, confidence_bins

MAX_GALLERY_IMAGES = 24
FIGURES_FOLDER = "figures"
UNKNOWN = "unknown"  # what is said of an image where no class is likely enough


def scores_path(run: Path, split: str) -> Path:
    """Return where a run keeps the scores of its predictions for a split, "val" or "test"."""
    return run / FIGURES_FOLDER / f"{split}-scores.json"


def predictions_path(run: Path, split: str) -> Path:
    """Return where a run keeps its predictions for a split, "val" or "test"."""
    return run / FIGURES_FOLDER / f"predictions-{split}.npz"


class ImagePrediction(NamedTuple):
    """Prediction of a network for one image."""

    source: Any  # the image as the caller named it: a path, or something in memory
    pixels: np.ndarray  # what the network was shown, uint8 [3, H, W], RGB
    classes: list[tuple[str, float]]  # likeliest classes and probabilities, the likeliest first

    def answer(self, threshold: float) -> str:
        """Return the likeliest class, or `UNKNOWN` if its probability is below a threshold."""
        name, probability = self.classes[0]
        if probability < threshold:
            return UNKNOWN
        return name


@dataclass(frozen=True)
class Predictions:
    """Predictions for the N images of a split, C classes, and some of the images.

    Attributes:
        names: Names of the classes.
        labels: True classes, int64 [N].
        logits: Logits of the network, float32 [N, C].
        rows: Which images are kept, int64 [K]: the most confident mistakes and some correct
            predictions.
        images: Pixels of these images, uint8 [K, 3, H, W], RGB.
        temperature: Divides the logits before the softmax.
    """

    names: Sequence[str]
    labels: Tensor
    logits: Tensor
    rows: Tensor
    images: Tensor
    temperature: float = NO_TEMPERATURE

    @cached_property
    def probabilities(self) -> Tensor:
        """Probabilities of the classes as `predict` says them, float32 [N, C]."""
        return (self.logits / self.temperature).softmax(1)

    @cached_property
    def predicted(self) -> Tensor:
        """Predicted classes, int64 [N], whatever the temperature."""
        return self.logits.argmax(1)

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

    def confidence_bins(self, num_bins: int = CALIBRATION_BINS) -> ConfidenceBins:
        """Return counts, mean confidences and accuracies in bins of equal width."""
        return confidence_bins(self.confidences, self.correct, num_bins)

    def at_temperature(self, temperature: float) -> "Predictions":
        """Return the same predictions with another temperature."""
        return replace(self, temperature=temperature)

    def save(self, path: Path) -> None:
        """Write an `.npz` file of plain arrays."""
        with atomic_write(path) as file:
            np.savez_compressed(
                file,
                names=np.array(self.names),
                labels=self.labels.numpy(),
                logits=self.logits.numpy(),
                temperature=np.array(self.temperature),
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
            names = arrays["names"].tolist()
            temperature = float(arrays["temperature"])
            if not is_temperature(temperature):
                raise ValueError(f"a temperature of {temperature}")
            return cls(
                names,
                torch.from_numpy(arrays["labels"]),
                torch.from_numpy(arrays["logits"]),
                torch.from_numpy(arrays["rows"]),
                torch.from_numpy(arrays["images"]),
                temperature,
            )
