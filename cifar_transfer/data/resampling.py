"""Crops of any size, rotations and shifts of a batch as one sampling of each image.

The result is that of torchvision's operations (torchvision.transforms.v2), which work on one image
at a time, in this order::

    RandomResizedCrop((H, W), scale, ratio) -> RandomHorizontalFlip(flip)
    -> RandomAffine(degrees, translate)

Each of these samples the image anew, which blurs it each time. Here the places that they read are
computed first, and the image is sampled once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_transfer.data.geometry import Size

Interpolation = Literal["nearest", "bilinear"]
ATTEMPTS = 10  # rectangles drawn for an image, of which the first one that fits is taken
ERASED_SCALE = (0.02, 0.33)  # share of the image's area, as in torchvision's `RandomErasing`
ERASED_RATIO = (0.3, 3.3)  # of height to width


@dataclass(frozen=True)
class Placement:
    """Where each of B output images reads its source image; every tensor is on the CPU.

    Attributes:
        crop: Top, left, height and width in pixels of the rectangle that becomes the image, float32
            [B, 4].
        flip: Whether the cropped image is mirrored left to right, bool [B].
        angle: Degrees by which the image then turns counter-clockwise about its centre, float32
            [B].
        translate: Shares of height and width by which it then moves down and right, float32 [B, 2].
    """

    crop: Tensor
    flip: Tensor
    angle: Tensor
    translate: Tensor

    def __getitem__(self, rows: Tensor) -> "Placement":
        selected = {field.name: getattr(self, field.name)[rows] for field in fields(self)}
        return Placement(**selected)


def draw_crops(count: int, size: Size, scale: Sequence[float], ratio: Sequence[float]) -> Tensor:
    """Draw rectangles within an image as torchvision's `RandomResizedCrop` does.

    Args:
        count: Number of rectangles.
        size: Height and width of the image in pixels.
        scale: Bounds of the rectangle's share of the image's area, which is uniform.
        ratio: Bounds of the ratio of width to height, whose logarithm is uniform.

    Returns:
        Top, left, height and width in whole pixels, float32 [count, 4]. Where no attempt fits into
        the image, the largest rectangle in its middle whose ratio is allowed.
    """
    height, width = size
    sides, fits = _draw_sides(count, size, scale, ratio)
    fits &= (sides[0] <= height) & (sides[1] <= width)
    drawn, any_fits = _first(sides, fits)
    middle_height = float(height)
    middle_width = float(width)
    if width / height < ratio[0]:
        middle_height = float(round(width / ratio[0]))
    elif width / height > ratio[1]:
        middle_width = float(round(height * ratio[1]))
    middle = torch.tensor([middle_height, middle_width])
    start = _draw_start(drawn, size)
    middle_start = ((torch.tensor([height, width]) - middle) / 2).floor()
    drawn_crop = torch.cat((start, drawn), 1)
    middle_crop = torch.cat((middle_start, middle)).expand(count, 4)
    return torch.where(any_fits[:, None], drawn_crop, middle_crop)


def draw_erased(count: int, size: Size, probability: float) -> Tensor:
    """Draw the rectangles that torchvision's `RandomErasing` would erase.

    Args:
        count: Number of images.
        size: Their height and width in pixels.
        probability: Share of images of which something is erased.

    Returns:
        Top, left, height and width in whole pixels, float32 [count, 4]; height and width are 0
        where nothing is erased.
    """
    height, width = size
    inverse_ratio = (1 / ERASED_RATIO[1], 1 / ERASED_RATIO[0])  # of width to height
    sides, fits = _draw_sides(count, size, ERASED_SCALE, inverse_ratio)
    fits &= (sides[0] < height) & (sides[1] < width)
    drawn, any_fits = _first(sides, fits)
    start = _draw_start(drawn, size)
    erases = any_fits & (torch.rand(count) < probability)
    return torch.cat((start, drawn), 1) * erases[:, None]


def _draw_sides(
    count: int, size: Size, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Draw heights and widths of rectangles.

    Returns:
        Whole numbers, float32 [2, count, ATTEMPTS], and which rectangles are not empty, bool
        [count, ATTEMPTS].
    """
    height, width = size
    areas = height * width * torch.empty(count, ATTEMPTS).uniform_(*scale)
    lowest, highest = (math.log(bound) for bound in ratio)
    ratios = torch.empty(count, ATTEMPTS).uniform_(lowest, highest).exp()
    sides = torch.stack(((areas / ratios).sqrt().round(), (areas * ratios).sqrt().round()))
    return sides, (sides > 0).all(0)


def _draw_start(sides: Tensor, size: Size) -> Tensor:
    """Draw where rectangles lie in images of a size.

    Args:
        sides: Heights and widths in whole pixels, float32 [B, 2].
        size: Height and width of the images in pixels.

    Returns:
        Top and left in whole pixels, float32 [B, 2].
    """
    room = torch.tensor(size, dtype=torch.float32) - sides
    return (torch.rand(len(sides), 2) * (room + 1)).floor().minimum(room)


def _first(sides: Tensor, fits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first rectangle of each image that fits, float32 [B, 2], and whether one does."""
    attempt = fits.int().argmax(1)
    chosen = sides[:, torch.arange(len(attempt)), attempt].T
    any_fits = fits.any(1)
    return chosen * any_fits[:, None], any_fits


def resample(
    images: Tensor, placement: Placement, size: Size, interpolation: Interpolation
) -> Tensor:
    """Crop, flip, turn and shift each image in one sampling.

    Args:
        images: Floating point [B, 3, H, W], on any device.
        placement: Where each image is read; crops lie within the images.
        size: Height and width of the result in pixels, not smaller than the crops: nothing is
            antialiased.
        interpolation: "bilinear" or "nearest".

    Returns:
        [B, 3, *size] on the images' device; black where the turned and shifted image does not
        reach.
    """
    height, width = size
    count = len(images)
    sides = np.array(size, dtype=np.float32)
    moves = np.rint(placement.translate.numpy() * sides)  # whole pixels, as torchvision's
    places = places_before(placement.flip, placement.angle, moves, size, images.device)
    scale, centre, limit = upload(_crop_maps(placement, images), images.device).unbind()
    # What lies between the middle of the crop's outermost pixels and its edge is as these pixels.
    grid = places.maximum(-limit).minimum(limit).mul_(scale).add_(centre)
    result = F.grid_sample(
        images.contiguous(),
        grid.view(2, count, height, width).permute(1, 2, 3, 0),
        mode=interpolation,
        padding_mode="border",
        align_corners=False,
    )
    if placement.angle.any() or moves.any():
        result.mul_(_coverage(places, size, interpolation).view(count, 1, height, width))
    return result


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, without waiting for the work queued there."""
    return tensor.to(device, non_blocking=True)


def places_before(
    flip: Tensor, angle: Tensor, moves: np.ndarray, size: Size, device: torch.device
) -> Tensor:
    """Return where the pixels of images were before these were flipped, then turned, then moved.

    It is the inverse of torchvision's `affine`, and then of `hflip`.

    Args:
        flip: Whether each image was mirrored left to right, bool [B], on the CPU.
        angle: Degrees by which it turned counter-clockwise about its centre, float32 [B], on the
            CPU.
        moves: Pixels by which it moved down and right, float32 [B, 2].
        size: Height and width of the images in pixels.
        device: Device of the result.

    Returns:
        x and y from -1 to 1 for the left and right or upper and lower edge, float32
        [2, B, H * W].
    """
    height, width = size
    # NumPy takes a fraction of the time of torch for so few numbers.
    radians = np.deg2rad(angle.numpy())
    mirror = np.where(flip.numpy(), np.float32(-1), np.float32(1))
    x_unit = mirror * 2 / width
    y_unit = np.float32(2 / height)
    cos = np.cos(radians)
    sin = np.sin(radians)
    maps = np.array([[cos * x_unit, sin * y_unit], [-sin * x_unit, cos * y_unit]])
    by_x, by_y = upload(torch.from_numpy(maps)[..., None], device).unbind()
    x, y = _pixels_from_middle(height, width, device)
    places = (x * by_x).addcmul_(y, by_y)
    if moves.any():
        down, right = moves.T
        start = torch.from_numpy(maps[0] * right + maps[1] * down)
        places.sub_(upload(start[..., None], device))
    return places


@lru_cache(maxsize=8)
def _pixels_from_middle(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return x and y of an image's pixels from its middle, in pixels, float32 [H * W] each."""
    x = torch.arange(width, device=device) - (width - 1) / 2
    y = torch.arange(height, device=device) - (height - 1) / 2
    return x.repeat(height), y.repeat_interleave(width)


def _crop_maps(placement: Placement, images: Tensor) -> Tensor:
    """Return what brings a place in the cropped image to one in its source, float32 [3, 2, B, 1].

    These are factors and then offsets of x and y, all from -1 to 1, and last the largest x and y
    that a place may have before.
    """
    height, width = images.shape[-2:]
    top, left, crop_height, crop_width = placement.crop.numpy().T
    scale = [crop_width / width, crop_height / height]
    centre = [(2 * left + crop_width) / width - 1, (2 * top + crop_height) / height - 1]
    limit = [1 - 1 / crop_width, 1 - 1 / crop_height]
    return torch.from_numpy(np.array([scale, centre, limit]))[..., None]


def _coverage(places: Tensor, size: Size, interpolation: Interpolation) -> Tensor:
    """Return how much of each output pixel the cropped image covers, in [0, 1], [B, H * W].

    Args:
        places: Places in the cropped image, [2, B, H * W], x and y from -1 to 1.
        size: Height and width of the output in pixels.
        interpolation: With "bilinear", black and image mix over a pixel at the edge.
    """
    height, width = size
    half = torch.tensor([width / 2, height / 2]).view(2, 1, 1)
    # Pixels to the nearest edge, plus one half: 0.5 on the edge itself.
    covered = (1 - places.abs()).mul_(upload(half, places.device)).add_(0.5)
    if interpolation == "nearest":
        covered = (covered >= 0.5).to(places.dtype)
    across, down = covered.clamp_(0, 1).unbind()
    return across * down


def erase(images: Tensor, boxes: Tensor) -> None:
    """Make rectangles of images black, in place.

    Args:
        images: Floating point [B, 3, H, W], on any device.
        boxes: Top, left, height and width of a rectangle of each, float32 [B, 4], on the CPU.
    """
    height, width = images.shape[-2:]
    device = images.device
    top, left, box_height, box_width = upload(boxes.T.contiguous(), device)[..., None].unbind(0)
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    in_rows = (rows >= top) & (rows < top + box_height)
    in_columns = (columns >= left) & (columns < left + box_width)
    erased = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    images.masked_fill_(erased, 0)
