"""How an image of any size becomes the network's input: the only place that knows.

    file -> upright, RGB -> resized to cover `size`, the centre cut out: uint8, once, by Pillow
         -> float in [0, 1] -> resized to `input_side` on the device -> normalised -> network

Training, evaluation, prediction and exported graphs all follow one `Geometry`, which is kept in the checkpoint.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import center_crop

from cifar_transfer.base.errors import UserError

Size = tuple[int, int]  # height and width in pixels

LARGEST_SIDE = 4000  # pixels that an image may be asked to be brought to
LARGEST_KEPT = 256  # pixels: up to this, images that share one size keep it
MIXED_SIDE = 224  # pixels: the largest square that other images become, unless a size is asked for
DEFAULT_SIDE = 32  # pixels, where nothing is known of the images
STATISTICS = {
    "cifar10": (
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
    ),  # the deviations that tutorials use
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Geometry:
    """What is done to an image on its way to the network; all resizing is bilinear and antialiased."""

    size: Size  # that images are decoded to: resized to cover it, and the centre cut out
    input_side: (
        int | None
    )  # pixels, of the square that the network takes, resized on the device; None: as decoded
    mean: Sequence[float]  # of R, G, B in [0, 1]
    std: Sequence[float]

    @classmethod
    def from_primitives(cls, stored: Mapping[str, Any]) -> "Geometry":
        """Return the geometry that a checkpoint stores as lists and numbers."""
        height, width = stored["size"]
        return cls(
            (height, width), stored["input_side"], tuple(stored["mean"]), tuple(stored["std"])
        )

    @property
    def input_size(self) -> Size:
        """Height and width in pixels of what the network takes."""
        return (self.input_side, self.input_side) if self.input_side else self.size

    def describe(self, inside: bool) -> dict[str, Any]:
        """What a program must do to an image for an exported network, in words and numbers.

        Args:
            inside: Whether the network itself resizes from `size` to `input_size` and normalises.
        """
        height, width = self.size
        side = (
            f"the shorter side to {height} pixels"
            if height == width
            else f"to cover {pixels(self.size)} pixels"
        )
        words = (
            f"Turn the image upright as its EXIF says, make it RGB, resize it ({side}; bilinear, antialiased), cut out "
            f"the centre, {pixels(self.size)} pixels, and divide by 255."
        )
        if not inside:
            if self.input_size != self.size:
                cut = "" if height == width else "Cut out the centre square. "
                words += (
                    f" {cut}Resize (bilinear, antialiased) to {pixels(self.input_size)} pixels."
                )
            words += " Subtract the mean of each channel and divide by its deviation."
        sizes = {
            "size": list(self.size),
            "input_size": list(self.size if inside else self.input_size),
        }
        method = {
            "crop": "centre",
            "interpolation": "bilinear",
            "antialias": True,
            "range": [0, 1],
            "channels": "RGB",
        }
        own = {} if inside else {"mean": list(self.mean), "std": list(self.std)}
        return {"preparation": words, "geometry": sizes | method, **own}


def choose_size(sizes: Sequence[Size], largest: int | None) -> Size:
    """The size that images are decoded to.

    A size that more than half of them share is kept, up to `LARGEST_KEPT`; others become squares of `MIXED_SIDE`, or
    smaller ones if they are smaller.

    Args:
        sizes: Of a sample of the training images.
        largest: Side in pixels of the largest square that the network will be given, or None if it takes images as
            they are. Images then become squares of this side, or of their own shorter side if they share a smaller
            one, and are enlarged on the device.
    """
    size, count = Counter(sizes).most_common(1)[0]
    shared = 2 * count > len(sizes)
    if largest is not None:
        side = min(largest, *size) if shared else largest
    elif shared and max(size) <= LARGEST_KEPT:
        return size
    else:
        side = min(MIXED_SIDE, sorted(map(min, sizes))[len(sizes) // 2])
    return side, side


def cover(image: Image.Image, size: Size) -> Image.Image:
    """An image resized to cover a size, and its centre: torchvision's `Resize` and `CenterCrop`, but for rounding."""
    if image.size == size[::-1]:
        return image
    # Only what is cut out is resized: the whole of an image of 1 x 60,000 pixels would become gigabytes.
    return ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)


def resize(images: Tensor, side: int | None) -> Tensor:
    """Float images [B, 3, H, W] as squares [B, 3, side, side]: of rectangles the centre.

    A `side` of None leaves them as they are.
    """
    height, width = images.shape[-2:]
    if side is None or height == width == side:
        return images
    if height != width:
        images = center_crop(images, [min(height, width)] * 2)
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


def to_float(images: Tensor) -> Tensor:
    """Uint8 images of any shape to float32 in [0, 1]."""
    return images.float().div_(255)


def pixels(size: Size) -> str:
    """A size for people, width first."""
    height, width = size
    return f"{width} x {height}"


def statistics(
    normalize: str | Sequence[Sequence[float]],
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the channels, by name or as given.

    Raises:
        UserError: An unknown name, not two triples, or a deviation that is not positive.
    """
    if isinstance(normalize, str):
        if normalize not in STATISTICS:
            known = ", ".join(STATISTICS)
            raise UserError(
                f"normalize={normalize!r} is unknown: take {known}, or [[mean], [deviation]]."
            )
        return STATISTICS[normalize]
    triples = len(normalize) == 2 and all(len(triple) == 3 for triple in normalize)
    if (
        not triples
        or not all(map(math.isfinite, [*normalize[0], *normalize[1]]))
        or min(normalize[1]) <= 0
    ):
        raise UserError(
            f"normalize={normalize} must be two triples, the means and the positive deviations of R, G, B."
        )
    return normalize[0], normalize[1]
