"""Images from files to uint8 batches: one image decoded, and many of them read a batch at a time."""

import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import folder

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.untrusted import open_regular
from cifar_transfer.data.geometry import Size, cover

Batch = tuple[Tensor, Tensor]

EXTENSIONS = (*folder.IMG_EXTENSIONS, ".jfif", ".gif", ".avif")  # of images in folders

MAX_MEGAPIXELS = (
    100.0  # of an image that is decoded, unless somebody asks for more: 300 MB in memory
)

warnings.simplefilter(
    "ignore", Image.DecompressionBombWarning
)  # `read_image` has a limit, and refuses


def read_image(
    path: str | Path | bytes, size: Size | None = None, max_megapixels: float = MAX_MEGAPIXELS
) -> np.ndarray:
    """Decode an image file of any mode that Pillow reads, upright as its EXIF says; of an animation the first frame.

    Args:
        path: The file, or what is in it; its contents tell the format, not its name.
        size: What it is brought to, see `geometry.cover`; None keeps its own.
        max_megapixels: A larger one is refused undecoded: a file of kilobytes may claim to fill all memory.

    Returns:
        uint8 [3, H, W], RGB. Transparency is dropped, as torchvision's loader does.

    Raises:
        UserError: The file is too large or cannot be decoded; the message names it.
    """
    with _opened(path, max_megapixels) as image:
        return to_pixels(image, size)


def read_size(path: str | Path, max_megapixels: float = MAX_MEGAPIXELS) -> Size:
    """Size of an image file, upright, by its header alone: nothing is decoded. Errors are as of `read_image`."""
    with _opened(path, max_megapixels) as image:
        exif = Image.Image.getexif(
            image
        )  # that of a PNG would decode the image, to find an EXIF after it
        return (
            image.size
            if exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            else image.size[::-1]
        )


@contextmanager
def _opened(path: str | Path | bytes, max_megapixels: float) -> Iterator[Image.Image]:
    name, advice = (
        ("The file", "take another one") if isinstance(path, bytes) else (path, "mend or remove it")
    )
    most = max_megapixels * 1e6
    if Image.MAX_IMAGE_PIXELS is not None and most > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = int(
            min(most, sys.maxsize)
        )  # never lowered, as other threads read too
    try:
        with (
            BytesIO(path) if isinstance(path, bytes) else open_regular(path) as file,
            Image.open(file) as image,
        ):
            if image.width * image.height > most:
                raise Image.DecompressionBombError
            if image.format == "EPS":
                raise ValueError("a program, which is not run")  # Pillow would start Ghostscript
            yield image
    except Image.DecompressionBombError:
        raise UserError(
            f"{name} has more than {max_megapixels:g} million pixels: make it smaller, or raise max_megapixels."
        ) from None
    except (
        Exception
    ) as error:  # of any kind: what the decoders of damaged files raise is not listed anywhere
        if not isinstance(path, bytes) and not os.path.lexists(path):
            raise UserError(f"{name} does not exist.") from None
        if isinstance(error, OSError) and error.errno:  # the system's, not a decoder's
            raise UserError(f"{name} cannot be read ({error.strerror}): {advice}.") from None
        unknown = isinstance(error, UnidentifiedImageError)
        why = "Pillow knows no such image" if unknown else error or type(error).__name__
        raise UserError(f"{name} cannot be decoded as an image ({why}): {advice}.") from None


def to_pixels(image: Image.Image, size: Size | None = None) -> np.ndarray:
    """An opened image as an array: uint8 [3, H, W], RGB, upright; `size` as in `read_image`."""
    image.load()
    with suppress(Exception):  # of any kind, because an EXIF that cannot be read says nothing
        if (
            image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        ):  # `exif_transpose` would copy the others too
            image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose range is not known")
    if image.mode.startswith("I"):  # 16 bit a pixel, which `convert` would clip instead of scale
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    rgb = image.convert("RGB")
    return np.array(cover(rgb, size) if size else rgb).transpose(
        2, 0, 1
    )  # a copy, which torch can write to


class Images(Dataset[Batch]):
    """Images and labels, read a batch of indices at a time. A subclass has `pixels`."""

    on_the_fly = False  # whether reading means decoding, so that worker processes pay
    names: Sequence[str] | None = (
        None  # class and name of each, say "cat/007.png", all different; None: only a number
    )

    def __init__(self, labels: np.ndarray) -> None:
        given = np.asarray(labels)
        if given.ndim != 1 or (given.dtype.kind not in "iub" and len(given)):
            raise UserError(
                f"Labels are whole numbers, one for each image, int64 [N], not {_form(given)}."
            )
        self.labels = given.astype(np.int64)  # [N]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Images uint8 [B, 3, H, W] and labels int64 [B], as the DataLoader asks for them."""
        rows = np.asarray(indices)
        pixels = self.pixels(rows)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UserError(
                f"Images are uint8 [N, 3, H, W], RGB, from 0 to 255, not {_form(pixels)}: convert them."
            )
        return torch.from_numpy(pixels), torch.from_numpy(self.labels[rows])

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] of the rows int64 [B]."""
        raise NotImplementedError

    def marks(self) -> np.ndarray:
        """A number for each image, uint32 [N], which changes when the image does."""
        rows = (self.pixels(np.array([row])).tobytes() for row in range(len(self)))
        return np.fromiter(map(zlib.crc32, rows), np.uint32, len(self))

    def subset(self, rows: np.ndarray) -> "Images":
        """The same images, only these rows, without a copy."""
        return _Rows(self, rows)


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


class _Rows(Images):
    def __init__(self, images: Images, rows: np.ndarray) -> None:
        super().__init__(images.labels[rows])
        self.images, self.rows, self.on_the_fly = images, rows, images.on_the_fly

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        return self.images.pixels(self.rows[rows])

    def marks(self) -> np.ndarray:
        return self.images.marks()[self.rows]


class ArrayImages(Images):
    """Images of an array uint8 [N, 3, H, W], in memory or mapped; `sums`: CRC-32 of each, uint32 [N], if known."""

    def __init__(
        self, array: np.ndarray, labels: np.ndarray, sums: np.ndarray | None = None
    ) -> None:
        super().__init__(labels)
        self.array, self.sums = np.asarray(array), sums
        if len(self.array) != len(self.labels):
            raise UserError(
                f"There are {len(self.array)} images and {len(self.labels)} labels: give one for each."
            )

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """As of `Images`."""
        return self.array[rows]

    def marks(self) -> np.ndarray:
        """As of `Images`."""
        return super().marks() if self.sums is None else self.sums


class FileImages(Images):
    """Images of N files, decoded when they are asked for; `size` and `max_megapixels` as in `read_image`."""

    on_the_fly = True

    def __init__(
        self,
        paths: Sequence[str],
        labels: np.ndarray,
        size: Size,
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> None:
        super().__init__(labels)
        self.paths, self.size, self.max_megapixels = paths, size, max_megapixels

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """As of `Images`; a UserError names a broken file."""
        return np.stack(
            [read_image(self.paths[row], self.size, self.max_megapixels) for row in rows]
        )

    def marks(self) -> np.ndarray:
        """As of `Images`, by the size and the time of each file."""
        files = zip(self.paths, map(os.stat, self.paths), strict=True)
        texts = (f"{path} {file.st_size} {file.st_mtime_ns} {self.size}" for path, file in files)
        return np.fromiter(
            (zlib.crc32(text.encode(errors="surrogateescape")) for text in texts),
            np.uint32,
            len(self),
        )


def cores() -> int:
    """How many cores this process may use, often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def images_below(
    folder: str, refuse: Callable[[UserError], None], above: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Files named as images, anywhere below a folder and sorted; none that are hidden, as `._cat.jpg`, and no pipes.

    Args:
        folder: Where to look.
        refuse: Called with the reason where a folder cannot be read.
        above: The real folders on the way here; links back to them are not followed.
    """
    if (real := os.path.realpath(folder)) in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        refuse(UserError(f"{folder} cannot be read ({error.strerror})."))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        link = entry.is_symlink()
        if (
            os.path.isdir(entry.path) if link else entry.is_dir()
        ):  # which fails for a link to itself
            yield from images_below(entry.path, refuse, above | {real})
        elif entry.name.lower().endswith(EXTENSIONS) and (
            link or entry.is_file()
        ):  # to read a broken link fails
            yield entry.path
