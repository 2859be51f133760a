"""Grey values of more than 8 bits: the range that a data set uses, by which all its files are read.

Files of 16 bits, of 32 bits and of floats do not say what is white. One range serves all files of a
data set, and goes with the checkpoint, so that the brightness of one file does not depend on
others, and files to predict are read as those of the training were.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.machine import cores
from cifar_transfer.data.geometry import GreyRange
from cifar_transfer.data.images import has_many_grey_values, read_grey_values

MAX_LOOKED_AT = 1000  # files, evenly spread, whose headers say whether any has more than 8 bits
SECONDS_BEFORE_PROGRESS = 2  # before a progress bar is shown


class Extremes(NamedTuple):
    """The least and the greatest grey value of images, and whether they are floats."""

    least: float
    greatest: float
    are_floats: bool


def some_have_many(paths: Sequence[str], max_megapixels: float) -> bool:
    """Return whether some of a sample of files have grey values of more than 8 bits."""
    count = min(MAX_LOOKED_AT, len(paths))
    for row in np.linspace(0, len(paths) - 1, count).astype(int).tolist():
        if has_many_grey_values(paths[row], max_megapixels):
            return True
    return False


def find_grey_range(
    paths: Sequence[str], max_megapixels: float, name: str = "train"
) -> GreyRange | None:
    """Return the range of grey values of a data set, or None if no file has more than 8 bits.

    All files are read. Those that cannot be read are passed over: whoever decodes them says so.

    Args:
        paths: Files of the training images.
        max_megapixels: Larger images are passed over.
        name: Text of the progress bar.

    Raises:
        UserError: Some files have whole numbers and others floats.
    """

    def look(path: str) -> Extremes | None:
        return extremes_of(path, max_megapixels)

    bar = tqdm(
        total=len(paths),
        desc=f"grey values of {name}",
        unit="img",
        delay=SECONDS_BEFORE_PROGRESS,
        disable=None,
    )
    extremes = []
    with bar, ThreadPoolExecutor(cores()) as pool:
        for extremes_of_file in pool.map(look, paths):
            bar.update()
            if extremes_of_file is not None:
                extremes.append(extremes_of_file)
    return range_of(extremes)


def extremes_of(path: str, max_megapixels: float) -> Extremes | None:
    """Return the extremes of a file; None if it has 8 bits, no finite value, or cannot be read."""
    try:
        values = read_grey_values(path, max_megapixels)
    except UserError:
        return None
    if values is None:
        return None
    return extremes_of_values(values)


def extremes_of_values(values: np.ndarray) -> Extremes | None:
    """Return the extremes of grey values; None if none is finite."""
    are_floats = values.dtype.kind == "f"
    if are_floats:
        values = values[np.isfinite(values)]
    if not values.size:
        return None
    return Extremes(float(values.min()), float(values.max()), are_floats)


def range_of(extremes: Iterable[Extremes]) -> GreyRange | None:
    """Return the values that become black and white, None if there are no files.

    Whole numbers without negative ones use a number of bits: 12 bits from 0 to 4095. Of floats the
    greatest is white, and the least is black if it is negative, as of negative whole numbers.

    Raises:
        UserError: Some files have whole numbers and others floats.
    """
    files = list(extremes)
    if not files:
        return None
    least = min(file.least for file in files)
    greatest = max(file.greatest for file in files)
    num_floats = sum(file.are_floats for file in files)
    if 0 < num_floats < len(files):
        raise UserError(
            f"Of the training images of more than 8 bits, {num_floats:,} have floats as grey "
            f"values, and {len(files) - num_floats:,} whole numbers: store all in one way."
        )
    white = greatest
    if least >= 0 and not num_floats:
        white = 2.0 ** int(greatest).bit_length() - 1
    black = min(least, 0.0)
    if white <= black:  # all images are black
        white = black + 1
    return black, white


class TrainingGreyRange:
    """The range of the grey values of a data module's training images, found once and told.

    Args:
        find: Returns the range, or None if the images have 8 bits. It may read all of them, and is
            called once, when the range is needed.
    """

    def __init__(self, find: Callable[[], GreyRange | None]) -> None:
        self._find = find
        self._is_known = False
        self._grey_range: GreyRange | None = None

    def choose(self) -> GreyRange | None:
        """Return the range, and say the first time what becomes black and white.

        Raises:
            UserError: Some images have whole numbers and others floats.
        """
        if not self._is_known:
            self._grey_range = self._find()
            self._is_known = True
            if self._grey_range is not None:
                rank_zero_info(f"{describe_range(self._grey_range)}.")
        return self._grey_range


def describe_range(grey_range: GreyRange) -> str:
    """Return a sentence for people: which grey values become black and white."""
    black, white = grey_range
    return (
        f"Grey values from {black:,.7g} to {white:,.7g}, which the training images use, become "
        f"those from 0 to 255"
    )
