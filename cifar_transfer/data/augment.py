"""Training augmentation of a whole batch at once, on its own device, drawn for each image.

The result is distributed as that of torchvision's pipeline, which works on one image at a time::

    RandomCrop((H, W), padding, padding_mode) -> RandomHorizontalFlip(flip)
    -> ColorJitter(brightness, contrast, saturation, hue) -> RandomRotation(degrees)

(https://docs.pytorch.org/vision/stable/transforms.html; nearest interpolation, black fill). This is
for images of few pixels. It takes two steps:

1. The colours change in the uncropped image, because crop and flip only move pixels. But the mean
   that contrast needs is that of the crop, a weighted sum; and an extra pixel stands for the
   padding, which contrast turns from black.
2. Crop, flip and rotation are one look-up by index: every output pixel is a copy of one source
   pixel. A second extra pixel, black, stands for what the rotation brings in from outside.

Photographs are sampled with interpolation instead, see `resampling`, and colours come after that.
Random erasing is the last step of both.

The parameters live on the host, so that no step waits for the device, and a seed draws the same
ones on any device.
"""

from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.data.geometry import LARGEST_SIDE, Size
from cifar_transfer.data.resampling import (
    Interpolation,
    Placement,
    draw_crops,
    draw_erased,
    erase,
    resample,
    upload,
)

PaddingMode = Literal["constant", "reflect"]
# Weights of red, green and blue in a grey value, as in torchvision's `rgb_to_grayscale` (ITU-R
# BT.601, rounded).
GREY = (0.2989, 0.587, 0.114)
MAX_STRENGTHS = {
    "padding": LARGEST_SIDE,
    "flip": 1,
    "brightness": 1000,
    "contrast": 1000,
    "saturation": 1000,
    "hue": 0.5,
    "degrees": 360,
    "translate": 1,
    "erase": 1,
}
MAX_RATIO = 100  # of width to height of a crop
MAX_PIXELS = 2**24  # of an image, beyond which float32, in which places are computed, has gaps

# Operations in `Parameters.order`, numbered as in torchvision's `ColorJitter`.
BRIGHTNESS = 0
CONTRAST = 1
SATURATION = 2
HUE = 3


@dataclass(frozen=True)
class Parameters:
    """What happens to each of B images; every tensor is on the CPU.

    Attributes:
        shift: Rows and columns by which the crop lies below and right of the image, int64 [B, 2].
        flip: Whether the cropped image is mirrored left to right, bool [B].
        angle: Degrees by which the image turns counter-clockwise about its centre, float32 [B].
        factors: Factors >= 0 of brightness, contrast and saturation, float32 [B, 3]; 1 changes
            nothing.
        hue: Turns of the colour circle by which the hue moves, in [-0.5, 0.5], float32 [B]; 0
            changes nothing.
        order: `BRIGHTNESS`, `CONTRAST`, `SATURATION` and `HUE` in the order in which they are
            applied, int64 [B, 4].
    """

    shift: Tensor
    flip: Tensor
    angle: Tensor
    factors: Tensor
    hue: Tensor
    order: Tensor

    def __getitem__(self, rows: Tensor) -> "Parameters":
        selected = {item.name: getattr(self, item.name)[rows] for item in fields(self)}
        return Parameters(**selected)

    @property
    def changes_colours(self) -> bool:
        """Whether any image gets other colours."""
        return bool((self.factors != 1).any() or self.hue.any())


@dataclass(frozen=True)
class Augmentation:
    """Random crop, flip, colours, rotation and erasing of a batch, drawn for each image.

    The parameters are drawn from torch's global CPU generator. A value of 0 switches an operation
    off exactly; with all at 0 the result is `images / 255`. The options are those of `Augment`,
    which explains them; here each has a value. The defaults are for small images.

    Raises:
        UserError: A value is out of its range.
    """

    padding: int = 4
    flip: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.1
    degrees: float = 15.0
    padding_mode: PaddingMode = "constant"
    crop_scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333])
    translate: float = 0.0
    erase: float = 0.0
    interpolation: Interpolation = "nearest"

    def __post_init__(self) -> None:
        for option in fields(self):
            value = as_primitive(f"The augmentation's {option.name}", getattr(self, option.name))
            object.__setattr__(self, option.name, value)  # the way of a frozen dataclass
        if self.padding_mode not in ("constant", "reflect"):
            raise UserError(
                f"The augmentation's padding_mode is {self.padding_mode}; take constant or reflect."
            )
        for name, strongest in MAX_STRENGTHS.items():
            check(
                f"The augmentation's {name}",
                getattr(self, name),
                lambda value: 0 <= value <= strongest,  # noqa: B023 # called at once
                f"0 (off) to {strongest:g}",
            )
        if self.interpolation not in ("nearest", "bilinear"):
            raise UserError(
                f"The augmentation's interpolation is {self.interpolation}; take nearest or "
                f"bilinear."
            )
        check(
            "The augmentation's crop_scale",
            self.crop_scale,
            lambda bounds: _are_bounds(bounds, highest=1),
            "two shares of the image's area, such as [0.35, 1]",
        )
        check(
            "The augmentation's crop_ratio",
            self.crop_ratio,
            lambda bounds: _are_bounds(bounds, highest=MAX_RATIO),
            "two ratios of width to height, such as [0.75, 1.33]",
        )

    @property
    def crops_parts(self) -> bool:
        """Whether a part of each image is cut out and enlarged, as `crop_scale` says."""
        return self.crop_scale[0] < 1

    def __call__(self, images: Tensor, size: Size | None = None) -> Tensor:
        """Augment each image with parameters of its own; see `augment`.

        Args:
            images: uint8 in 0..255 or floating point in [0, 1], [B, 3, H, W], on any device; they
                are not changed.
            size: Height and width in pixels of the result if `crop_scale` cuts parts out. None:
                those of the images. It is at most a little smaller than they are, because nothing
                is antialiased.

        Returns:
            float32 [B, 3, *size] in [0, 1], on the images' device.

        Raises:
            UserError: An image is too small to be mirrored at its edge so far out.
        """
        if self.padding_mode == "reflect" and not self.crops_parts:
            self._check_padding(images)
        parameters = self.draw(len(images))
        if self._samples:
            augmented = self._sample(images, parameters, size)
        else:
            augmented = augment(images, parameters, self.padding_mode)
        if self.erase:
            height, width = augmented.shape[-2:]
            erase(augmented, draw_erased(len(images), (height, width), self.erase))
        return augmented

    @property
    def _samples(self) -> bool:
        """Whether images are sampled anew, not only looked up pixel by pixel."""
        is_asked_for = self.interpolation == "bilinear" and self.degrees > 0
        return is_asked_for or self.crops_parts or self.translate > 0

    def _sample(self, images: Tensor, parameters: Parameters, size: Size | None) -> Tensor:
        height, width = images.shape[-2:]
        count = len(images)
        if self.crops_parts:
            crop = draw_crops(count, (height, width), self.crop_scale, self.crop_ratio)
            size = size or (height, width)
        else:
            size = (height, width)
            images = _padded(images, self.padding, self.padding_mode)
            sides = torch.tensor([height, width]).expand(count, 2)
            crop = torch.cat((parameters.shift + self.padding, sides), 1).float()
        placement = Placement(
            crop=crop,
            flip=parameters.flip,
            angle=parameters.angle,
            translate=torch.empty(count, 2).uniform_(-self.translate, self.translate),
        )
        return augment_sampled(images, parameters, placement, size, self.interpolation)

    def _check_padding(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        max_padding = min(height, width) - 1
        if self.padding > max_padding:
            raise UserError(
                f"The augmentation's padding is {self.padding}, but images of {width} x {height} "
                f"pixels reflect at most {max_padding}."
            )

    def draw(self, count: int) -> Parameters:
        """Draw the parameters of `count` images from torch's global CPU generator."""
        # The order of the draws decides what a seed gives.
        factors = []
        for strength in (self.brightness, self.contrast, self.saturation):
            factor = torch.empty(count).uniform_(max(0.0, 1 - strength), 1 + strength)
            factors.append(factor)
        return Parameters(
            shift=torch.randint(-self.padding, self.padding + 1, (count, 2)),
            flip=torch.rand(count) < self.flip,
            angle=torch.empty(count).uniform_(-self.degrees, self.degrees),
            factors=torch.stack(factors, 1),
            hue=torch.empty(count).uniform_(-self.hue, self.hue),
            order=torch.rand(count, 4).argsort(1),
        )


def _are_bounds(bounds: list[float], highest: float) -> bool:
    return len(bounds) == 2 and 0 < bounds[0] <= bounds[1] <= highest


PRESETS: dict[str, Augmentation] = {
    "cifar": Augmentation(),
    # The crop is fastai's; timm's and torchvision's for ImageNet, from 0.08, is for longer runs.
    "photos": Augmentation(
        padding=0,
        hue=0.0,
        degrees=0.0,
        crop_scale=[0.35, 1.0],
        interpolation="bilinear",
    ),
    "none": Augmentation(
        padding=0,
        flip=0.0,
        brightness=0.0,
        contrast=0.0,
        saturation=0.0,
        hue=0.0,
        degrees=0.0,
    ),
}


def _padded(images: Tensor, padding: int, padding_mode: PaddingMode) -> Tensor:
    """Return images with `padding` more pixels on every side."""
    if padding == 0:
        return images
    if padding_mode == "reflect" and not images.is_floating_point():
        return F.pad(images.float(), [padding] * 4, padding_mode).to(images.dtype)
    return F.pad(images, [padding] * 4, padding_mode)


@torch.no_grad()
def augment_sampled(
    images: Tensor,
    parameters: Parameters,
    placement: Placement,
    size: Size,
    interpolation: Interpolation,
) -> Tensor:
    """Crop, flip, turn and shift each image in one sampling, and then change its colours.

    Args:
        images: uint8 in 0..255 or floating point in [0, 1], [B, 3, H, W], on any device; they are
            not changed.
        parameters: Parameters of the B images, of which only those of colours are used.
        placement: Where each image is read.
        size: Height and width of the result in pixels.
        interpolation: "bilinear" or "nearest".

    Returns:
        float32 [B, 3, *size] in [0, 1], on the images' device.
    """
    if not images.is_floating_point():
        images = images.float().div_(255)
    if not parameters.changes_colours:
        return resample(images, placement, size, interpolation)
    by_hue, sorting, unsorting = _order_by_hue(parameters, images)
    moved = resample(images.index_select(0, sorting), placement[by_hue], size, interpolation)
    pixels = moved.flatten(2).transpose(0, 1)
    count = pixels.shape[2]
    weights = torch.full((1, count), 1 / count, device=images.device).expand(len(images), count)
    _jitter(pixels, weights, parameters[by_hue])
    return moved.index_select(0, unsorting)


def _order_by_hue(parameters: Parameters, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how images are sorted for `_jitter`, by the place of hue in their order.

    Returns:
        Rows on the CPU, the same on the device of the images, and there also the rows that bring
        them back; int64 [B].
    """
    by_hue = parameters.order.argsort(1)[:, HUE].argsort(descending=True)
    sorting, unsorting = upload(torch.stack((by_hue, by_hue.argsort())), images).unbind()
    return by_hue, sorting, unsorting


@torch.no_grad()
def augment(
    images: Tensor, parameters: Parameters, padding_mode: PaddingMode = "constant"
) -> Tensor:
    """Crop, flip, jitter and rotate each image by given parameters.

    Equal to torchvision's functional `crop`, `hflip`, `adjust_*` and `rotate` one after the other
    on float tensors, up to rounding: colours to about 1e-6, and either of two source pixels as near
    to a rotated pixel's centre.

    Args:
        images: uint8 in 0..255 or floating point in [0, 1], [B, 3, H, W], on any device; they are
            not changed.
        parameters: Parameters of the B images.
        padding_mode: What a crop finds beyond the image, as torchvision's `pad` before `crop`.

    Returns:
        float32 [B, 3, H, W] in [0, 1], on the images' device.

    Raises:
        ValueError: The shape is not [B, 3, H, W] with H * W < 2**24.
    """
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2:].numel() >= MAX_PIXELS:
        raise ValueError(
            f"expected images of shape [B, 3, H, W] with H * W < 2**24, got {list(images.shape)}"
        )
    batch, _, height, width = images.shape
    size = height * width
    # Sorted by the place of hue in their order, images that share a step lie side by side, which
    # `_jitter` needs.
    by_hue, sorting, unsorting = _order_by_hue(parameters, images)
    parameters = parameters[by_hue]

    # Colour by colour, so that what is done to one of them runs through memory in one piece.
    pixels = torch.zeros(3, batch, size + 2, device=images.device)
    sorted_images = images.index_select(0, sorting).flatten(2).transpose(0, 1)
    largest_value = 1 if images.is_floating_point() else 255
    torch.div(sorted_images, largest_value, out=pixels[:, :, :size])
    if parameters.changes_colours:
        _jitter(pixels, _crop_weights(images, parameters, padding_mode), parameters)
        pixels[:, :, -1] = 0

    moved = torch.empty(batch, 3, size, device=images.device)
    sources = _sources(images, parameters, padding_mode).view(batch, 1, size)
    torch.gather(pixels.transpose(0, 1), 2, sources.expand(-1, 3, -1), out=moved)
    return moved.index_select(0, unsorting).view(batch, 3, height, width)


def _sources(images: Tensor, parameters: Parameters, padding_mode: PaddingMode) -> Tensor:
    """Return each output pixel's index in the flattened source image, int64 [B, H, W].

    Index H * W is the padding, and H * W + 1 is black.
    """
    height, width = images.shape[-2:]
    angle = parameters.angle.deg2rad()
    mirror = 1 - 2 * parameters.flip.float()
    shift = parameters.shift.t().float()
    # Distance of the outermost pixels from the image's middle, and so also the middle's place.
    edge = torch.tensor([(height - 1) / 2, (width - 1) / 2])[:, None].expand_as(shift)
    # The inverse map, as in torchvision's `rotate`: where to read, given where to write, both from
    # the image's middle. Flip and shift are whole pixels about the same middle, so that to round
    # after them is to round after the rotation.
    by_x = torch.stack((angle.sin(), mirror * angle.cos()))
    by_y = torch.stack((angle.cos(), -mirror * angle.sin()))
    maps = upload(torch.stack((by_x, by_y, shift + edge, shift, edge)), images)[..., None, None]
    by_x, by_y, start, shift, edge = maps.unbind()  # each [2, B, 1, 1], for rows and for columns
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    position = (by_x * x + (by_y * y + start)).round_()

    padding = height * width
    black = padding + 1
    if padding_mode == "reflect":  # folded at the edges, less than a row outside
        middle = position - edge
        inside = torch.copysign(edge - (middle.abs() - edge).abs(), middle).add_(edge)
        borders = [(edge + shift, black)]
    else:
        inside = position
        borders = [(edge, padding), (shift, black)]
    source = (inside[0] * width).add_(inside[1])
    for centre, outside in borders:
        distance = position.sub_(centre).abs().sub_(edge).clamp_(0, 1).amax(0)
        source.lerp_(torch.full((), float(outside), device=images.device), distance)
    return source.int().long()  # the direct conversion is several times slower on a CPU


def _crop_weights(images: Tensor, parameters: Parameters, padding_mode: PaddingMode) -> Tensor:
    """Return the weights of the source's pixels in the mean over the crop, float32 [B, H * W].

    The padding counts but adds 0: it is black until contrast, which comes once.
    """
    height, width = images.shape[-2:]
    shifts = upload(parameters.shift.t().contiguous(), images)[..., None]
    weights = []
    for shift, size in zip(shifts, (height, width), strict=True):
        edge = (size - 1) / 2
        place = torch.arange(size, device=images.device) - edge
        # Faster than a comparison on a CPU.
        weight = 1 - (place - shift).abs_().sub_(edge).clamp_(0, 1)
        if padding_mode == "reflect":
            # A pixel may lie in the crop a second time, mirrored at either edge but its own.
            for end in (-edge, edge):
                mirrored = 1 - (2 * end - place - shift).abs_().sub_(edge).clamp_(0, 1)
                weight += mirrored * (place != end)
        weights.append(weight / size)
    rows, columns = weights
    return (rows[:, :, None] * columns[:, None]).flatten(1)


def _jitter(pixels: Tensor, weights: Tensor, parameters: Parameters) -> None:
    """Change brightness, contrast, saturation and hue in place, in each image's own order.

    Brightness, contrast and saturation are all of the form
    clamp(a * x + b * grey(x) + c * mean(grey(x))), so that their order is only a matter of
    coefficients in three steps. Hue comes before, between or after these. The images are sorted by
    its place, the last first: a step before hue changes the first few images only, one after it the
    rest.

    Args:
        pixels: float32 [3, B, M] in [0, 1].
        weights: Weights of the first N pixels in the mean of an image, float32 [B, N], N <= M.
        parameters: Parameters of the B images.
    """
    order = parameters.order
    places = order.argsort(1)[:, HUE]
    operations = order[order != HUE].view(-1, 3)
    a = parameters.factors.gather(1, operations)
    b = (1 - a) * (operations == SATURATION)
    c = (1 - a) * (operations == CONTRAST)
    coefficients = upload(torch.stack((a, b, c)), pixels).unbind(2)
    counts_before_hue = [int((places > step).sum()) for step in range(3)]
    for count, values in zip(counts_before_hue, coefficients, strict=True):
        _mix(pixels[:, :count], weights[:count], values[:, :count, None])
    # The way to hues and back costs a last digit, even where they do not move.
    if parameters.hue.any():
        _turn_hue(pixels, parameters.hue)
    for count, values in zip(counts_before_hue, coefficients, strict=True):
        _mix(pixels[:, count:], weights[count:], values[:, count:, None])


def _mix(pixels: Tensor, weights: Tensor, coefficients: Tensor) -> None:
    """Turn pixels into clamp(a * pixels + b * grey + c * mean grey) in place.

    Args:
        pixels: float32 [3, B, M].
        weights: Weights of the first N pixels in the mean, float32 [B, N].
        coefficients: a, b and c, float32 [3, B, 1].
    """
    a, b, c = coefficients
    red, green, blue = pixels
    grey = (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])
    mean = (grey[:, : weights.shape[1]] * weights).sum(1, keepdim=True)
    pixels.mul_(a).add_(grey.mul_(b).add_(c * mean)).clamp_(0, 1)


def _turn_hue(pixels: Tensor, turns: Tensor) -> None:
    """Move the hue in place, at constant value and chroma, as torchvision's `adjust_hue` does.

    On the hexagon of hues (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative), in
    sixths of a turn, a channel falls from the largest of the three values to the smallest between 1
    and 2 from its own corner. So only the hue's sixths are needed: from red they are
    1 + (green + blue - red - smallest) / chroma, towards green or blue.

    Args:
        pixels: float32 [3, B, N].
        turns: Turns of the colour circle, float32 [B].
    """
    corners = torch.tensor([0.0, 2.0, 4.0])
    # In [-3, 3], as is the hue, so that their sum is at most once around and `abs` is enough to
    # find the distance.
    offsets = upload((6 * turns - corners[:, None] + 3).remainder(6) - 3, pixels)
    red, green, blue = pixels
    largest = pixels.amax(0)
    smallest = pixels.amin(0)
    chroma = largest - smallest
    # The hue of a grey pixel is arbitrary, because it is multiplied by a chroma of 0, but it must
    # not be NaN.
    divisor = chroma.clamp_min(torch.finfo(chroma.dtype).tiny)
    sixths = (green + blue).sub_(red).sub_(smallest).div_(divisor).add_(1).copysign_(green - blue)
    # 0 to 1 from the channel's corner (or 5 to 6, the other way round): 0; at 2 to 4: 1; in
    # between: a ramp.
    fall = (sixths + offsets[..., None]).abs_().sub_(3).abs_().neg_().add_(2).clamp_(0, 1)
    torch.addcmul(largest, chroma, fall, value=-1, out=pixels)


def step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Return a seed of 63 bits that differs for every seed, epoch, step of the epoch and rank."""
    (state,) = np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)
    return int(state >> np.uint64(1))
