"""Scores of the predictions for a split: with an interval, by class, and how honest they are."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from torchmetrics.functional.classification import multiclass_accuracy

from cifar_transfer.data.classes import mean_of_classes
from cifar_transfer.network.temperature import NO_TEMPERATURE, nll
from cifar_transfer.results.calibration import ConfidenceBins
from cifar_transfer.results.coverage import THRESHOLDS, answered
from cifar_transfer.results.predictions import Predictions

INTERVAL = 0.95  # share of the intervals that hold the true accuracy
TOP_K = 5


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall and F1 of C classes, as scikit-learn counts them; 0 where it divides by 0.

    Attributes:
        precision: Share of the images predicted as a class that are of it, float64 [C].
        recall: Share of the images of a class that are predicted as it, float64 [C].
        f1: Harmonic mean of both, float64 [C].
        support: Number of images of a class, int64 [C].
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have images."""
        return float(mean_of_classes(self.recall, self.support))


@dataclass(frozen=True)
class Scores:
    """Scores of predictions. Shares are of 1.

    Attributes:
        num_images: Number of images.
        accuracy: Share of the images that are predicted as their class.
        interval: Lower and upper end of the 95 % interval of the accuracy, see `wilson_interval`.
        top5_accuracy: Share of the images whose class is among the five likeliest; None where there
            are no more than five classes.
        temperature: Temperature of the probabilities.
        nll: Mean negative log-likelihood of the true classes.
        nll_before: The same without temperature.
        bins: Predictions by confidence.
        error_before: Expected calibration error without temperature; `bins` has that with it.
        class_names: Names of the classes.
        classes: Scores of each class.
        coverage: For each of `THRESHOLDS` the share of the images that is answered, and the
            accuracy of these answers, None if there are none.
    """

    num_images: int
    accuracy: float
    interval: tuple[float, float]
    top5_accuracy: float | None
    temperature: float
    nll: float
    nll_before: float
    bins: ConfidenceBins
    error_before: float
    class_names: list[str]
    classes: ClassScores
    coverage: list[tuple[float, float | None]]

    def to_json(self) -> dict[str, Any]:
        """Return all scores as JSON holds them."""
        content: dict[str, Any] = {
            "images": self.num_images,
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.interval),
            "balanced_accuracy": self.classes.balanced_accuracy,
        }
        if self.top5_accuracy is not None:
            content["top5_accuracy"] = self.top5_accuracy
        content["temperature"] = self.temperature
        content["nll"] = self.nll
        content["nll_without_temperature"] = self.nll_before
        content["calibration_error"] = self.bins.calibration_error
        content["calibration_error_without_temperature"] = self.error_before
        content["bins"] = self._bins_to_json()
        content["classes"] = self._classes_to_json()
        content["coverage"] = self._coverage_to_json()
        return content

    def _bins_to_json(self) -> list[dict[str, Any]]:
        num_bins = len(self.bins.counts)
        rows = []
        for number in range(num_bins):
            rows.append(
                {
                    "from": number / num_bins,
                    "to": (number + 1) / num_bins,
                    "images": int(self.bins.counts[number]),
                    "confidence": float(self.bins.confidences[number]),
                    "accuracy": float(self.bins.accuracies[number]),
                }
            )
        return rows

    def _classes_to_json(self) -> list[dict[str, Any]]:
        rows = []
        for label, name in enumerate(self.class_names):
            rows.append(
                {
                    "class": name,
                    "precision": float(self.classes.precision[label]),
                    "recall": float(self.classes.recall[label]),
                    "f1": float(self.classes.f1[label]),
                    "support": int(self.classes.support[label]),
                }
            )
        return rows

    def _coverage_to_json(self) -> list[dict[str, Any]]:
        rows = []
        for threshold, (share, accuracy) in zip(THRESHOLDS, self.coverage, strict=True):
            rows.append({"threshold": threshold, "answered": share, "accuracy": accuracy})
        return rows


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, of which `hits` of `count` were seen (Wilson 1927).

    In contrast to the share plus or minus a multiple of its deviation, it is not empty where all or
    none are hits, and stays in [0, 1].

    Args:
        hits: Number of hits, from 0 to `count`.
        count: Number of trials, 1 or more.
    """
    z = NormalDist().inv_cdf((1 + INTERVAL) / 2)
    share = hits / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    variance = share * (1 - share) / count + z**2 / (4 * count**2)
    half_width = z * math.sqrt(variance) / (1 + z**2 / count)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def class_scores(confusion: np.ndarray) -> ClassScores:
    """Return the scores of each class.

    Args:
        confusion: Images by true (row) and predicted class, int64 [C, C].
    """
    hits = confusion.diagonal()
    support = confusion.sum(1)
    predicted = confusion.sum(0)
    return ClassScores(
        precision=hits / np.maximum(predicted, 1),
        recall=hits / np.maximum(support, 1),
        f1=2 * hits / np.maximum(predicted + support, 1),
        support=support,
    )


def score(predictions: Predictions) -> Scores:
    """Return the scores of predictions for one image or more."""
    num_images = len(predictions.labels)
    num_classes = len(predictions.names)
    hits = int(predictions.correct.sum())
    top5_accuracy = None
    if num_classes > TOP_K:
        top5_accuracy = float(
            multiclass_accuracy(
                predictions.logits, predictions.labels, num_classes, average="micro", top_k=TOP_K
            )
        )
    before = predictions.at_temperature(NO_TEMPERATURE)
    return Scores(
        num_images=num_images,
        accuracy=hits / num_images,
        interval=wilson_interval(hits, num_images),
        top5_accuracy=top5_accuracy,
        temperature=predictions.temperature,
        nll=nll(predictions.logits, predictions.labels, predictions.temperature),
        nll_before=nll(predictions.logits, predictions.labels),
        bins=predictions.confidence_bins(),
        error_before=before.confidence_bins().calibration_error,
        class_names=list(predictions.names),
        classes=class_scores(predictions.confusion()),
        coverage=[answered(predictions, threshold) for threshold in THRESHOLDS],
    )
