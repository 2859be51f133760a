"""What a network predicts for an image, and for all images of a split, which a run keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifar_transfer.base.files import atomic_write

SHOWN = 24  # images of a command line, in a figure


class ImagePrediction(NamedTuple):
    """What the network says of one image."""

    source: Any  # the image as it was given, a path or something in memory
    pixels: np.ndarray  # what the network was shown, uint8 [3, H, W], RGB
    classes: list[
        tuple[str, float]
    ]  # the likeliest with their probabilities in [0, 1], the likeliest first


@dataclass(frozen=True)
class Predictions:
    """The network's probabilities for N images of C classes, and some of the images."""

    names: Sequence[str]  # of the classes
    labels: Tensor  # int64 [N]
    probabilities: Tensor  # float32 [N, C], rows of sum 1
    rows: Tensor  # int64 [K], the images that are kept: the most confident mistakes and some correct predictions
    images: Tensor  # uint8 [K, 3, H, W], RGB

    @property
    def predicted(self) -> Tensor:
        """int64 [N]."""
        return self.probabilities.argmax(1)

    @property
    def confidences(self) -> Tensor:
        """Of the predictions, float32 [N] in [0, 1]."""
        return self.probabilities.amax(1)

    @property
    def correct(self) -> Tensor:
        """Bool [N]."""
        return self.predicted == self.labels

    def confusion(self) -> np.ndarray:
        """int64 [C, C]: how many images of a class (row) were taken for which (column)."""
        classes = len(self.names)
        return (
            (self.labels * classes + self.predicted)
            .bincount(minlength=classes**2)
            .view(classes, classes)
            .numpy()
        )

    def calibration_error(self, bins: int) -> float:
        """By how much confidence and accuracy differ on average (Guo et al. 2017, https://arxiv.org/abs/1706.04599)."""
        from torchmetrics.functional.classification import (
            multiclass_calibration_error,
        )  # which takes seconds

        return float(
            multiclass_calibration_error(self.probabilities, self.labels, len(self.names), bins)
        )

    def save(self, path: Path) -> None:
        """Write to a `.npz` of plain arrays, probabilities in half precision."""
        arrays = {name: getattr(self, name).numpy() for name in ("labels", "rows", "images")}
        with atomic_write(path) as file:
            half = self.probabilities.half()
            # Where rounding has another class win, the predicted one is given a last digit more.
            rows = (half.argmax(1) != self.predicted).nonzero()[:, 0]
            half[rows, self.predicted[rows]] = half[rows].amax(1).nextafter(torch.ones(1).half())
            np.savez_compressed(
                file, names=np.array(self.names), probabilities=half.numpy(), **arrays
            )

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Read what `save` has written."""
        with np.load(path, allow_pickle=False) as arrays:
            read = {
                name: torch.from_numpy(arrays[name])
                for name in ("labels", "rows", "images", "probabilities")
            }
            return cls(
                arrays["names"].tolist(), **read | {"probabilities": read["probabilities"].float()}
            )
