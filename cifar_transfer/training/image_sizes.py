"""Sizes of images that rise during training, as in progressive resizing (fast.ai)."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from cifar_transfer.base.errors import UserError


class ImageSizes(Callback):
    """Knows the side that training images have in each step.

    `TransferClassifier` makes one if its option `train_sizes` is given, and asks it in each step.

    Args:
        sides: Sides in pixels, each for an equal part of the run's steps, such as [32, 48].

    Attributes:
        side: Side in pixels of the images of this step.

    Raises:
        UserError: The run has no end that its steps could be counted to.
    """

    def __init__(self, sides: list[int]) -> None:
        self.sides = sides
        self.side = sides[0]
        self._total_steps = 1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the steps of the run."""
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("train_sizes are shared out over the run: set --trainer.max_epochs.")
        self._total_steps = int(steps)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose the side for the step that begins."""
        self.side = self.side_at(trainer.global_step, self._total_steps)

    def side_at(self, done: int, total: int) -> int:
        """Return the side in pixels after `done` of `total` parts of the run."""
        index = len(self.sides) * done // total
        return self.sides[min(index, len(self.sides) - 1)]
