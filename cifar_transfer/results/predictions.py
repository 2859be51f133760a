"""What a network predicts for each image of a split: collected while it is evaluated, kept with the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix
from torchmetrics.utilities import dim_zero_cat

from cifar_transfer.data.images import Images
from cifar_transfer.data.module import Split
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


class _Gathered(Metric):
    """Tensors by name of all batches and, once computed, of all ranks: the gathering is torchmetrics'."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, tensors: dict[str, Tensor]) -> None:
        """Keep a batch."""
        for name in self.names:
            getattr(self, name).append(tensors[name])

    def compute(self) -> dict[str, Tensor]:
        """All batches in one, in no particular order."""
        return {name: dim_zero_cat(getattr(self, name)) for name in self.names}


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
        if self._wanted and stage != "fit":
            head = pl_module.get_submodule(f"network.{pl_module.heads[0]}")  # type: ignore[index]
            self._hook = head.register_forward_pre_hook(self._see)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look away."""
        if self._wanted and stage != "fit":
            self._hook.remove()

    def _see(self, head: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._seen is None:  # the mirror image comes second
            self._seen = inputs[0].flatten(1).float()

    def _start(self, trainer: Trainer, device: torch.device, split: Split) -> None:
        self._seen = None
        self._gathered = _Gathered(["labels", "probabilities", "rows"]).to(device)
        self._features = _Gathered(["features", "rows"]).to(device)
        images = trainer.datamodule.images[split]  # type: ignore[attr-defined] # set when it is attached
        self._stride = -(-len(images) // self._wanted) if self._wanted else 0

    def _batch(self, trainer: Trainer, logits: Tensor, labels: Tensor, number: int) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        rows = number * data.eval_batch_size + torch.arange(len(labels), device=labels.device)
        rows = rows * trainer.world_size + trainer.global_rank  # as `WholeShard` deals them out
        self._gathered.update({"labels": labels, "probabilities": logits.float().softmax(1), "rows": rows})
        if self._seen is not None:
            chosen = rows % self._stride == 0
            self._features.update({"features": self._seen[chosen], "rows": rows[chosen]})
            self._seen = None

    def _end(self, trainer: Trainer, split: Split) -> None:
        found = self._gathered.compute()
        seen = self._features.compute() if self._wanted else None  # by all ranks
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        order = found["rows"].argsort()
        found = {name: tensor[order].cpu() for name, tensor in found.items()}
        shown = _worth_seeing(found["labels"], found["probabilities"])
        images = _thumbnails(data.images[split], found["rows"][shown], THUMBNAIL)
        self.predictions = Predictions(data.class_names, found["labels"], found["probabilities"], shown, images)
        if seen is not None:
            self.features = seen["features"].cpu()
            self.classes = torch.from_numpy(data.images[split].labels)[seen["rows"].cpu()]
            self.thumbnails = _thumbnails(data.images[split], seen["rows"].cpu(), SPRITE)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._start(trainer, pl_module.device, "test")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, number: int, _: int = 0
    ) -> None:
        """Gather a batch."""
        self._batch(trainer, outputs, batch[1], number)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it all in order."""
        self._end(trainer, "test")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, unless it is the validation within a training."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._start(trainer, pl_module.device, "val")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, number: int, _: int = 0
    ) -> None:
        """Gather a batch."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._batch(trainer, outputs, batch[1], number)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it all in order."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._end(trainer, "val")


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
