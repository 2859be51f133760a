"""What a network predicts for each image of a split, gathered while Lightning evaluates it."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from cifar_transfer.data.images import Images
from cifar_transfer.results.predictions import Predictions

SHOWN = 32  # mistakes, and as many correct predictions, whose images are kept
THUMBNAIL = 96  # pixels, the longest side of those
PROJECTED = 1000  # images in TensorBoard's projector
SPRITE = 32  # pixels, of those in TensorBoard's projector, which takes them in one picture of at most 8192


class CollectPredictions(Callback):
    """Gathers the network's predictions for a data module's images in a test, or in a validation outside of training.

    On the first rank, once all is evaluated, it has them, and where `features` are wanted also these, float32 [M, D],
    with the `thumbnails`, uint8 [M, 3, H, W], and the `classes`, int64 [M], of their images.

    Args:
        features: Also gather what comes into the head, for at most so many images from all over the split.
    """

    thumbnails: Tensor
    classes: Tensor
    _loader: Any

    def __init__(self, features: int = 0) -> None:
        self.predictions: Predictions | None = None
        self.features: Tensor | None = None
        self._wanted = features

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, and see what comes into the head, if that is wanted."""
        self._loader = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        # Of this process's images, in their order.
        self._rows = torch.tensor(list(self._loader.sampler), device=pl_module.device)
        self._probabilities: list[Tensor] = []
        self._features: list[Tensor] = []
        if self._wanted:
            self._chosen = self._rows % math.ceil(len(self._loader.dataset) / self._wanted) == 0
            self._seen: list[Tensor] = []  # in this batch
            network: Any = pl_module.network
            head = network.get_submodule(pl_module.heads[0])  # type: ignore[index]
            self._hook = head.register_forward_pre_hook(
                lambda _, inputs: self._seen.append(inputs[0])
            )

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *_: Any,
    ) -> None:
        """Gather a batch."""
        self._probabilities.append(outputs.float().softmax(1))
        if self._wanted:
            first = batch_idx * self._loader.batch_size
            # The mirror images come second.
            self._features.append(
                self._seen[0][self._chosen[first : first + len(outputs)]].flatten(1).float()
            )
            self._seen.clear()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it all in order."""
        _, probabilities = _in_order(trainer, self._rows, self._probabilities)
        if self._wanted:
            self._hook.remove()
            chosen, features = _in_order(trainer, self._rows[self._chosen], self._features)
        if not trainer.is_global_zero:
            return
        images, labels = self._loader.dataset, torch.from_numpy(self._loader.dataset.labels)
        shown = _worth_seeing(labels, probabilities)
        names = trainer.datamodule.class_names  # type: ignore[attr-defined] # set when it is attached
        self.predictions = Predictions(
            names, labels, probabilities, shown, _thumbnails(images, shown, THUMBNAIL)
        )
        if self._wanted:
            self.features, self.classes = features, labels[chosen]
            self.thumbnails = _thumbnails(images, chosen, SPRITE)

    on_validation_start, on_validation_end = on_test_start, on_test_end
    on_validation_batch_end = on_test_batch_end  # type: ignore[assignment] # of the name of an argument


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
    return thumbnails(images.__getitems__(rows.tolist())[0], side)


def squares(images: Tensor) -> Tensor:
    """Images, uint8 [K, 3, H, W], small, in [0, 1], on black squares: the projector fails on high ones."""
    small = thumbnails(images, SPRITE) / 255
    height, width = small.shape[2:]
    return F.pad(small, (0, max(0, height - width), 0, max(0, width - height)))


def thumbnails(images: Tensor, side: int) -> Tensor:
    """Images, uint8 [K, 3, H, W], made smaller until none is longer than `side` pixels."""
    if (longest := max(images.shape[2:])) <= side:
        return images
    smaller = F.interpolate(
        images.float(), scale_factor=side / longest, mode="bilinear", antialias=True
    )
    return smaller.round().clamp(0, 255).byte()
