"""Small copies of images, for galleries and for TensorBoard's projector."""

import torch.nn.functional as F
from torch import Tensor

MAX_SPRITE_SIDE = 32  # pixels; the projector keeps all images in one of at most 8192 pixels


def thumbnails(images: Tensor, max_side: int) -> Tensor:
    """Return images, uint8 [N, 3, H, W], reduced to sides of at most `max_side` pixels."""
    longest = max(images.shape[2:])
    if longest <= max_side:
        return images
    reduced = F.interpolate(
        images.float(), scale_factor=max_side / longest, mode="bilinear", antialias=True
    )
    return reduced.round().clamp(0, 255).byte()


def sprites(images: Tensor) -> Tensor:
    """Return images, uint8 [N, 3, H, W], as float32 [N, 3, S, S] in [0, 1], S <= 32.

    They are padded with black to squares, because TensorBoard's projector fails on images that are
    higher than wide.
    """
    small = thumbnails(images, MAX_SPRITE_SIDE) / 255
    height, width = small.shape[2:]
    right = max(0, height - width)
    bottom = max(0, width - height)
    return F.pad(small, (0, right, 0, bottom))
