"""Images from files to uint8 batches: how one is decoded, and how many are read at once."""

import os
import sys
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import folder

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import file_version
from cifar_transfer.base.untrusted import open_regular
from cifar_transfer.data.geometry import Fit, GreyRange, Size, choose_size, fit_image

Batch = tuple[Tensor, Tensor]  # images and labels

HEIC_EXTENSIONS = (".heic", ".heif")
HEIC_ADVICE = "HEIC needs pillow-heif, pip install 'cifar-transfer[heic]'"
MAX_MEGAPIXELS = 100.0  # of an image, unless another limit is asked for: 300 MB in memory
MAX_NAMED_IMAGES = 20  # in a message about images that cannot be read
MAX_SAMPLED_IMAGES = 1000  # files, evenly spread, whose sizes decide the common size
MAX_8_BITS = 255
MAX_12_BITS = 4095
MAX_16_BITS = 65535
TURNED_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def _register_heic() -> bool:
    """Have Pillow read HEIC, and return whether it can: pillow-heif is an optional extra."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


READS_HEIC = _register_heic()
EXTENSIONS = (*folder.IMG_EXTENSIONS, ".jfif", ".gif", ".avif")  # of images in folders
if READS_HEIC:
    EXTENSIONS += HEIC_EXTENSIONS

# `read_image` has a limit of its own, and refuses larger images.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def read_image(
    path: str | Path | bytes,
    size: Size | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    fit: Fit = "crop",
    grey_range: GreyRange | None = None,
) -> np.ndarray:
    """Decode an image file of any mode that Pillow reads, upright as its EXIF says.

    Of an animation the first frame is decoded. What is transparent becomes white, as on a page, or
    black below a light drawing of one colour. The contents tell the format, not the name.

    Args:
        path: The file, or its contents.
        size: Height and width to bring it to, see `geometry.fit_image`; None keeps its own.
        max_megapixels: A larger image is refused undecoded: a file of kilobytes may claim to fill
            all memory.
        fit: How an image of another shape is brought to the size.
        grey_range: See `to_pixels`.

    Returns:
        RGB pixels, uint8 [3, H, W].

    Raises:
        UserError: The file is too large or cannot be decoded; the message names it.
    """
    with _opened(path, max_megapixels) as image:
        return to_pixels(image, size, fit, grey_range)


def has_many_grey_values(path: str | Path, max_megapixels: float = MAX_MEGAPIXELS) -> bool:
    """Return whether a file has grey values of more than 8 bits, as far as its header says.

    False if it cannot be read.
    """
    try:
        with _opened(path, max_megapixels) as image:
            return has_more_than_8_bits(image)
    except UserError:
        return False


def read_grey_values(path: str | Path, max_megapixels: float = MAX_MEGAPIXELS) -> np.ndarray | None:
    """Return the grey values of a file of more than 8 bits, [H, W]; None of a file of 8 bits.

    Raises:
        UserError: As `read_image` does.
    """
    with _opened(path, max_megapixels) as image:
        if not has_more_than_8_bits(image):
            return None
        image.load()
        return np.asarray(image)


def has_more_than_8_bits(image: Image.Image) -> bool:
    """Return whether an image has grey values of 16 or 32 bits, or floats."""
    return image.mode == "F" or image.mode.startswith("I")


def read_size(path: str | Path, max_megapixels: float = MAX_MEGAPIXELS) -> Size:
    """Return the size of an image file, upright, by its header alone: nothing is decoded.

    Raises:
        UserError: As `read_image` does.
    """
    with _opened(path, max_megapixels) as image:
        # `PngImageFile.getexif` would decode the image, to find an EXIF after it.
        exif = Image.Image.getexif(image)
        if exif.get(ExifTags.Base.Orientation, 1) in TURNED_SIDEWAYS:
            height, width = image.size
        else:
            width, height = image.size
        return height, width


@contextmanager
def _opened(path: str | Path | bytes, max_megapixels: float) -> Iterator[Image.Image]:
    """Open an image; errors within the context become a sentence that names the file."""
    max_pixels = max_megapixels * 1e6
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        # Never lowered, because other threads read too.
        Image.MAX_IMAGE_PIXELS = int(min(max_pixels, sys.maxsize))
    try:
        with _open_file(path) as file, Image.open(file) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            if image.format == "EPS":  # Pillow would start Ghostscript
                raise ValueError("a program, which is not run")
            yield image
    except Image.DecompressionBombError:
        name = "The file" if isinstance(path, bytes) else path
        raise UserError(
            f"{name} has more than {max_megapixels:g} million pixels: make it smaller, or raise "
            f"max_megapixels."
        ) from None
    except Exception as error:  # the decoders of damaged files raise errors of any kind
        _refuse(path, error)


def _open_file(path: str | Path | bytes) -> BinaryIO:
    if isinstance(path, bytes):
        return BytesIO(path)
    return open_regular(path)


def _refuse(path: str | Path | bytes, error: Exception) -> NoReturn:
    """Raise a `UserError` that names a file that could not be opened or decoded."""
    name: str | Path = "The file"
    advice = "take another one"
    if not isinstance(path, bytes):
        name = path
        advice = "mend or remove it"
        if not os.path.lexists(path):
            raise UserError(f"{name} does not exist.") from None
    if isinstance(error, OSError) and error.errno:  # by the system, not by a decoder
        raise UserError(f"{name} cannot be read ({error.strerror}): {advice}.") from None
    reason = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "Pillow knows no such image"
        if not READS_HEIC and str(path).lower().endswith(HEIC_EXTENSIONS):
            reason = HEIC_ADVICE
    raise UserError(f"{name} cannot be decoded as an image ({reason}): {advice}.") from None


def to_pixels(
    image: Image.Image,
    size: Size | None = None,
    fit: Fit = "crop",
    grey_range: GreyRange | None = None,
) -> np.ndarray:
    """Return an opened image as RGB pixels, uint8 [3, H, W], upright.

    Args:
        image: Of any mode.
        size: Height and width to bring it to, see `geometry.fit_image`; None keeps its own.
        fit: How an image of another shape is brought to the size.
        grey_range: Grey values that become black and white, if the image has more than 8 bits. None
            takes whole numbers by the bits that they use: 8, or else all 16.

    Raises:
        ValueError: The pixels are floats, and no range is given.
    """
    image.load()
    with suppress(Exception):  # of any kind: an EXIF that cannot be read says nothing
        # `exif_transpose` would copy upright images too.
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if has_more_than_8_bits(image):
        values = np.asarray(image)
        if grey_range is None:
            image = Image.fromarray(_by_bits(values))
        else:
            image = Image.fromarray(_stretched(values, grey_range))
    rgb = _on_white(image).convert("RGB")
    if size is not None:
        rgb = fit_image(rgb, size, fit)
    return np.array(rgb).transpose(2, 0, 1)  # a copy, which torch can write to


def _stretched(values: np.ndarray, grey_range: GreyRange) -> np.ndarray:
    """Return grey values as uint8, of the same shape: the range is stretched, the rest is clipped.

    What is no number (NaN) becomes black.
    """
    black, white = grey_range
    shares = (values.astype(np.float64) - black) * MAX_8_BITS / (white - black)
    return np.nan_to_num(shares).clip(0, MAX_8_BITS).astype(np.uint8)


def _by_bits(values: np.ndarray) -> np.ndarray:
    """Return whole numbers of 16 or 32 bits as uint8, of the same shape.

    White is 65535, as files say who keep to their format. Values that all fit into 8 bits are
    taken for such, because they would be black. A warning tells of others that use so little of
    their range that they become nearly black: what is white in them is not known.

    Raises:
        ValueError: The values are floats.
    """
    if values.dtype.kind == "f":
        raise ValueError("its pixels are floats, whose range is not known")
    brightest = int(values.max())
    if brightest <= MAX_8_BITS:
        return _stretched(values, (0, MAX_8_BITS))
    if brightest <= MAX_12_BITS:
        warnings.warn(
            f"Images of 16 bits use 12 of them or fewer, up to {MAX_12_BITS} of {MAX_16_BITS}, and "
            f"are read as nearly black: scale them to 8 bits, or to all 16.",
            stacklevel=1,
        )
    return _stretched(values, (0, MAX_16_BITS))


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image without transparency: on white, as a page shows it.

    A light drawing, whose colour is the same wherever it is not transparent, is put on black,
    because on white it would not show. Transparency that is the same everywhere is dropped: it
    says nothing, and where it is all, what is below it is the picture.
    """
    if not image.has_transparency_data:
        return image
    drawing = image.convert("RGBA")
    pixels = np.asarray(drawing)
    alpha = pixels[:, :, 3]
    if (alpha == alpha[0, 0]).all():
        return drawing
    visible = pixels[alpha > 0][:, :3]
    is_of_one_colour = (visible == visible[0]).all()
    is_light = visible[0].mean() > MAX_8_BITS / 2
    colour = "black" if is_of_one_colour and is_light else "white"
    background = Image.new("RGBA", image.size, colour)
    return Image.alpha_composite(background, drawing)


class UnreadableImages(UserError):
    """Images that cannot be read, all that are known in one message.

    Args:
        *reasons: A sentence for each, which names it.
        paths: Their files, in the same order, if they are files.
        advice: A sentence about what to do with all of them.
    """

    def __init__(self, *reasons: str, paths: Sequence[str] = (), advice: str = "") -> None:
        self.reasons = reasons
        self.paths = paths
        message = " ".join(reasons[:MAX_NAMED_IMAGES])
        if len(reasons) > 1:
            message = f"{len(reasons):,} images cannot be read. {message}"
        if len(reasons) > MAX_NAMED_IMAGES:
            message += f" And {len(reasons) - MAX_NAMED_IMAGES:,} more."
        if advice:
            message += f" {advice}"
        super().__init__(message)


class Images(Dataset[Batch]):
    """Images and labels, read a batch of indices at a time; a subclass has `pixels`.

    Args:
        labels: Whole numbers, int64 [N].

    Attributes:
        labels: Labels of the images, int64 [N].
        on_the_fly: Whether reading means decoding, so that worker processes pay.
        names: Class and name of each image, such as "cat/007.png", all different; None if images
            have only a number.

    Raises:
        UserError: The labels have another form.
    """

    on_the_fly = False
    names: Sequence[str] | None = None

    def __init__(self, labels: np.ndarray) -> None:
        array = np.asarray(labels)
        whole_numbers = array.dtype.kind in "iub" or not len(array)
        if array.ndim != 1 or not whole_numbers:
            raise UserError(
                f"Labels are whole numbers, one for each image, int64 [N], not {_form(array)}."
            )
        self.labels = array.astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return images uint8 [B, 3, H, W] and labels int64 [B], as the DataLoader asks for them.

        Raises:
            UserError: The pixels have another form.
        """
        rows = np.asarray(indices)
        pixels = self.pixels(rows)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UserError(
                f"Images are uint8 [N, 3, H, W], RGB, from 0 to 255, not {_form(pixels)}: "
                f"convert them."
            )
        return torch.from_numpy(pixels), torch.from_numpy(self.labels[rows])

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """Return the images, uint8 [B, 3, H, W], of some rows, int64 [B]."""
        raise NotImplementedError

    def marks(self) -> np.ndarray:
        """Return a number for each image that changes when the image does, uint32 [N]."""
        marks = np.empty(len(self), np.uint32)
        for row in range(len(self)):
            marks[row] = zlib.crc32(self.pixels(np.array([row])).tobytes())
        return marks

    def subset(self, rows: np.ndarray) -> "Images":
        """Return the images of some rows, without a copy."""
        return _Subset(self, rows)


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


class _Subset(Images):
    """Some rows, int64 [N], of other images."""

    def __init__(self, images: Images, rows: np.ndarray) -> None:
        super().__init__(images.labels[rows])
        self.images = images
        self.rows = rows
        self.on_the_fly = images.on_the_fly

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        return self.images.pixels(self.rows[rows])

    def marks(self) -> np.ndarray:
        return self.images.marks()[self.rows]


class ArrayImages(Images):
    """Images of an array, in memory or memory-mapped.

    Args:
        array: RGB pixels, uint8 [N, 3, H, W].
        labels: Whole numbers, int64 [N].
        checksums: CRC-32 of each image, uint32 [N], if they are known.

    Raises:
        UserError: There are not as many labels as images.
    """

    def __init__(
        self, array: np.ndarray, labels: np.ndarray, checksums: np.ndarray | None = None
    ) -> None:
        super().__init__(labels)
        self.array = np.asarray(array)
        self.checksums = checksums
        if len(self.array) != len(self.labels):
            raise UserError(
                f"There are {len(self.array)} images and {len(self.labels)} labels: "
                f"give one for each."
            )

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """Return the images, uint8 [B, 3, H, W], of some rows, int64 [B]."""
        return self.array[rows]

    def rows_of_one_colour(self) -> np.ndarray:
        """Return the rows, int64, of the images whose pixels are all alike."""
        height, width = self.array.shape[2:]
        first = self.array[:, :, 0, 0]
        middle = self.array[:, :, height // 2, width // 2]
        last = self.array[:, :, -1, -1]
        candidates = np.flatnonzero(((first == middle) & (first == last)).all(axis=1))
        rows = []
        for row in candidates:
            if (self.array[row] == first[row][:, None, None]).all():
                rows.append(row)
        return np.array(rows, np.int64)

    def marks(self) -> np.ndarray:
        """Return the checksums, uint32 [N]."""
        if self.checksums is None:
            return super().marks()
        return self.checksums


class FileImages(Images):
    """Images of files, decoded when they are asked for.

    Args:
        paths: Paths of N files.
        labels: Whole numbers, int64 [N].
        size: Height and width to bring the images to, as in `read_image`. None takes the size that
            most of them share, up to 256 x 256, or squares of 224 pixels or less; see
            `geometry.choose_size`.
        max_megapixels: A larger image is refused, as in `read_image`.
        fit: How images of another shape are brought to the size, as in `read_image`.
        grey_range: Grey values that become black and white, as in `to_pixels`.

    Raises:
        UserError: There are not as many labels as paths, or no size can be found out.
    """

    on_the_fly = True

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: np.ndarray | Sequence[int],
        size: Size | None = None,
        max_megapixels: float = MAX_MEGAPIXELS,
        fit: Fit = "crop",
        grey_range: GreyRange | None = None,
    ) -> None:
        super().__init__(np.asarray(labels))
        if len(paths) != len(self.labels):
            raise UserError(
                f"There are {len(paths)} paths and {len(self.labels)} labels: give one for each."
            )
        self.paths = paths
        if size is None:
            size = choose_size(sample_sizes(paths, max_megapixels), None)
        self.size = size
        self.max_megapixels = max_megapixels
        self.fit: Fit = fit
        self.grey_range = grey_range

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """Return the images, uint8 [B, 3, H, W], of some rows, int64 [B].

        Raises:
            UnreadableImages: Files are broken; the message names them.
        """
        images = []
        reasons = []
        broken_paths = []
        for row in rows:
            path = self.paths[row]
            try:
                image = read_image(path, self.size, self.max_megapixels, self.fit, self.grey_range)
                images.append(image)
            except UserError as error:
                reasons.append(str(error))
                broken_paths.append(str(path))
        if reasons:
            raise UnreadableImages(*reasons, paths=broken_paths)
        return np.stack(images)

    def marks(self) -> np.ndarray:
        """Return a number, uint32 [N], that follows from path and version of each file."""
        marks = np.empty(len(self), np.uint32)
        for row, path in enumerate(self.paths):
            text = f"{path} {file_version(path)} {self.size} {self.fit} {self.grey_range}"
            marks[row] = zlib.crc32(text.encode(errors="surrogateescape"))
        return marks


def sample_sizes(paths: Sequence[str | Path], max_megapixels: float = MAX_MEGAPIXELS) -> list[Size]:
    """Return the sizes of some files, evenly spread, without those that cannot be read.

    Raises:
        UnreadableImages: None of the files that were looked at is an image.
        UserError: There are no files.
    """
    if len(paths) == 0:
        raise UserError("There are no images: name some files.")
    sizes = []
    errors = []
    count = min(MAX_SAMPLED_IMAGES, len(paths))
    for row in np.linspace(0, len(paths) - 1, count).astype(int):
        try:
            sizes.append(read_size(paths[row], max_megapixels))
        except UserError as error:
            errors.append(str(error))
    if not sizes:
        raise UnreadableImages(*errors)
    return sizes
