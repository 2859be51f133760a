"""Distillation: what a teacher adds to its student's loss (Hinton et al. 2015, https://arxiv.org/abs/1503.02531)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.classes import check_classes
from cifar_transfer.data.geometry import Size, pixels
from cifar_transfer.training.checkpoint_file import load_network


class Teacher:
    """The network of a checkpoint; no module, so that no state dict, optimizer or average of its student has it.

    Raises:
        UserError: There is no such checkpoint, or it does not fit the student's classes or the images' size, where
            these are known.
    """

    def __init__(
        self, path: str, num_classes: int, names: Sequence[str] | None, size: Size | None
    ) -> None:
        try:
            self.network = load_network(path)
            options, own = self.network.options, self.network.geometry
            if names and options["class_names"]:
                check_classes(options["class_names"], names)
            if options["num_classes"] != num_classes:
                raise UserError(
                    f"It has {options['num_classes']} outputs, and its student {num_classes}."
                )
            if size not in (None, own.size):
                seen = f"It was trained on images decoded to {pixels(own.size)} pixels, and the data give {pixels(size)}"
                if own.input_side is None:
                    raise UserError(f"{seen}: give both the same data.decode_size.")
                rank_zero_info(f"teacher={path}: {seen}, which are resized for it.")
        except UserError as error:
            raise UserError(f"teacher={path}: {error}") from None

    def loss(self, images: Tensor, logits: Tensor, temperature: float) -> Tensor:
        """Mean of KL(teacher || student) * temperature², of images, float [B, 3, H, W] in [0, 1], and its logits."""
        with torch.no_grad():
            wanted = (self.network(images) / temperature).log_softmax(1)
        given = (logits / temperature).log_softmax(1)
        return temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)
