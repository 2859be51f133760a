"""Training augmentation of a whole batch at once, on the batch's own device, with parameters drawn for each image.

The result is distributed as that of torchvision's pipeline, which works on one image at a time::

    RandomCrop((H, W), padding, padding_mode) -> RandomHorizontalFlip(flip)
    -> ColorJitter(brightness, contrast, saturation, hue) -> RandomRotation(degrees)

(https://docs.pytorch.org/vision/stable/transforms.html; nearest interpolation, black fill). It takes two steps:

1. The colours change in the uncropped image, because crop and flip only move pixels. But the mean that contrast needs
   is that of the crop, a weighted sum; and an extra pixel stands for the padding, which contrast turns from black.
2. Crop, flip and rotation are one look-up by index: every output pixel is a copy of one source pixel. A second extra
   pixel, black, stands for what the rotation brings in from outside.

The parameters live on the host, so that no step waits for the device, and a seed draws the same ones on any device.
"""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.data.geometry import LARGEST_SIDE

PaddingMode = Literal["constant", "reflect"]
# Weights of red, green and blue in a grey value, as in torchvision's `rgb_to_grayscale` (ITU-R BT.601, rounded).
GREY = (0.2989, 0.587, 0.114)
LARGEST = dict(
    padding=LARGEST_SIDE,
    flip=1,
    brightness=1000,
    contrast=1000,
    saturation=1000,
    hue=0.5,
    degrees=360,
)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(
    4
)  # in `Parameters.order`, as in torchvision's `ColorJitter`


@dataclass(frozen=True)
class Parameters:
    """What happens to each of B images; every tensor is on the CPU."""

    shift: Tensor  # int64 [B, 2], rows and columns by which the crop lies below and right of the source image
    flip: Tensor  # bool [B], whether the cropped image is mirrored left to right
    angle: (
        Tensor  # float32 [B], degrees by which the image turns counter-clockwise about its centre
    )
    factors: Tensor  # float32 [B, 3], factors >= 0 of brightness, contrast and saturation; 1 changes nothing
    hue: Tensor  # float32 [B], by how many turns the hue moves, in [-0.5, 0.5]; 0 changes nothing
    order: Tensor  # int64 [B, 4], rows of BRIGHTNESS, CONTRAST, SATURATION, HUE in the order they are applied

    def __getitem__(self, images: Tensor) -> "Parameters":
        return Parameters(
            **{field.name: getattr(self, field.name)[images] for field in fields(self)}
        )


@dataclass(frozen=True)
class Augment:
    """Random crop, flip, colour jitter and rotation of a batch, drawn for each image from torch's global CPU generator.

    A value of 0 switches an operation off exactly; with all at 0 the result is `images / 255`.

    Args:
        padding: pixels added on every side before a crop to the original size; the crop's place is uniform.
        flip: probability of a left-right flip, in [0, 1].
        brightness: the brightness factor is uniform in [max(0, 1 - brightness), 1 + brightness].
        contrast: the contrast factor is uniform in [max(0, 1 - contrast), 1 + contrast].
        saturation: the saturation factor is uniform in [max(0, 1 - saturation), 1 + saturation].
        hue: the hue moves by a fraction of the colour circle, uniform in [-hue, hue]; at most 0.5.
        degrees: the angle of rotation is uniform in [-degrees, degrees].
        padding_mode: what the padding is, "constant" for black or "reflect" for the image mirrored at its edge.

    Raises:
        UserError: a value is out of its range.
    """

    padding: int = 4
    flip: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.1
    degrees: float = 15.0
    padding_mode: PaddingMode = "constant"

    def __post_init__(self) -> None:
        if self.padding_mode not in ("constant", "reflect"):
            raise UserError(
                f"The augmentation's padding_mode is {self.padding_mode}; take constant or reflect."
            )
        for name, most in LARGEST.items():
            value, wanted = getattr(self, name), f"0 (off) to {most:g}"
            check(f"The augmentation's {name}", value, lambda x: 0 <= x <= most, wanted)  # noqa: B023 # called at once

    def __call__(self, images: Tensor) -> Tensor:
        """Augment each image with parameters of its own; images, result and errors are those of `augment`.

        Raises:
            UserError: an image is too small to be mirrored at its edge so far out.
        """
        if self.padding_mode == "reflect" and self.padding >= min(images.shape[-2:]):
            raise UserError(
                f"The augmentation's padding is {self.padding}, but images of {images.shape[-1]} x {images.shape[-2]} "
                f"pixels reflect at most {min(images.shape[-2:]) - 1}."
            )
        return augment(images, self.draw(len(images)), self.padding_mode)

    def draw(self, count: int) -> Parameters:
        """Draw the parameters of `count` images from torch's global CPU generator."""
        strengths = (self.brightness, self.contrast, self.saturation)
        factors = [
            torch.empty(count).uniform_(max(0.0, 1 - strength), 1 + strength)
            for strength in strengths
        ]
        return Parameters(
            shift=torch.randint(-self.padding, self.padding + 1, (count, 2)),
            flip=torch.rand(count) < self.flip,
            angle=torch.empty(count).uniform_(-self.degrees, self.degrees),
            factors=torch.stack(factors, 1),
            hue=torch.empty(count).uniform_(-self.hue, self.hue),
            order=torch.rand(count, 4).argsort(1),
        )


@torch.no_grad()
def augment(
    images: Tensor, parameters: Parameters, padding_mode: PaddingMode = "constant"
) -> Tensor:
    """Crop, flip, jitter and rotate each image by given parameters.

    Equal to torchvision's functional `crop`, `hflip`, `adjust_*` and `rotate` one after the other on float tensors, up
    to rounding: colours to about 1e-6, and either of two source pixels as near to a rotated pixel's centre.

    Args:
        images: uint8 in 0..255 or floating point in [0, 1], [B, 3, H, W], on any device; left as it is.
        parameters: of the B images.
        padding_mode: what a crop finds beyond the image, as torchvision's `pad` before `crop`.

    Returns:
        float32 [B, 3, H, W] in [0, 1], on the images' device.

    Raises:
        ValueError: the shape is not [B, 3, H, W] with H * W < 2**24, beyond which float32 has gaps.
    """
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] * images.shape[3] >= 2**24:
        raise ValueError(
            f"expected images of shape [B, 3, H, W] with H * W < 2**24, got {list(images.shape)}"
        )
    batch, _, height, width = images.shape
    size = height * width
    # Sorted by the place of hue in their order, images that share a step lie side by side: see `_jitter`.
    by_hue = parameters.order.argsort(1)[:, HUE].argsort(descending=True)
    parameters = parameters[by_hue]
    there, back = _upload(torch.stack((by_hue, by_hue.argsort())), images).unbind()
    # Colour by colour, so that what is done to one of them runs through memory in one piece.
    pixels = torch.zeros(3, batch, size + 2, device=images.device)
    scale = 1 if images.is_floating_point() else 255
    torch.div(
        images.index_select(0, there).flatten(2).transpose(0, 1), scale, out=pixels[:, :, :size]
    )
    _jitter(pixels, _crop_weights(images, parameters, padding_mode), parameters)
    pixels[:, :, -1] = 0
    moved = torch.empty(batch, 3, size, device=images.device)
    sources = _sources(images, parameters, padding_mode).view(batch, 1, size)
    torch.gather(pixels.transpose(0, 1), 2, sources.expand(-1, 3, -1), out=moved)
    return moved.index_select(0, back).view(batch, 3, height, width)


def _upload(tensor: Tensor, images: Tensor) -> Tensor:
    """To the images' device, without waiting for the work queued there."""
    return tensor.to(images.device, non_blocking=True)


def _sources(images: Tensor, parameters: Parameters, padding_mode: PaddingMode) -> Tensor:
    """Each output pixel's index in the flattened source image, int64 [B, H, W]; H * W is padding, H * W + 1 black."""
    height, width = images.shape[-2:]
    angle, mirror = parameters.angle.deg2rad(), 1 - 2 * parameters.flip.float()
    shift = parameters.shift.t().float()
    edge = torch.tensor([(height - 1) / 2, (width - 1) / 2])[:, None].expand_as(
        shift
    )  # also the image's middle
    # The inverse map, as in torchvision's `rotate`: where to read, given where to write, both from the image's middle.
    # Flip and shift are whole pixels about the same middle, so that to round after them is to round after the rotation.
    by_x = torch.stack((angle.sin(), mirror * angle.cos()))
    by_y = torch.stack((angle.cos(), -mirror * angle.sin()))
    maps = _upload(torch.stack((by_x, by_y, shift + edge, shift, edge)), images)[..., None, None]
    by_x, by_y, start, shift, edge = maps.unbind()  # each [2, B, 1, 1], for rows and for columns
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    position = (by_x * x + (by_y * y + start)).round_()

    if padding_mode == "reflect":  # folded at the edges, less than a row outside
        middle = position - edge
        inside = torch.copysign(edge - (middle.abs() - edge).abs(), middle).add_(edge)
        borders = [(edge + shift, height * width + 1)]
    else:
        inside = position
        borders = [(edge, height * width), (shift, height * width + 1)]
    source = (inside[0] * width).add_(inside[1])
    for shift_back, outside in borders:
        distance = position.sub_(shift_back).abs().sub_(edge).clamp_(0, 1).amax(0)
        source.lerp_(torch.full((), float(outside), device=images.device), distance)
    return source.int().long()  # the direct conversion is several times slower on a CPU


def _crop_weights(images: Tensor, parameters: Parameters, padding_mode: PaddingMode) -> Tensor:
    """Weights of the source's pixels, float32 [B, H * W], whose weighted sum is the mean over the crop."""
    height, width = images.shape[-2:]
    shifts = _upload(parameters.shift.t().contiguous(), images)[..., None]
    weights = []
    for shift, size in zip(shifts, (height, width), strict=True):
        edge = (size - 1) / 2
        place = torch.arange(size, device=images.device) - edge
        weight = 1 - (place - shift).abs_().sub_(edge).clamp_(
            0, 1
        )  # faster than a comparison on a CPU
        if (
            padding_mode == "reflect"
        ):  # a pixel may lie in the crop a second time, mirrored at either edge but its own
            for end in (-edge, edge):
                weight += (1 - (2 * end - place - shift).abs_().sub_(edge).clamp_(0, 1)) * (
                    place != end
                )
        weights.append(
            weight / size
        )  # padding counts but adds 0: it is black until contrast, which comes once
    rows, columns = weights
    return (rows[:, :, None] * columns[:, None]).flatten(1)


def _jitter(pixels: Tensor, weights: Tensor, parameters: Parameters) -> None:
    """Change brightness, contrast, saturation and hue in place, in each image's own order.

    Brightness, contrast and saturation are all of the form clamp(a * x + b * grey(x) + c * mean(grey(x))), so that
    their order is only a matter of coefficients in three steps. Hue comes before, between or after these. The images
    are sorted by its place, the last first: a step before hue changes the first few images only, one after it the rest.

    Args:
        pixels: float32 [3, B, N + 2] in [0, 1], the last two of each image black.
        weights: float32 [B, N], as of `_crop_weights`.
    """
    order = parameters.order
    places = order.argsort(1)[:, HUE]
    steps = order[order != HUE].view(-1, 3)
    a = parameters.factors.gather(1, steps)
    b = (1 - a) * (steps == SATURATION)
    c = (1 - a) * (steps == CONTRAST)
    coefficients = _upload(torch.stack((a, b, c)), pixels).unbind(2)
    before = [int((places > step).sum()) for step in range(3)]
    for count, values in zip(before, coefficients, strict=True):
        _mix(pixels[:, :count], weights[:count], values[:, :count, None])
    if (
        parameters.hue.any()
    ):  # the way to hues and back costs a last digit, even where they do not move
        _turn_hue(pixels, parameters.hue)
    for count, values in zip(before, coefficients, strict=True):
        _mix(pixels[:, count:], weights[count:], values[:, count:, None])


def _mix(pixels: Tensor, weights: Tensor, coefficients: Tensor) -> None:
    """Turn pixels into clamp(a * pixels + b * grey + c * mean grey) in place, with coefficients a, b, c [3, B, 1]."""
    a, b, c = coefficients
    red, green, blue = pixels
    grey = (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])
    mean = (grey[:, :-2] * weights).sum(1, keepdim=True)
    pixels.mul_(a).add_(grey.mul_(b).add_(c * mean)).clamp_(0, 1)


def _turn_hue(pixels: Tensor, turns: Tensor) -> None:
    """Move the hue in place, at constant value and chroma, as torchvision's `adjust_hue` does by way of HSV.

    On the hexagon of hues (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative), in sixths of a turn, a
    channel falls from the largest of the three values to the smallest between 1 and 2 from its own corner. So only the
    hue's sixths are needed: from red they are 1 + (green + blue - red - smallest) / chroma, towards green or blue.
    """
    corners = torch.tensor([0.0, 2.0, 4.0])
    # In [-3, 3], as is the hue, so that their sum is at most once around and `abs` is enough to find the distance.
    offsets = _upload((6 * turns - corners[:, None] + 3).remainder(6) - 3, pixels)
    red, green, blue = pixels
    largest, smallest = pixels.amax(0), pixels.amin(0)
    chroma = largest - smallest
    # The hue of a grey pixel is arbitrary, because it is multiplied by a chroma of 0, but it must not be NaN.
    divisor = chroma.clamp_min(torch.finfo(chroma.dtype).tiny)
    sixths = (green + blue).sub_(red).sub_(smallest).div_(divisor).add_(1).copysign_(green - blue)
    # 0 to 1 from the channel's corner (or 5 to 6, the other way round): 0; at 2 to 4: 1; in between: a ramp.
    fall = (sixths + offsets[..., None]).abs_().sub_(3).abs_().neg_().add_(2).clamp_(0, 1)
    torch.addcmul(largest, chroma, fall, value=-1, out=pixels)


def step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """A seed of 63 bits that differs for every seed, epoch, step of the epoch and rank."""
    return int(
        np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)[0]
        >> np.uint64(1)
    )
