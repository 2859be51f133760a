"""`CollectPredictions`: predictions for each image of a split, while Lightning evaluates."""

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from cifar_transfer.data.images import Images
from cifar_transfer.network.temperature import NO_TEMPERATURE
from cifar_transfer.results.predictions import Predictions
from cifar_transfer.results.thumbnails import thumbnails
from cifar_transfer.training.classifier import TransferClassifier
from cifar_transfer.training.lightning_internals import data_of

MAX_MISTAKES_KEPT = 32  # whose images are kept, and as many images that are predicted correctly
MAX_THUMBNAIL_SIDE = 96  # pixels


class CollectPredictions(Callback):
    """Collects predictions in a test, or in a validation outside of a fit.

    The module's `test_step` and `validation_step` must return logits, float [B, C], and the data
    module must be one of this package's.

    Attributes:
        predictions: Predictions for all images of the split, in their order; on the first process,
            after the end.
    """

    def __init__(self) -> None:
        self.predictions: Predictions | None = None
        self._logits: list[Tensor] = []  # of each batch of this process, float32 [B, C]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self.predictions = None
        self._logits = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the logits of a batch."""
        self._logits.append(outputs.float())

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the predictions of all processes into the order of the images."""
        loader: Any = trainer.val_dataloaders
        if trainer.testing:
            loader = trainer.test_dataloaders
        rows = torch.tensor(list(loader.sampler), device=pl_module.device)
        logits = torch.cat(self._logits)
        self._logits = []
        if trainer.world_size > 1:
            rows = torch.cat(gather_all_tensors(rows))
            logits = torch.cat(gather_all_tensors(logits))
        if not trainer.is_global_zero:
            return
        logits = logits[rows.argsort()].cpu()
        images: Images = loader.dataset
        labels = torch.from_numpy(images.labels)
        class_names = data_of(trainer).class_names
        temperature = NO_TEMPERATURE
        if isinstance(pl_module, TransferClassifier):
            temperature = pl_module.classifier.temperature
        none = torch.arange(0)
        predictions = Predictions(class_names, labels, logits, none, none, temperature)
        rows_kept = _select_rows(predictions)
        self.predictions = replace(
            predictions, rows=rows_kept, images=_thumbnails_of(images, rows_kept)
        )

    on_validation_start = on_test_start
    on_validation_batch_end = on_test_batch_end
    on_validation_end = on_test_end


def _select_rows(predictions: Predictions) -> Tensor:
    """Return the most confident mistakes, the worst first, then some correct predictions."""
    mistakes = (~predictions.correct).nonzero()[:, 0]
    correct = predictions.correct.nonzero()[:, 0]
    worst_first = predictions.confidences[mistakes].argsort(descending=True, stable=True)
    mistakes = mistakes[worst_first][:MAX_MISTAKES_KEPT]
    num_correct = min(MAX_MISTAKES_KEPT, len(correct))
    spread = torch.linspace(0, len(correct) - 1, num_correct).long()
    return torch.cat([mistakes, correct[spread]])


def _thumbnails_of(images: Images, rows: Tensor) -> Tensor:
    """Return small copies of these images, uint8 [K, 3, H, W]."""
    if len(rows) == 0:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    pixels, _ = images.__getitems__(rows.tolist())
    return thumbnails(pixels, MAX_THUMBNAIL_SIDE)
