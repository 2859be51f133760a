"""What a network predicts for each image of a split: collected while it is evaluated, kept with the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix
from torchmetrics.utilities.distributed import gather_all_tensors

from cifar_transfer.data.images import Images
from cifar_transfer.files import atomic_write

SHOWN = 32  # mistakes, and as many correct predictions, whose images are kept
THUMBNAIL = 96  # pixels, the longest side of those
PROJECTED = 1000  # images in TensorBoard's projector
SPRITE = 32  # pixels, of those in TensorBoard's projector, which takes them in one picture of at most 8192


class ImagePrediction(NamedTuple):
    """What the network says of one image.

    Attributes:
        source: The image as it was given, a path or something in memory.
        pixels: What the network was shown, uint8 [3, H, W], RGB.
        classes: The likeliest with their probabilities in [0, 1], the likeliest first.
    """

    source: Any
    pixels: np.ndarray
    classes: list[tuple[str, float]]


@dataclass(frozen=True)
class Predictions:
    """The network's probabilities for N images of C classes, and some of the images.

    Args:
        names: The classes.
        labels: int64 [N].
        probabilities: float32 [N, C], rows of sum 1.
        rows: int64 [K], the images that are kept: the most confident mistakes and some correct predictions.
        images: uint8 [K, 3, H, W], RGB.
    """

    names: Sequence[str]
    labels: Tensor
    probabilities: Tensor
    rows: Tensor
    images: Tensor

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
        """bool [N]."""
        return self.predicted == self.labels

    def confusion(self) -> np.ndarray:
        """int64 [C, C]: how many images of a class (row) were taken for which (column)."""
        return multiclass_confusion_matrix(self.probabilities, self.labels, len(self.names)).numpy()

    def calibration_error(self, bins: int) -> float:
        """By how much confidence and accuracy differ on average (Guo et al. 2017, https://arxiv.org/abs/1706.04599)."""
        return float(multiclass_calibration_error(self.probabilities, self.labels, len(self.names), bins))

    def save(self, path: Path) -> None:
        """Write to a `.npz` of plain arrays, probabilities in half precision."""
        arrays = {name: getattr(self, name).numpy() for name in ("labels", "rows", "images")}
        with atomic_write(path) as file:
            half = self.probabilities.half().numpy()
            np.savez_compressed(file, names=np.array(self.names), probabilities=half, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Read what `save` has written."""
        with np.load(path, allow_pickle=False) as arrays:
            read = {name: torch.from_numpy(arrays[name]) for name in ("labels", "rows", "images", "probabilities")}
            return cls(arrays["names"].tolist(), **read | {"probabilities": read["probabilities"].float()})


class CollectPredictions(Callback):
    """Gathers the network's predictions for a data module's images in a test, or in a validation outside of training.

    Args:
        features: Also gather what comes into the head, for at most so many images from all over the split.

    Attributes:
        predictions: Of the whole split, on the first rank, once it is evaluated.
        features: float32 [M, D] of these images, likewise.
        thumbnails: uint8 [M, 3, H, W], the images.
        classes: int64 [M], their labels.
    """

    def __init__(self, features: int = 0) -> None:
        self.predictions: Predictions | None = None
        self.features: Tensor | None = None
        self.thumbnails: Tensor | None = None
        self.classes: Tensor | None = None
        self._wanted = features
        self._seen: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See what comes into the head, if that is wanted."""
        if self._wanted:
            head = pl_module.get_submodule(f"network.{pl_module.heads[0]}")  # type: ignore[index]
            self._hook = head.register_forward_pre_hook(self._see)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look away."""
        if self._wanted:
            self._hook.remove()

    def _see(self, head: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._seen is None:  # the mirror image comes second
            self._seen = inputs[0].flatten(1).float()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._begin(trainer.test_dataloaders, pl_module.device)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._begin(trainer.val_dataloaders, pl_module.device)

    def _begin(self, loader: Any, device: torch.device) -> None:
        self._rows = torch.tensor(list(loader.sampler), device=device)  # of this process's images, in their order
        stride = -(-len(loader.dataset) // self._wanted) if self._wanted else 0
        self._chosen = self._rows % stride == 0 if stride else torch.zeros_like(self._rows, dtype=torch.bool)
        self._seen, self._count = None, 0
        self._probabilities: list[Tensor] = []
        self._features: list[Tensor] = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        """Gather a batch."""
        self._probabilities.append(outputs.float().softmax(1))
        if self._seen is not None:
            self._features.append(self._seen[self._chosen[self._count : self._count + len(outputs)]])
            self._seen = None
        self._count += len(outputs)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        """Gather a batch."""
        self.on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it all in order."""
        self._end(trainer, trainer.test_dataloaders)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it all in order."""
        self._end(trainer, trainer.val_dataloaders)

    def _end(self, trainer: Trainer, loader: Any) -> None:
        _, probabilities = _in_order(trainer, self._rows, self._probabilities)
        if self._wanted:
            chosen, features = _in_order(trainer, self._rows[self._chosen], self._features)
        if not trainer.is_global_zero:
            return
        images, labels = loader.dataset, torch.from_numpy(loader.dataset.labels)
        shown = _worth_seeing(labels, probabilities)
        names = trainer.datamodule.class_names  # type: ignore[attr-defined] # set when it is attached
        self.predictions = Predictions(names, labels, probabilities, shown, _thumbnails(images, shown, THUMBNAIL))
        if self._wanted:
            self.features, self.classes = features, labels[chosen]
            self.thumbnails = _thumbnails(images, chosen, SPRITE)


def _in_order(trainer: Trainer, rows: Tensor, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of all processes, rising, and what the batches say of them; on the CPU."""
    values = torch.cat(batches)
    if trainer.world_size > 1:
        rows, values = (torch.cat(gather_all_tensors(tensor)) for tensor in (rows, values))
    order = rows.argsort()
    return rows[order].cpu(), values[order].cpu()


def _worth_seeing(labels: Tensor, probabilities: Tensor) -> Tensor:
    """The most confident mistakes, the worst first, then correct predictions from all over the split."""
    confidences, predicted = probabilities.max(1)
    wrong, right = (predicted != labels).nonzero()[:, 0], (predicted == labels).nonzero()[:, 0]
    worst = wrong[confidences[wrong].argsort(descending=True, stable=True)][:SHOWN]
    spread = torch.linspace(0, len(right) - 1, min(SHOWN, len(right))).long()
    return torch.cat((worst, right[spread]))


def _thumbnails(images: Images, rows: Tensor, side: int) -> Tensor:
    """uint8 [K, 3, H, W] of these rows, no longer than `side`."""
    if not len(rows):
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    pixels = images.__getitems__(rows.tolist())[0]
    if max(pixels.shape[2:]) <= side:
        return pixels
    scale = side / max(pixels.shape[2:])
    smaller = F.interpolate(pixels.float(), scale_factor=scale, mode="bilinear", antialias=True)
    return smaller.round().clamp(0, 255).byte()
