"""`PrintEpochs`: the lines of epochs that contestants print which train with Lightning."""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch import Callback

from benchmarks.peer_job import Phase, print_epoch


class PrintEpochs(Callback):
    """Print a line for each epoch, with the accuracy that the module logs as "val/acc".

    Args:
        frozen_epochs: Number of the first epochs, in which only the head trains.
    """

    def __init__(self, frozen_epochs: int) -> None:
        self.frozen_epochs = frozen_epochs
        self._start = 0.0
        self._seconds = 0.0
        self._num_images = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._num_images = 0
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images."""
        self._num_images += len(batch[1])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock. Lightning validates before an epoch of training ends."""
        self._seconds = time.perf_counter() - self._start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        phase: Phase = "unfrozen"
        if trainer.current_epoch < self.frozen_epochs:
            phase = "frozen"
        accuracy = float(trainer.callback_metrics["val/acc"])
        print_epoch(phase, self._num_images, self._seconds, accuracy)
