"""Mixup and CutMix: training images that are two images, and labels that are two shares."""

import math
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchvision.transforms import v2

from cifar_transfer.base.console import say, styled
from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.data.geometry import to_float
from cifar_transfer.training.lightning_internals import count_training_batches, is_trial
from cifar_transfer.training.phases import describe_epochs

ALPHAS = (0.001, 1000.0)  # least and greatest; torch's distribution is exact within
MAX_OFF_EPOCHS = 1_000_000
CYAN = 36  # ANSI's number


@dataclass(frozen=True)
class MixingOptions:
    """Options of mixup and CutMix; `TransferClassifier` documents each.

    Raises:
        UserError: An option is out of its range or cannot be stored.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_off_epochs: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, as_primitive(name, value))
        least, greatest = ALPHAS
        for name in ("mixup_alpha", "cutmix_alpha"):
            check(
                name,
                getattr(self, name),
                lambda alpha: alpha == 0 or least <= alpha <= greatest,
                f"0 (off), or {least:g} to {greatest:g}",
            )
        check(
            "mix_off_epochs",
            self.mix_off_epochs,
            lambda epochs: 0 <= epochs <= MAX_OFF_EPOCHS and epochs == int(epochs),
            "0 epochs or more",
        )

    @property
    def is_on(self) -> bool:
        """Whether any images are mixed."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


class BatchMixing(Callback):
    """Mixes each image of a training batch, and its label, with the image before it in the batch.

    `TransferClassifier` makes one if its options ask for mixup or CutMix, and calls it in each
    step. torchvision's classes do the mixing. Both on, one of them is drawn for each batch. They
    draw from torch's global CPU generator, which data modules of this package seed for each step.

    Args:
        options: What is mixed, and how.
        num_classes: Number of classes.

    Attributes:
        is_active: Whether the images of this epoch are mixed.

    Raises:
        UserError: `mix_off_epochs` counts from the end of a run that has none.
    """

    def __init__(self, options: MixingOptions, num_classes: int) -> None:
        self.options = options
        self.is_active = True
        self._mix = _transform(options, num_classes)
        self._end: int | None = None  # epoch, from 0, from which images are not mixed
        self._was_told: bool | None = None  # what was printed last of `is_active`

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images and the shares of their labels.

        Args:
            images: [B, 3, H, W], RGB; floats in [0, 1], or integers from 0 to 255.
            labels: Int64 [B].

        Returns:
            Images, float [B, 3, H, W] in [0, 1], and the share of each class in them, float32
            [B, C], which sum to 1.
        """
        mixed_images, shares = self._mix(to_float(images), labels)
        return mixed_images, shares

    def mixes_in(self, epoch: int) -> bool:
        """Return whether the images of an epoch, counted from 0, are mixed; known in a fit."""
        return self._end is None or epoch < self._end

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the epoch from which images are not mixed."""
        self._was_told = None
        self._end = None
        if self.options.mix_off_epochs == 0:
            return
        epochs = count_epochs(trainer)
        if epochs is None:
            raise UserError(
                f"mix_off_epochs={self.options.mix_off_epochs} counts back from the end of the "
                f"run: set --trainer.max_epochs."
            )
        self._end = epochs - self.options.mix_off_epochs
        if self._end <= 0 and not is_trial(trainer):
            rank_zero_warn(
                f"No image is mixed, because the run has {epochs} epochs and "
                f"mix_off_epochs={self.options.mix_off_epochs} leaves that many out."
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Switch mixing on or off for the epoch, and say so in the table of epochs.

        It is done here, because a run that is resumed within an epoch does not begin that epoch.
        """
        epoch = trainer.current_epoch
        self.is_active = self.mixes_in(epoch)
        if self.is_active == self._was_told:
            return
        self._was_told = self.is_active
        end = trainer.max_epochs
        text = "images are not mixed."
        if self.is_active:
            text = "images are mixed; train acc counts the larger share's label."
            if self._end is not None:
                end = self._end
        say(trainer, styled(f"{describe_epochs(epoch, None, end)}: {text}", CYAN))


def _transform(options: MixingOptions, num_classes: int) -> v2.Transform:
    """Return torchvision's transform of a batch of images and labels."""
    transforms: list[v2.Transform] = []
    # An alpha that is a whole number would give a distribution of whole numbers.
    if options.mixup_alpha > 0:
        transforms.append(v2.MixUp(alpha=float(options.mixup_alpha), num_classes=num_classes))
    if options.cutmix_alpha > 0:
        transforms.append(v2.CutMix(alpha=float(options.cutmix_alpha), num_classes=num_classes))
    if len(transforms) == 1:
        return transforms[0]
    return v2.RandomChoice(transforms)


def count_epochs(trainer: Trainer) -> int | None:
    """Return the epochs of a run, the last of which `max_steps` may cut short; None if unknown."""
    epochs = trainer.max_epochs
    if epochs is not None and epochs < 0:
        epochs = None
    if trainer.max_steps < 0:
        return epochs
    batches = count_training_batches(trainer)
    if not math.isfinite(batches) or batches == 0:
        return epochs
    steps_per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    epochs_of_steps = math.ceil(trainer.max_steps / steps_per_epoch)
    if epochs is None:
        return epochs_of_steps
    return min(epochs, epochs_of_steps)
