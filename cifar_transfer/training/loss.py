"""The loss of a training step: cross-entropy with smoothing, class weights and a teacher."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.data.classes import check_classes
from cifar_transfer.data.geometry import Size, pixels
from cifar_transfer.training.checkpoint_file import load_classifier


@dataclass(frozen=True)
class LossOptions:
    """Options of the training loss; `TransferClassifier` documents each.

    Raises:
        UserError: An option is out of its range or cannot be stored.
    """

    label_smoothing: float = 0.0
    teacher: str | None = None
    teacher_weight: float = 0.5
    temperature: float = 4.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, as_primitive(name, value))
        check("label_smoothing", self.label_smoothing, lambda x: 0 <= x < 1, "a share in [0, 1)")
        check("teacher_weight", self.teacher_weight, lambda x: 0 <= x <= 1, "a share in [0, 1]")
        check("temperature", self.temperature, lambda x: 0.01 <= x <= 1000, "0.01 to 1000")


class Teacher:
    """A trained network whose logits another one learns from (Hinton et al. 2015).

    It is no `nn.Module`, so that no state dict, optimizer or average of its student has it.

    Args:
        path: Checkpoint of `fit` or `probe`.
        num_classes: Number of classes of the student.
        class_names: Names of the student's classes, if they are known.
        size: Height and width in pixels of the images that the student is given, if known.

    Attributes:
        digest: SHA-256 of the file, as a hexadecimal number.

    Raises:
        UserError: There is no such checkpoint, or it does not fit classes or images.
    """

    def __init__(
        self,
        path: str,
        num_classes: int,
        class_names: Sequence[str] | None,
        size: Size | None,
    ) -> None:
        try:
            self.classifier = load_classifier(path)
            with open(path, "rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()
            if class_names and self.classifier.has_class_names:
                check_classes(self.classifier.class_names, class_names)
            if self.classifier.num_classes != num_classes:
                raise UserError(
                    f"It has {self.classifier.num_classes} outputs, and its student {num_classes}."
                )
            if size is not None:
                self._check_size(path, size)
        except UserError as error:
            raise UserError(f"teacher={path}: {error}") from None

    def _check_size(self, path: str, size: Size) -> None:
        """Refuse images of another size, unless the teacher resizes them anyway."""
        geometry = self.classifier.geometry
        if geometry.size == size:
            return
        sizes = (
            f"It was trained on images decoded to {pixels(geometry.size)} pixels, "
            f"and the data give {pixels(size)}"
        )
        if geometry.input_side is None:
            raise UserError(f"{sizes}: give both the same data.decode_size.")
        rank_zero_info(f"teacher={path}: {sizes}, which are resized for it.")

    def loss(self, images: Tensor, logits: Tensor, temperature: float) -> Tensor:
        """Return the mean of KL(teacher || student) * temperature².

        Args:
            images: Float [B, 3, H, W] in [0, 1], RGB.
            logits: Logits of the student, float [B, C].
            temperature: Divides the logits of both.
        """
        with torch.no_grad():
            teacher_log_shares = (self.classifier(images) / temperature).log_softmax(1)
        log_shares = (logits / temperature).log_softmax(1)
        divergence = F.kl_div(
            log_shares, teacher_log_shares, reduction="batchmean", log_target=True
        )
        return temperature**2 * divergence


class TrainingLoss:
    """Mean loss of a batch.

    Args:
        options: Smoothing, and what a teacher weighs.
        class_weights: Weight of each class, float32 [C], on the device; None weighs all alike.
        teacher: Network to learn from beside the labels, or None.
    """

    def __init__(
        self,
        options: LossOptions,
        class_weights: Tensor | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.options = options
        self.class_weights = class_weights
        self.teacher = teacher

    def __call__(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar.

        The cross-entropy of each image counts with the weight of its class. That of a mixed image
        is the sum over its labels, each with its share. A teacher speaks of all images alike.

        Args:
            images: Float [B, 3, H, W] in [0, 1], RGB, for the teacher.
            logits: Float [B, C].
            targets: Labels, int64 [B], or the share of each class in mixed images, float [B, C].
        """
        if targets.ndim == 1:
            loss = self._cross_entropy(logits, targets)
        else:
            loss = self._mixed_cross_entropy(logits, targets)
        if self.teacher is None:
            return loss
        divergence = self.teacher.loss(images, logits, self.options.temperature)
        return loss.lerp(divergence, self.options.teacher_weight)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.options.label_smoothing
        if self.class_weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        # torch divides weighted losses by the sum of the weights in the batch. Then the mean over
        # several processes would not be the loss of their joint batch.
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        return (losses * self.class_weights[labels]).mean()

    def _mixed_cross_entropy(self, logits: Tensor, shares: Tensor) -> Tensor:
        smoothing = self.options.label_smoothing
        if self.class_weights is None:
            return F.cross_entropy(logits, shares, label_smoothing=smoothing)
        # Smoothing spreads the weight of a label, too, as it does without mixing. torch would give
        # each class its own weight there.
        weighted = shares * self.class_weights
        spread = weighted.mean(1, keepdim=True)
        return F.cross_entropy(logits, weighted.lerp(spread, smoothing))

    def to(self, device: torch.device, dtype: Any) -> None:
        """Bring class weights and teacher to the device of the network."""
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(device)
        if self.teacher is not None:
            self.teacher.classifier.to(device, dtype)
