"""Images from files to uint8 batches: one image decoded, and many of them read a batch at a time."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from cifar_transfer.data.geometry import Size, cover
from cifar_transfer.errors import UserError

Batch = tuple[Tensor, Tensor]
T = TypeVar("T")

MAX_MEGAPIXELS = 100.0  # of an image that is decoded, unless somebody asks for more: 300 MB in memory
LARGEST_SIDE = 4000  # pixels that an image may be asked to be brought to

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `read_image` has a limit, and refuses


def read_image(path: str | Path, size: Size | None = None, max_megapixels: float = MAX_MEGAPIXELS) -> np.ndarray:
    """Decode one image file of any mode that Pillow reads: grey, palette, RGBA, CMYK, 16 bit; of an animation a frame.

    It is turned upright as its EXIF says. The contents tell the format, not the name.

    Args:
        path: The file.
        size: Height and width that it is brought to, see `geometry.cover`; None keeps its own.
        max_megapixels: An image of more million pixels is refused before it is decoded, for a file of a few kilobytes
            may claim to fill all memory.

    Returns:
        uint8 [3, H, W], RGB. Transparency is dropped, as torchvision's loader does.

    Raises:
        UserError: The file is too large or cannot be decoded; the message names it.
    """
    return _opened(path, max_megapixels, lambda image: to_pixels(image, size))


def read_size(path: str | Path, max_megapixels: float = MAX_MEGAPIXELS) -> Size:
    """Height and width of an image file, upright, from its header: nothing is decoded.

    Raises:
        UserError: As `read_image`, if the header shows it.
    """

    def upright(image: Image.Image) -> Size:
        # That of a PNG would decode the image, to find an EXIF after it.
        turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return image.size if turned else image.size[::-1]

    return _opened(path, max_megapixels, upright)


def _opened(path: str | Path, max_megapixels: float, use: Callable[[Image.Image], T]) -> T:
    if Image.MAX_IMAGE_PIXELS is not None and max_megapixels * 1e6 > Image.MAX_IMAGE_PIXELS:
        # Of the whole process, and never lowered here, as other threads read too.
        Image.MAX_IMAGE_PIXELS = int(min(max_megapixels * 1e6, sys.maxsize))
    try:
        with Image.open(path) as image:
            if image.width * image.height > max_megapixels * 1e6:
                raise Image.DecompressionBombError
            if image.format == "EPS":
                raise ValueError("a program, which is not run")  # Pillow would start Ghostscript
            return use(image)
    except Image.DecompressionBombError:
        raise UserError(
            f"{path} has more than {max_megapixels:g} million pixels: make it smaller, or raise max_megapixels."
        ) from None
    except Exception as error:  # of any kind: what the decoders of damaged files raise is not listed anywhere
        if not os.path.lexists(path):
            raise UserError(f"{path} does not exist.") from None
        if isinstance(error, OSError) and error.errno:  # the system's, not a decoder's
            raise UserError(f"{path} cannot be read ({error.strerror}): mend or remove it.") from None
        unknown = isinstance(error, UnidentifiedImageError)
        why = "Pillow knows no such image" if unknown else error or type(error).__name__
        raise UserError(f"{path} cannot be decoded as an image ({why}): mend or remove it.") from None


def to_pixels(image: Image.Image, size: Size | None = None) -> np.ndarray:
    """An opened image as an array: uint8 [3, H, W], RGB, upright; `size` as in `read_image`."""
    image.load()
    image = _upright(image)
    if image.mode.startswith("I"):  # 16 bit a pixel, which `convert` would clip instead of scale
        rgb = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    else:
        rgb = image.convert("RGB")
    if size is not None:
        rgb = cover(rgb, size)
    return np.array(rgb).transpose(2, 0, 1)  # a copy, as torch wants to be able to write


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image  # as most are, and `exif_transpose` would copy it
        return ImageOps.exif_transpose(image)
    except Exception:  # of any kind, for an EXIF that cannot be read says nothing
        return image


class Images(Dataset[Batch]):
    """Images and labels, int64 [N], read a batch of indices at a time.

    Attributes:
        on_the_fly: Whether reading means decoding, so that worker processes pay.
        names: N different texts, class and name of each image, say "cat/007.png"; None: it has only its number.
    """

    on_the_fly = False
    names: Sequence[str] | None = None

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """What the DataLoader calls: images uint8 [B, 3, H, W] and labels int64 [B] of these rows."""
        rows = np.asarray(indices)
        return torch.from_numpy(self.pixels(rows)), torch.from_numpy(self.labels[rows])

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] of the rows int64 [B]."""
        raise NotImplementedError

    def subset(self, rows: np.ndarray) -> "Images":
        """The same images, only these rows, without a copy."""
        return _Rows(self, rows)


class _Rows(Images):
    def __init__(self, images: Images, rows: np.ndarray) -> None:
        super().__init__(images.labels[rows])
        self.images, self.rows, self.on_the_fly = images, rows, images.on_the_fly

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        return self.images.pixels(self.rows[rows])


class ArrayImages(Images):
    """Images of one array, uint8 [N, 3, H, W], in memory or mapped; `sums` are CRC-32 of each image, uint32 [N]."""

    def __init__(self, array: np.ndarray, labels: np.ndarray, sums: np.ndarray | None = None) -> None:
        super().__init__(labels)
        self.array, self.sums = array, sums

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] of the rows int64 [B]."""
        return self.array[rows]


class FileImages(Images):
    """Files decoded when they are asked for; size and limit as in `read_image`."""

    on_the_fly = True

    def __init__(
        self, paths: Sequence[str], labels: np.ndarray, size: Size, max_megapixels: float = MAX_MEGAPIXELS
    ) -> None:
        super().__init__(labels)
        self.paths, self.size, self.max_megapixels = paths, size, max_megapixels

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] of the rows int64 [B]; a UserError names a broken file."""
        return np.stack([read_image(self.paths[row], self.size, self.max_megapixels) for row in rows])


def cores() -> int:
    """How many cores this process may use; a batch scheduler or container often grants fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
