"""End a run whose loss is NaN or infinite before it reaches a checkpoint."""

import math
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from cifar_transfer.base.console import counted
from cifar_transfer.base.errors import UserError
from cifar_transfer.training.freeze import BackboneFreeze

ENOUGH = 100  # steps after which a head should have learned something
EVERY = 10  # steps between two looks, for each waits for the device
SCALED = 25  # NaN losses in a row until the run ends under fp16's gradient scaler, which skips such steps
BLIND = (
    0.99  # of the loss of a head that knows how frequent the classes are, and nothing of the images
)


class Guard(Callback):
    """Ends a run whose loss is NaN or infinite, and warns of a frozen backbone that teaches the head nothing.

    Each loss is checked on the device without waiting for it. The result is read every ten steps and before anything is
    saved, so that no checkpoint holds weights from such a step.

    Raises:
        UserError: With the step, the learning rate and what to try.
    """

    def __init__(self) -> None:
        self._row = torch.tensor(
            0
        )  # NaN or infinite losses in a row, no longer counted once they are too many
        self._first = torch.tensor(0)  # step of the first of them
        self._patience = 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count, on the device."""
        self._patience = (
            SCALED if getattr(trainer.precision_plugin, "scaler", None) is not None else 1
        )
        self._row = self._first = torch.tensor(0, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the loss, and read the result every ten steps."""
        bad = ~outputs["loss"].detach().isfinite()
        self._first = torch.where(bad & (self._row == 0), trainer.global_step - 1, self._first)
        self._row = torch.where(self._row >= self._patience, self._row, (self._row + 1) * bad)
        if (batch_idx + 1) % EVERY == 0 or trainer.is_last_batch:
            self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Read the result. All processes do so together; one bad loss ends them all."""
        here = bool(self._row >= self._patience)
        if (
            here
            if trainer.world_size == 1
            else trainer.strategy.reduce_boolean_decision(here, all=False)
        ):
            step = int(self._first) if here else trainer.global_step - 1
            self._stop(trainer, f"training loss of step {step}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the validation loss, the mean over all processes."""
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None and not math.isfinite(loss) and not trainer.sanity_checking:
            self._stop(trainer, f"validation loss of epoch {counted(trainer.current_epoch)}")

    def _stop(self, trainer: Trainer, what: str) -> None:
        lr = trainer.lightning_module.learning_rate
        full = trainer.precision in ("32-true", "64-true")
        raise UserError(
            f"The {what} is NaN or infinite (epoch {counted(trainer.current_epoch)}, learning rate {lr:.2g}), so the "
            f"run ends here; the checkpoints written before are good. Try a lower learning rate, gradient_clip_val=1"
            f"{'' if full else ', precision=32-true'}, or look at the augmented images."
        )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]
    ) -> None:
        """Save no weights from such a step."""
        self.check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """When the last epoch of the first phase is over, warn if it taught the head nothing."""
        freeze = next((c for c in trainer.callbacks if isinstance(c, BackboneFreeze)), None)  # type: ignore[attr-defined]
        data = getattr(trainer, "datamodule", None)
        taught = pl_module.hparams.get("teacher")  # whose loss has another scale
        if freeze is None or data is None or len(freeze.plan) == 1 or taught:
            return
        if counted(trainer.current_epoch) != freeze.plan[1].epoch:
            return
        loss = float(trainer.callback_metrics["train/loss_epoch"])
        counts = np.bincount(data.images["train"].labels)
        shares = counts[counts > 0] / counts.sum()
        blind = float(-(shares * np.log(shares)).sum())
        if loss > BLIND * blind and trainer.global_step >= ENOUGH:
            rank_zero_warn(
                f"The frozen backbone has taught the head nothing: the training loss is {loss:.3f}, and {blind:.3f} "
                f"without looking at the images. Its features may be dead at this size (try image_size=64, "
                f"small_images=true or normalize=weights), or the learning rate may be far off."
            )
