"""The way of an image of any size into the network. No other module knows it.

    file -> upright, RGB -> brought to `size` (mostly its centre): uint8, once, by Pillow
         -> float in [0, 1] -> resized to `input_side` on the device -> normalised -> network

Training, evaluation, prediction and exported graphs all follow one `Geometry`, which the checkpoint
stores.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import center_crop

from cifar_transfer.base.errors import UserError, check

Size = tuple[int, int]  # height and width in pixels
GreyRange = tuple[float, float]  # grey values that become black and white
Fit = Literal["crop", "pad", "stretch"]  # how an image of another shape is brought to a size

# Largest side in pixels that an image may be asked to be resized to.
LARGEST_SIDE = 4000
# Images that share a size keep it if no side is longer than this, in pixels.
MAX_SHARED_SIDE = 256
# Other images become squares of at most this side in pixels, unless a size is asked for.
MAX_MIXED_SIDE = 224
# Images of which parts are cut out are this many times larger than the parts become. torchvision
# validates on ImageNet's images in about the same way: resized to 256 pixels, cut to 224.
ROOM = 1.15
# Side in pixels where nothing is known of the images.
DEFAULT_SIDE = 32
# Means and deviations of R, G, B in [0, 1]. The deviations of CIFAR-10 are the ones of tutorials.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Geometry:
    """What is done to an image on its way to the network. All resizing is bilinear and antialiased.

    Attributes:
        size: Height and width in pixels that images are decoded to.
        input_side: Side in pixels of the square that the network takes. Images are resized to it on
            the device. None: the network takes them as decoded.
        mean: Means of R, G, B in [0, 1].
        std: Deviations of R, G, B in [0, 1].
        fit: How images of another shape are brought to `size`, see `fit_image`.
        grey_range: Grey values that become black and white in files of more than 8 bits; None: the
            training images have no such files.
    """

    size: Size
    input_side: int | None
    mean: Sequence[float]
    std: Sequence[float]
    fit: Fit = "crop"
    grey_range: GreyRange | None = None

    @classmethod
    def from_primitives(cls, stored: Mapping[str, Any]) -> "Geometry":
        """Return the geometry that a checkpoint stores as lists and numbers."""
        height, width = stored["size"]
        grey_range = stored["grey_range"]
        return cls(
            size=(height, width),
            input_side=stored["input_side"],
            mean=tuple(stored["mean"]),
            std=tuple(stored["std"]),
            fit=stored["fit"],
            grey_range=None if grey_range is None else tuple(grey_range),
        )

    @property
    def input_size(self) -> Size:
        """Height and width in pixels of the network's input."""
        if self.input_side is None:
            return self.size
        return (self.input_side, self.input_side)

    @property
    def seen_centre(self) -> tuple[slice, slice]:
        """Rows and columns of a decoded image that the network sees; see `resize`."""
        height, width = self.size
        if self.input_side is None:
            return slice(0, height), slice(0, width)
        side = min(height, width)
        # As torchvision's `center_crop` rounds.
        top = round((height - side) / 2)
        left = round((width - side) / 2)
        return slice(top, top + side), slice(left, left + side)

    def describe(self, inside: bool) -> dict[str, Any]:
        """Return what a program must do to an image for an exported network, in words and numbers.

        Args:
            inside: Whether the exported network itself resizes from `size` to `input_size` and
                normalises.
        """
        preparation = self._decoding_words()
        input_size = self.size
        if not inside:
            preparation += self._preprocessing_words()
            input_size = self.input_size
        description: dict[str, Any] = {
            "preparation": preparation,
            "geometry": {
                "size": list(self.size),
                "input_size": list(input_size),
                "fit": self.fit,
                "grey_range": list(self.grey_range) if self.grey_range else None,
                "interpolation": "bilinear",
                "antialias": True,
                "range": [0, 1],
                "channels": "RGB",
            },
        }
        if not inside:
            description["mean"] = list(self.mean)
            description["std"] = list(self.std)
        return description

    def _decoding_words(self) -> str:
        """Return the sentence about decoding an image to `size`."""
        height, width = self.size
        size = pixels(self.size)
        if self.fit == "stretch":
            steps = f"resize it to {size} pixels whatever its shape (bilinear, antialiased)"
        elif self.fit == "pad":
            steps = (
                f"resize it to fit into {size} pixels (bilinear, antialiased), and add black on "
                f"both sides to {size} pixels"
            )
        elif height == width:
            steps = (
                f"resize it (the shorter side to {height} pixels; bilinear, antialiased), cut out "
                f"the centre, {size} pixels"
            )
        else:
            steps = (
                f"resize it (to cover {size} pixels; bilinear, antialiased), cut out the centre, "
                f"{size} pixels"
            )
        colours = "make it RGB"
        if self.grey_range is not None:
            black, white = self.grey_range
            colours = (
                f"stretch the grey values of a file of more than 8 bits from {black:.7g} to "
                f"{white:.7g} onto those from 0 to 255, make it RGB"
            )
        return f"Turn the image upright as its EXIF says, {colours}, {steps}, and divide by 255."

    def _preprocessing_words(self) -> str:
        """Return the sentences about what is done between decoding and the network."""
        height, width = self.size
        words = ""
        if self.input_size != self.size:
            if height != width:
                words += " Cut out the centre square."
            words += f" Resize (bilinear, antialiased) to {pixels(self.input_size)} pixels."
        return words + " Subtract the mean of each channel and divide by its deviation."


def choose_size(sizes: Sequence[Size], largest: int | None) -> Size:
    """Return the size that images are decoded to.

    A size that more than half of the images share is kept, if it has no side over
    `MAX_SHARED_SIDE`. Other images become squares: of `MAX_MIXED_SIDE`, or of their median shorter
    side if that is less.

    Args:
        sizes: Sizes of a sample of the training images.
        largest: Side in pixels of the largest square that the network will be given, or None if it
            takes images as they are. With a number, images become squares of this side. If they
            share a smaller shorter side, squares have that side, and are enlarged on the device.
    """
    size, count = Counter(sizes).most_common(1)[0]
    is_shared = 2 * count > len(sizes)
    if largest is not None:
        side = min(largest, *size) if is_shared else largest
        return side, side
    if is_shared and max(size) <= MAX_SHARED_SIDE:
        return size
    shorter_sides = sorted(min(size) for size in sizes)
    side = min(MAX_MIXED_SIDE, shorter_sides[len(shorter_sides) // 2])
    return side, side


def size_with_room(size: Size, file_sizes: Sequence[Size], fit: Fit) -> Size:
    """Return the size to which images are decoded of which parts are to be cut out and enlarged.

    It is `ROOM` times the size that the parts are enlarged to. If half of the files have fewer
    pixels, it is less: their median.

    Args:
        size: Height and width in pixels that the parts get.
        file_sizes: Sizes of a sample of the training images.
        fit: How images of another shape are brought to a size.
    """
    height, width = size
    factors = []
    for file_height, file_width in file_sizes:
        factor_of_height = file_height / height
        factor_of_width = file_width / width
        if fit == "pad":
            factors.append(max(factor_of_height, factor_of_width))
        else:
            factors.append(min(factor_of_height, factor_of_width))
    median = sorted(factors)[len(factors) // 2]
    factor = min(ROOM, max(1.0, median))
    return round(factor * height), round(factor * width)


def fit_image(image: Image.Image, size: Size, fit: Fit = "crop") -> Image.Image:
    """Return an image brought to a size.

    Args:
        image: RGB, of any size.
        size: Height and width in pixels.
        fit: "crop" resizes the image to cover the size and takes the centre, as torchvision's
            `Resize` and `CenterCrop` do, except for rounding. "pad" resizes it to fit into the size
            and adds black on both sides. "stretch" gives it the size whatever its shape.
    """
    height, width = size
    if image.size == (width, height):
        return image
    if fit == "stretch":
        return image.resize((width, height), Image.Resampling.BILINEAR)
    if fit == "pad":
        return _padded(image, width, height)
    # Only what is cut out is resized: all of an image of 1 x 60,000 pixels would become gigabytes.
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def _padded(image: Image.Image, width: int, height: int) -> Image.Image:
    # `ImageOps.pad` would make a side of no pixels of a very long image.
    scale = min(width / image.width, height / image.height)
    inner_width = max(1, round(scale * image.width))
    inner_height = max(1, round(scale * image.height))
    resized = image.resize((inner_width, inner_height), Image.Resampling.BILINEAR)
    padded = Image.new("RGB", (width, height))
    padded.paste(resized, ((width - inner_width) // 2, (height - inner_height) // 2))
    return padded


def resize(images: Tensor, side: int | None) -> Tensor:
    """Return images as squares. Of rectangles, the centre is taken.

    Args:
        images: Float [B, 3, H, W].
        side: Side of the squares in pixels. None returns the images as they are.

    Returns:
        Float [B, 3, side, side].
    """
    height, width = images.shape[-2:]
    if side is None or height == width == side:
        return images
    if height != width:
        images = center_crop(images, [min(height, width)] * 2)
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


def to_float(images: Tensor) -> Tensor:
    """Return images of any shape as floats in [0, 1].

    Args:
        images: Integers from 0 to 255, which are divided by 255; booleans, of which True is white;
            or floats in [0, 1], which are returned as they are.
    """
    if images.is_floating_point():
        return images
    if images.dtype == torch.bool:
        return images.float()
    return images.float().div_(255)


def check_decode_size(side: int | None) -> None:
    """Refuse a side to which no image can be decoded.

    Raises:
        UserError: It is neither None nor a number of pixels up to `LARGEST_SIDE`.
    """
    if side is not None:
        check(
            "decode_size",
            side,
            lambda value: 1 <= value <= LARGEST_SIDE,
            f"1 to {LARGEST_SIDE} pixels",
        )


def check_fit(fit: Any) -> None:
    """Refuse what is none of the ways to fit an image.

    Raises:
        UserError: It is none.
    """
    check("fit", fit, lambda name: name in get_args(Fit), "crop, pad or stretch")


def pixels(size: Size) -> str:
    """Return a size for people, width first."""
    height, width = size
    return f"{width} x {height}"


def statistics(
    normalize: str | Sequence[Sequence[float]],
) -> tuple[Sequence[float], Sequence[float]]:
    """Return the means and deviations of R, G, B in [0, 1].

    Args:
        normalize: A name of `STATISTICS`, or the means and the deviations.

    Raises:
        UserError: The name is unknown, or these are not two triples of finite numbers with
            positive deviations.
    """
    if isinstance(normalize, str):
        if normalize not in STATISTICS:
            names = ", ".join(STATISTICS)
            raise UserError(
                f"normalize={normalize!r} is unknown: take {names}, or [[mean], [deviation]]."
            )
        return STATISTICS[normalize]
    if not _are_statistics(normalize):
        raise UserError(
            f"normalize={normalize} must be two triples, the means and the positive deviations "
            "of R, G, B."
        )
    mean, std = normalize
    return mean, std


def _are_statistics(normalize: Sequence[Sequence[float]]) -> bool:
    """Return whether these are two triples of finite numbers, the second ones positive."""
    if len(normalize) != 2:
        return False
    mean, std = normalize
    if len(mean) != 3 or len(std) != 3:
        return False
    if not all(math.isfinite(number) for number in (*mean, *std)):
        return False
    return min(std) > 0
