"""Brightness, contrast, saturation and hue of a batch, each image by its own factors and order.

The result is that of torchvision's `adjust_brightness`, `adjust_contrast`, `adjust_saturation` and
`adjust_hue` on float tensors, one after the other, up to rounding.
"""

import numpy as np
import torch
from torch import Tensor

from cifar_transfer.data.resampling import upload

# Weights of red, green and blue in a grey value, as in torchvision's `rgb_to_grayscale` (ITU-R
# BT.601, rounded).
GREY = (0.2989, 0.587, 0.114)

# Operations, numbered as in torchvision's `ColorJitter`.
BRIGHTNESS = 0
CONTRAST = 1
SATURATION = 2
HUE = 3


def sort_by_hue(order: Tensor) -> Tensor:
    """Return the rows of images in the order that `jitter` needs: those whose hue is last first.

    Args:
        order: Operations of B images in the order in which they are applied, int64 [B, 4].

    Returns:
        int64 [B], on the CPU.
    """
    places = (order.numpy() == HUE).argmax(1)
    return torch.from_numpy(np.argsort(-places, kind="stable"))


def jitter(pixels: Tensor, factors: Tensor, hue: Tensor, order: Tensor) -> None:
    """Change brightness, contrast, saturation and hue in place, in each image's own order.

    Brightness, contrast and saturation are all of the form
    clamp(a * x + b * grey(x) + c * mean(grey(x))), so that their order is only a matter of
    coefficients in three steps. Hue comes before, between or after these. The images are sorted by
    its place, the last first: a step before hue changes the first few images only, one after it the
    rest.

    Args:
        pixels: float32 [3, B, N] in [0, 1], on any device, B sorted by `sort_by_hue`,
            unless no hue moves.
        factors: Factors >= 0 of brightness, contrast and saturation, float32 [B, 3], on the CPU; 1
            changes nothing.
        hue: Turns of the colour circle by which the hue moves, in [-0.5, 0.5], float32 [B], on the
            CPU; 0 changes nothing.
        order: `BRIGHTNESS`, `CONTRAST`, `SATURATION` and `HUE` in the order in which they are
            applied, int64 [B, 4], on the CPU.
    """
    # NumPy takes a fraction of the time of torch for so few numbers.
    operations = order.numpy()
    is_hue = operations == HUE
    operations = operations[~is_hue].reshape(-1, 3).T
    count, size = pixels.shape[1:]
    a = factors.numpy()[np.arange(count), operations]
    b = (1 - a) * (operations == SATURATION) * GREY[0]
    c = (1 - a) * (operations == CONTRAST) * GREY[0] / size
    coefficients = upload(torch.from_numpy(np.array((a, b, c))), pixels.device)
    steps = coefficients[..., None].unbind(1)
    # The way to hues and back costs a last digit, even where they do not move.
    if not hue.any():
        for step in steps:
            _mix(pixels, step)
        return
    counts_before_hue = (is_hue.argmax(1) > np.arange(3)[:, None]).sum(1).tolist()
    for before, step in zip(counts_before_hue, steps, strict=True):
        _mix(pixels[:, :before], step[:, :before])
    _turn_hue(pixels, hue)
    for before, step in zip(counts_before_hue, steps, strict=True):
        _mix(pixels[:, before:], step[:, before:])


def _mix(pixels: Tensor, coefficients: Tensor) -> None:
    """Turn pixels into clamp(a * pixels + b * grey + c * sum of grey) in place.

    Here grey is its value over the weight of red in it, which saves a pass over the pixels.

    Args:
        pixels: float32 [3, B, N].
        coefficients: a, b and c, float32 [3, B, 1].
    """
    a, b, c = coefficients.unbind()
    red, green, blue = pixels.unbind()
    grey = torch.add(red, green, alpha=GREY[1] / GREY[0]).add_(blue, alpha=GREY[2] / GREY[0])
    constant = grey.sum(1, keepdim=True).mul_(c)
    added = grey.mul_(b).add_(constant)
    torch.addcmul(added, pixels, a, out=pixels).clamp_(0, 1)


def _turn_hue(pixels: Tensor, turns: Tensor) -> None:
    """Move the hue in place, at constant value and chroma, as torchvision's `adjust_hue` does.

    On the hexagon of hues (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative), in
    sixths of a turn, a channel falls from the largest of the three values to the smallest between 1
    and 2 from its own corner. So only the hue's sixths are needed: from red they are
    1 + (green + blue - red - smallest) / chroma, towards green or blue.

    Args:
        pixels: float32 [3, B, N].
        turns: Turns of the colour circle, float32 [B], on the CPU.
    """
    corners = np.array([[0], [2], [4]], dtype=np.float32)
    # In [-3, 3], as is the hue, so that their sum is at most once around and `abs` is enough to
    # find the distance.
    offsets = upload(torch.from_numpy((6 * turns.numpy() - corners + 3) % 6 - 3), pixels.device)
    red, green, blue = pixels.unbind()
    largest = pixels.amax(0)
    smallest = pixels.amin(0)
    chroma = largest - smallest
    # The hue of a grey pixel is arbitrary, because it is multiplied by a chroma of 0, but it must
    # not be NaN.
    divisor = chroma.clamp_min(torch.finfo(chroma.dtype).tiny)
    sixths = (green + blue).sub_(red).sub_(smallest).div_(divisor).add_(1).copysign_(green - blue)
    # From the corner opposite to the channel's: up to 1 it is smallest, from 2 on largest.
    distance = torch.add(sixths, offsets[..., None], out=pixels).abs_().sub_(3).abs_().clamp_(1, 2)
    torch.addcmul(largest.sub_(chroma, alpha=2), chroma, distance, out=pixels)
