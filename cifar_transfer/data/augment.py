"""Training augmentation of a whole batch at once, on its own device, drawn for each image.

The result is distributed as that of torchvision's pipeline, which works on one image at a time::

    RandomCrop((H, W), padding, padding_mode) -> RandomHorizontalFlip(flip)
    -> ColorJitter(brightness, contrast, saturation, hue) -> RandomRotation(degrees)

(https://docs.pytorch.org/vision/stable/transforms.html; nearest interpolation, black fill). This is
for images of few pixels: the crop is copied, its colours change, see `colours`, and flip and
rotation are one look-up, in which every pixel of the result is a copy of one pixel.

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
from cifar_transfer.data.colours import jitter, sort_by_hue
from cifar_transfer.data.geometry import LARGEST_SIDE, Size
from cifar_transfer.data.resampling import (
    Interpolation,
    Placement,
    draw_crops,
    draw_erased,
    erase,
    places_before,
    resample,
    upload,
)

PaddingMode = Literal["constant", "reflect"]
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
        order: Operations, numbered as in `colours`, in the order in which they are applied, int64
            [B, 4].
    """

    shift: Tensor
    flip: Tensor
    angle: Tensor
    factors: Tensor
    hue: Tensor
    order: Tensor

    def __getitem__(self, rows: Tensor) -> "Parameters":
        selected = {}
        for item in fields(self):
            # NumPy takes a fraction of the time of torch for so few numbers.
            selected[item.name] = torch.from_numpy(getattr(self, item.name).numpy()[rows.numpy()])
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
        """Return the images cropped or padded, and then as `augment_sampled` leaves them.

        Args:
            images: As in `__call__`.
            parameters: Parameters of the B images.
            size: Height and width in pixels that parts are enlarged to; None: those of the images.
        """
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
    if not parameters.hue.any():  # in any order
        moved = resample(images, placement, size, interpolation)
        _jitter(moved.transpose(0, 1), parameters)
        return moved
    rows = sort_by_hue(parameters.order)
    sorted_images = images.index_select(0, upload(rows, images.device))
    moved = resample(sorted_images, placement[rows], size, interpolation)
    _jitter(moved.transpose(0, 1), parameters[rows])
    return moved.index_select(0, upload(rows.argsort(), images.device))


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
        ValueError: The shape is not [B, 3, H, W].
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images of shape [B, 3, H, W], got {list(images.shape)}")
    count, _, height, width = images.shape
    if not count:
        return images.float()
    rows = sort_by_hue(parameters.order)
    parameters = parameters[rows]
    crops = _crop(images, rows, parameters.shift, padding_mode)
    # Colour by colour, so that what is done to one of them runs through memory in one piece.
    planes = torch.empty(3, count, height, width, device=images.device)
    planes.copy_(crops.transpose(0, 1))
    if not images.is_floating_point():
        planes.div_(255)
    if parameters.changes_colours:
        _jitter(planes, parameters)
    grid = places_before(
        parameters.flip, parameters.angle, np.zeros((count, 2)), (height, width), images.device
    )
    turned = F.grid_sample(
        planes.transpose(0, 1),
        grid.view(2, count, height, width).permute(1, 2, 3, 0),
        mode="nearest",
        padding_mode="zeros",
        align_corners=False,
    )
    return turned.index_select(0, upload(rows.argsort(), images.device))


def _jitter(planes: Tensor, parameters: Parameters) -> None:
    """Change the colours of [3, B, H, W] in place, sorted as `jitter` needs it."""
    jitter(planes.flatten(2), parameters.factors, parameters.hue, parameters.order)


def _crop(images: Tensor, rows: Tensor, shift: Tensor, padding_mode: PaddingMode) -> Tensor:
    """Return crops of images, each as large as they are.

    Args:
        images: [B, 3, H, W], on any device.
        rows: Image of each crop, int64 [B], on the CPU.
        shift: Rows and columns by which each crop lies below and right of its image, int64 [B, 2],
            on the CPU.
        padding_mode: What lies beyond the images.

    Returns:
        A view [B, 3, H, W], which is not contiguous, of the images' dtype.
    """
    height, width = images.shape[-2:]
    shifts = shift.numpy()
    padding = int(np.abs(shifts).max(initial=0))
    padded = _padded(images, padding, padding_mode)
    padded_height, padded_width = padded.shape[-2:]
    plane = padded_height * padded_width
    places = (shifts + padding) @ np.array([padded_width, 1])
    starts = upload(torch.from_numpy(rows.numpy() * 3 * plane + places), images.device)
    # All that lies in memory between the first and the last pixel of a crop.
    length = 2 * plane + (height - 1) * padded_width + width
    pixels = padded.flatten()
    if images.device.type == "cpu":
        # By far the fastest, but a device may copy the overlapping pieces before it selects some.
        pieces = pixels.unfold(0, length, 1).index_select(0, starts)
    else:
        pieces = pixels[starts[:, None] + torch.arange(length, device=images.device)]
    return pieces.as_strided((len(rows), 3, height, width), (length, plane, padded_width, 1))


def step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Return a seed of 63 bits that differs for every seed, epoch, step of the epoch and rank."""
    (state,) = np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)
    return int(state >> np.uint64(1))
