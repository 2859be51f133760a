"""`BatchReader`: images and labels of a batch from any loader, looked at before they are used."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.images import Batch

IMAGE_KEYS = ("pixel_values", "image", "images", "img")  # as data sets of Hugging Face have them
LABEL_KEYS = ("labels", "label", "target", "targets")
MAX_OVERSHOOT = 0.25  # beyond [0, 1]: sharp interpolation and added noise leave the range a little


class BatchReader:
    """Takes batches of any loader apart, and refuses those that would train or score wrongly.

    A batch is a pair of images and labels, or a dict with one of `IMAGE_KEYS` and `LABEL_KEYS`.
    The form of all batches is checked. The values of images are looked at in the first batch of
    each kind of step, because a GPU would have to be waited for. Those of labels are looked at
    with them, and on a CPU in each batch.

    Args:
        num_classes: Number of classes that labels may name.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._steps_looked_at: set[str] = set()

    def begin(self) -> None:
        """Look at the values of the next batch of each kind of step again."""
        self._steps_looked_at = set()

    def images_and_labels(self, batch: Any, step: str) -> Batch:
        """Return the images of a batch as they are, [B, 3, H, W], and its labels, int64 [B].

        Args:
            batch: What the loader gives, on the device of the network.
            step: Kind of the step, such as "training".

        Raises:
            UserError: The batch has no labels, or images or labels that the network cannot take.
        """
        images, labels = _take_apart(batch)
        _check_images(images)
        if labels is None:
            raise UserError(
                f"The batches of {step} have no labels: give pairs of images and labels, or dicts "
                f"with pixel_values and labels."
            )
        labels = _whole_numbers(labels, len(images))
        is_first = self._look_at(images, step)
        if is_first or labels.device.type == "cpu":
            self._check_labels(labels)
        return images, labels

    def images(self, batch: Any, step: str) -> Tensor:
        """Return the images of a batch as they are, [B, 3, H, W]; it needs no labels.

        Raises:
            UserError: The network cannot take such images.
        """
        images, _ = _take_apart(batch)
        _check_images(images)
        self._look_at(images, step)
        return images

    def _look_at(self, images: Tensor, step: str) -> bool:
        """Check the range of the first images of a kind of step; return whether they are the first.

        Raises:
            UserError: They are not in [0, 1], or in 0 to 255 if they are integers.
        """
        if step in self._steps_looked_at:
            return False
        self._steps_looked_at.add(step)
        if images.numel() and images.dtype != torch.bool:
            _check_range(images, step)
        return True

    def _check_labels(self, labels: Tensor) -> None:
        if not labels.numel():
            return
        lowest, highest = torch.stack(torch.aminmax(labels)).tolist()
        if lowest < 0 or highest >= self.num_classes:
            raise UserError(
                f"A batch has labels from {lowest} to {highest}, but the network's "
                f"{self.num_classes} classes are numbered from 0 to {self.num_classes - 1}: number "
                f"the labels so, or set num_classes."
            )


def _take_apart(batch: Any) -> tuple[Any, Any]:
    """Return images and labels of a batch; None for the labels if it has none."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        images = _first_of(batch, IMAGE_KEYS)
        if images is None:
            raise UserError(
                f"A batch is a dict with the keys {', '.join(map(str, batch))}: name its images "
                f"{IMAGE_KEYS[0]} and its labels {LABEL_KEYS[0]}."
            )
        return images, _first_of(batch, LABEL_KEYS)
    if isinstance(batch, Sequence) and len(batch) == 1:
        return batch[0], None
    if isinstance(batch, Sequence) and len(batch) == 2:
        return batch[0], batch[1]
    raise UserError(
        f"A batch is {_form(batch)}: give pairs of images and labels, or dicts with "
        f"{IMAGE_KEYS[0]} and {LABEL_KEYS[0]}."
    )


def _first_of(batch: Mapping[Any, Any], keys: Sequence[str]) -> Any:
    """Return the value of the first of some keys that a dict has, or None."""
    for key in keys:
        if key in batch:
            return batch[key]
    return None


def _check_images(images: Any) -> None:
    if isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == 3:
        return
    raise UserError(
        f"The images of a batch are {_form(images)}: give a tensor [B, 3, H, W], RGB, of floats in "
        f"[0, 1] or of bytes."
    )


def _check_range(images: Tensor, step: str) -> None:
    lowest, highest = torch.stack(torch.aminmax(images.float())).tolist()
    said = f"The images of {step} reach from {lowest:.3g} to {highest:.3g}"
    if not images.is_floating_point():
        if lowest < 0 or highest > 255:
            raise UserError(f"{said}: give integers from 0 to 255, or floats in [0, 1].")
        return
    if math.isnan(lowest):
        raise UserError(f"The images of {step} have pixels that are NaN: give them in [0, 1].")
    if lowest < -MAX_OVERSHOOT:
        raise UserError(
            f"{said}, as if they were normalised, which the network does itself (option "
            f"normalize): give them in [0, 1], without Normalize."
        )
    if highest > 1 + MAX_OVERSHOOT:
        raise UserError(f"{said}, and not from 0 to 1: divide them by 255, or give them as uint8.")


def _whole_numbers(labels: Any, count: int) -> Tensor:
    """Return the labels of some images as int64 [B].

    Raises:
        UserError: They are no whole numbers, or not one for each image.
    """
    is_tensor = isinstance(labels, Tensor) and labels.ndim == 1
    if not is_tensor or labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"The labels of a batch are {_form(labels)}: give whole numbers, one for each image, "
            f"int64 [B]."
        )
    if len(labels) != count:
        raise UserError(f"A batch has {count} images and {len(labels)} labels: give one for each.")
    return labels.long()


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} {list(value.shape)}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
