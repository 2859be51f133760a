"""`LossGuard`: end a run whose loss is NaN or infinite, and warn if a head learns nothing."""

import math
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from cifar_transfer.base.console import counted
from cifar_transfer.base.errors import UserError
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.training.freeze import BackboneFreeze
from cifar_transfer.training.lightning_internals import (
    callbacks_of,
    data_of,
    has_gradient_scaler,
)
from cifar_transfer.training.loss import TrainingLoss

STEPS_BETWEEN_CHECKS = 10  # each check waits for the device
MAX_SCALED_OVERFLOWS = 25  # NaN losses in a row; the gradient scaler of 16-mixed skips such steps
MIN_STEPS_TO_LEARN = 100  # a head that has made fewer steps may have learned nothing yet
MAX_BLIND_LOSS = 0.99  # of the loss of a head that knows the shares of the classes alone
MAX_SHARE_FOR_ACCURACY = 0.5  # of the largest class, above which accuracy alone says nothing
MAX_BLIND_DEVIATIONS = 2  # standard deviations above the accuracy of such a head


class LossGuard(Callback):
    """End a run whose loss is NaN or infinite before it reaches a checkpoint.

    Each loss is checked on the device without waiting for it. The result is read every ten steps
    and before anything is saved, so that no checkpoint holds weights from such a step. At the end
    of the epochs with a frozen backbone, a warning tells if the head has learned nothing.

    Raises:
        UserError: A loss is NaN or infinite. It names the step, the learning rate and what to try.
    """

    def __init__(self) -> None:
        # On the device of the module, once training starts.
        self._bad_losses = torch.tensor(0)  # in a row; no longer counted when they are too many
        self._first_bad_step = torch.tensor(0)
        self._max_bad_losses = 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._max_bad_losses = MAX_SCALED_OVERFLOWS if has_gradient_scaler(trainer) else 1
        self._bad_losses = torch.tensor(0, device=pl_module.device)
        self._first_bad_step = torch.tensor(0, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the loss, and read the result every ten steps."""
        is_bad = ~outputs["loss"].detach().isfinite()
        is_first = is_bad & (self._bad_losses == 0)
        step = trainer.global_step - 1
        self._first_bad_step = torch.where(is_first, step, self._first_bad_step)
        count = (self._bad_losses + 1) * is_bad
        is_over = self._bad_losses >= self._max_bad_losses
        self._bad_losses = torch.where(is_over, self._bad_losses, count)
        if (batch_idx + 1) % STEPS_BETWEEN_CHECKS == 0 or trainer.is_last_batch:
            self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Read the result. All processes do so together, and a bad loss of one ends them all."""
        is_over = bool(self._bad_losses >= self._max_bad_losses)
        any_is_over = is_over
        if trainer.world_size > 1:
            any_is_over = trainer.strategy.reduce_boolean_decision(is_over, all=False)
        if not any_is_over:
            return
        step = int(self._first_bad_step) if is_over else trainer.global_step - 1
        self._end(trainer, f"training loss of step {step}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the validation loss, which is the mean over all processes."""
        loss = trainer.callback_metrics.get("val/loss")
        if loss is None or trainer.sanity_checking:
            return
        if not math.isfinite(loss):
            self._end(trainer, f"validation loss of epoch {counted(trainer.current_epoch)}")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save no weights from a bad step."""
        self.check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn at the end of the frozen epochs if the head has learned nothing."""
        data = data_of(trainer)
        enough_steps = trainer.global_step >= MIN_STEPS_TO_LEARN
        if (
            not isinstance(data, ImageDataModule)
            or not enough_steps
            or not _is_unfrozen_next(trainer)
        ):
            return
        loss = float(trainer.callback_metrics["train/loss_epoch"])
        accuracy = float(trainer.callback_metrics["train/acc"])
        blind = blind_loss_of_run(pl_module, data)
        shares = drawn_shares(data)
        images = len(data.images["train"])
        if has_learned_nothing(loss, accuracy, blind, shares, images):
            rank_zero_warn(
                f"The head has learned nothing from the frozen backbone: the training accuracy is "
                f"{accuracy:.1%}, no more than without looking at the images. Its features may be "
                f"dead at this size (try image_size=64, small_images=true or normalize=weights), "
                f"or the learning rate may be far off."
            )

    def _end(self, trainer: Trainer, which_loss: str) -> None:
        learning_rate = trainer.lightning_module.learning_rate
        remedies = "a lower learning rate, gradient_clip_val=1"
        if trainer.precision not in ("32-true", "64-true"):
            remedies += ", precision=32-true"
        raise UserError(
            f"The {which_loss} is NaN or infinite (epoch {counted(trainer.current_epoch)}, "
            f"learning rate {learning_rate:.2g}), so the run ends here; the checkpoints written "
            f"before are good. Try {remedies}, or look at the augmented images."
        )


def _is_unfrozen_next(trainer: Trainer) -> bool:
    """Return whether this is the last epoch of the first phase of a `BackboneFreeze`."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, BackboneFreeze) and callback.phase == 0:
            next_phase = callback.phase_at(trainer.current_epoch + 1)
            return next_phase is not None and next_phase > 0
    return False


def blind_loss_of_run(module: LightningModule, data: ImageDataModule) -> float | None:
    """Return the `blind_loss` of a run; None if its loss is not a cross-entropy alone."""
    loss = getattr(module, "loss", None)
    if not isinstance(loss, TrainingLoss) or loss.teacher is not None:
        return None
    weights = None
    if loss.class_weights is not None:
        weights = loss.class_weights.cpu().numpy()
    return blind_loss(drawn_shares(data), weights, loss.options.label_smoothing)


def drawn_shares(data: ImageDataModule) -> np.ndarray:
    """Return the share of each class among the training images that are drawn, float64 [C]."""
    counts = np.bincount(data.images["train"].labels, minlength=data.num_classes)
    if data.sampler is not None:  # "balanced"
        counts = (counts > 0).astype(int)
    return counts / counts.sum()


def has_learned_nothing(
    loss: float, accuracy: float, blind: float | None, shares: np.ndarray, images: int
) -> bool:
    """Return whether a head does no better than one that knows only how frequent the classes are.

    Loss and accuracy must both say so. Where the loss does not compare, the accuracy alone says it
    if no class has most of the images.

    Args:
        loss: Mean training loss over the images drawn.
        accuracy: Accuracy over the same images, in [0, 1].
        blind: The loss of such a head, see `blind_loss`; None if it does not compare.
        shares: Share of each class among the images drawn, float64 [C].
        images: Number of images drawn.
    """
    largest_share = float(shares.max())
    deviation = math.sqrt(largest_share * (1 - largest_share) / images)
    if accuracy > largest_share + MAX_BLIND_DEVIATIONS * deviation:
        return False
    if blind is None:
        return largest_share <= MAX_SHARE_FOR_ACCURACY
    return loss > MAX_BLIND_LOSS * blind


def blind_loss(
    shares: np.ndarray, class_weights: np.ndarray | None = None, smoothing: float = 0.0
) -> float:
    """Return the lowest mean loss of a head that gives all images the same probabilities.

    Args:
        shares: Share of each class among the images, float64 [C].
        class_weights: Weight of each class in the loss, float [C]; None weighs all alike.
        smoothing: Share of each label that is spread over all classes, in [0, 1).
    """
    weights = np.ones(len(shares)) if class_weights is None else class_weights
    mass = shares * weights
    total = float(mass.sum())
    targets = (1 - smoothing) * mass + smoothing * total / len(shares)
    # The best probabilities are the targets' shares, whose cross-entropy is their entropy.
    probabilities = targets[targets > 0] / total
    return float(-total * (probabilities * np.log(probabilities)).sum())
