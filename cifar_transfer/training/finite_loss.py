"""Numbers gone bad: a loss that is none ends the run before it reaches a checkpoint."""

import math
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cifar_transfer.errors import UserError
from cifar_transfer.training.freeze import BackboneFreeze

ENOUGH = 100  # steps after which a head should have learned something
EVERY = 10  # steps between two looks, for each waits for the device
SCALED = 25  # losses in a row that are none before the scaler of fp16, which leaves out such steps, is given up
BLIND = 0.99  # of the loss of a head that knows how frequent the classes are, and nothing of the images


class Guard(Callback):
    """Ends a run whose loss is NaN or infinite, and warns of a frozen backbone that teaches the head nothing.

    Each loss is looked at on the device, where that costs next to nothing, and what was seen is asked for every ten
    steps and before anything is saved: no checkpoint holds what such a step has left.

    Raises:
        UserError: With the step, the learning rate and what to try.
    """

    def __init__(self) -> None:
        self._row: Tensor | None = None  # losses in a row that are none
        self._first: Tensor | None = None  # step of the first of them

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss, and every ten steps at what was seen."""
        bad = ~outputs["loss"].detach().isfinite()
        if self._row is None or self._first is None:
            self._row = torch.zeros_like(bad, dtype=torch.int64)
            self._first = torch.zeros_like(self._row)
        self._first = torch.where(bad & (self._row == 0), trainer.global_step - 1, self._first)
        # What was bad for long enough stays so.
        self._row = torch.where(self._row >= self._patience(trainer), self._row, (self._row + 1) * bad)
        if (batch_idx + 1) % EVERY == 0 or trainer.is_last_batch:
            self.check(trainer)

    def _patience(self, trainer: Trainer) -> int:
        return SCALED if getattr(trainer.precision_plugin, "scaler", None) is not None else 1

    def check(self, trainer: Trainer) -> None:
        """Ask for what was seen; all processes do so together, and one that saw it ends them all."""
        if self._row is None or self._first is None:
            return
        here = bool(self._row >= self._patience(trainer))
        if here if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(here, all=False):
            step = int(self._first) if here else trainer.global_step - 1
            self._stop(trainer, f"training loss of step {step}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the mean of all processes."""
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None and not math.isfinite(loss) and not trainer.sanity_checking:
            self._stop(trainer, f"validation loss of epoch {trainer.current_epoch + 1}")

    def _stop(self, trainer: Trainer, what: str) -> None:
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        full = trainer.precision in ("32-true", "64-true")
        raise UserError(
            f"The {what} is no number (epoch {trainer.current_epoch + 1}, learning rate {lr:.2g}), so the run ends "
            f"here, and the checkpoints written before are whole. Try a lower learning rate, "
            f"--trainer.gradient_clip_val=1{'' if full else ', --trainer.precision=32-true'}, or a look at the "
            f"augmented images."
        )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        """Let nothing be saved that such a step has left."""
        self.check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """When the backbone's last frozen epoch is over, warn if it taught the head nothing."""
        freeze = next((c for c in trainer.callbacks if isinstance(c, BackboneFreeze)), None)  # type: ignore[attr-defined]
        data = getattr(trainer, "datamodule", None)
        if freeze is None or data is None or trainer.current_epoch + 1 != freeze.unfreeze_epoch:
            return
        if trainer.global_step < ENOUGH:
            return
        loss = float(trainer.callback_metrics["train/loss_epoch"])
        counts = np.bincount(data.images["train"].labels)
        shares = counts[counts > 0] / counts.sum()
        blind = float(-(shares * np.log(shares)).sum()) * (1 + pl_module.hparams.get("aux_weight", 0))
        if loss > BLIND * blind:
            rank_zero_warn(
                f"The frozen backbone has taught the head nothing: the training loss is {loss:.3f}, and {blind:.3f} "
                f"without looking at the images. Its features may be dead at this size (try --model.image_size=64, "
                f"--model.small_images=true or --model.normalize=weights), or --model.lr be far off (try --find_lr)."
            )
