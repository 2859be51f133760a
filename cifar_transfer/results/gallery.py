"""Plots of single predictions: images beside their likeliest classes, and under heat maps."""

import math
import textwrap
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cifar_transfer.base.text import printable
from cifar_transfer.results.plots import SKY, add_note, show_image
from cifar_transfer.results.predictions import MAX_GALLERY_IMAGES, ImagePrediction
from cifar_transfer.results.words import Lettering, class_name, lettering, word

MAX_BARS = 10  # classes of an image
BAR_BACKGROUND = "#EEEEEE"
FILE_COLOUR = "#666666"
LINE_INCHES = 0.15  # height of a line of text
# Widths of texts in letters, half as many of those outside ASCII.
FILE_CHARS = 38
CLASS_CHARS = 32
HEATED_TITLE_CHARS = 56
HEATED_FILE_CHARS = 28
# Of the space between two bars, in lines of text: all of it, and what stays free of colour.
BAR_GAP = 0.4
BAR_MARGIN = 0.15


def gallery(predictions: Sequence[ImagePrediction], count: int) -> Figure:
    """Draw images, each beside bars for its likeliest classes, as long as their probabilities.

    Args:
        predictions: The first 24 are drawn.
        count: How many images there are; if more than are drawn, a heading says so.
    """
    predictions = predictions[:MAX_GALLERY_IMAGES]
    letters = lettering(chain.from_iterable(map(_names_in, predictions)))
    cells = [_cell_lines(prediction, letters) for prediction in predictions]
    most_lines = max(map(_height_in_lines, cells))
    cell_height = max(1.2, LINE_INCHES * most_lines)
    columns = _columns(len(predictions))
    rows = math.ceil(len(predictions) / columns)

    size = (4.5 * columns, rows * (cell_height + 0.15) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    if count > len(predictions):
        heading = word("The first {shown} of {all:,} images", shown=len(predictions), all=count)
        figure.suptitle(heading, fontsize=10)
    axes = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1.2, 3] * columns)
    for cell_axes in axes.flat:
        cell_axes.axis("off")
    pairs = axes.reshape(-1, 2)
    for (left, right), prediction, lines in zip(pairs, predictions, cells, strict=False):
        show_image(left, prediction.pixels)
        left.set_anchor("NE")
        right.set(xlim=(0, 1), ylim=(cell_height / LINE_INCHES, 0))
        _draw_bars(right, lines, prediction, letters.families)
    add_note(figure, letters)
    return figure


def _columns(num_images: int) -> int:
    """Return up to three columns that leave no empty cell, or three for more than nine images."""
    for columns in (3, 2):
        if num_images % columns == 0 or num_images > 9:
            return columns
    return 1


def _names_in(prediction: ImagePrediction) -> list[str]:
    """Return the name of the file, then those of the classes that have a bar."""
    classes = [class_name(name) for name, _ in prediction.classes[:MAX_BARS]]
    return [_file_text(prediction), *classes]


def _cell_lines(prediction: ImagePrediction, letters: Lettering) -> list[list[str]]:
    """Return the lines of each of these names."""
    file, *classes = map(letters.text, _names_in(prediction))
    return [_wrap(file, FILE_CHARS), *(_wrap(name, CLASS_CHARS) for name in classes)]


def _height_in_lines(texts: Sequence[Sequence[str]]) -> float:
    return sum(map(len, texts)) + BAR_GAP * len(texts)


def _draw_bars(
    axes: Axes,
    texts: Sequence[Sequence[str]],
    prediction: ImagePrediction,
    families: list[str],
) -> None:
    """Draw the file's name and below it a bar for each class.

    One unit of the y axis is a line of text.

    Args:
        axes: Where to draw.
        texts: Lines of the file's name, then of each class.
        prediction: Prediction with the probabilities of the classes.
        families: Fonts of the texts.
    """
    file_lines, *class_texts = texts
    height = len(file_lines) + BAR_GAP
    _draw_text(axes, file_lines, height / 2, FILE_COLOUR, families)
    top = height
    for lines, (_, probability) in zip(class_texts, prediction.classes, strict=False):
        height = len(lines) + BAR_GAP
        middle = top + height / 2
        axes.barh(middle, 1, height - BAR_MARGIN, color=BAR_BACKGROUND)
        axes.barh(middle, probability, height - BAR_MARGIN, color=SKY)
        axes.text(0.99, middle, f"{probability:.1%}", ha="right", va="center", fontsize=8)
        _draw_text(axes, lines, middle, "k", families)
        top += height


def _draw_text(
    axes: Axes, lines: Sequence[str], y: float, colour: str, families: list[str]
) -> None:
    axes.text(
        0.015,
        y,
        "\n".join(lines),
        va="center",
        color=colour,
        fontsize=8,
        family=families,
        linespacing=1.15,
    )


def heated(prediction: ImagePrediction, heat: np.ndarray) -> Figure:
    """Draw an image, and beside it in grey under the heat map of its likeliest class.

    Args:
        prediction: Prediction for the image.
        heat: float [H, W] in [0, 1].
    """
    name, probability = prediction.classes[0]
    name = class_name(name)
    file = _file_text(prediction)
    letters = lettering([name, file])
    title = _wrap(f"{letters.text(name)}   {probability:.1%}", HEATED_TITLE_CHARS)
    file_lines = _wrap(letters.text(file), HEATED_FILE_CHARS)
    subtitle = word("nothing speaks for it here")
    if heat.any():
        subtitle = word("what speaks for it")

    figure = Figure(figsize=(6.4, 3.1 + 0.2 * len(title)), layout="constrained")
    figure.suptitle("\n".join(title), fontsize=11, family=letters.families)
    left, right = figure.subplots(1, 2)
    show_image(left, prediction.pixels)
    left.set_title("\n".join(file_lines), fontsize=8, family=letters.families, color=FILE_COLOUR)
    right.axis("off")
    right.imshow(prediction.pixels.mean(0), cmap="gray", vmin=0, vmax=255)
    overlay = right.imshow(heat, cmap="plasma", vmin=0, vmax=1, alpha=0.6, interpolation="bilinear")
    right.set_title(subtitle, fontsize=8, color=FILE_COLOUR)
    colorbar = figure.colorbar(overlay, ax=right, ticks=[0, 1], shrink=0.8)
    colorbar.ax.set_yticklabels([word("none"), word("most")], fontsize=8)
    add_note(figure, letters)
    return figure


def _file_text(prediction: ImagePrediction) -> str:
    """Return the name of an image's file, with that of its folder."""
    parts = Path(str(prediction.source)).parts
    return printable(str(Path(*parts[-2:])))


def _wrap(text: str, max_chars: int) -> list[str]:
    """Return the lines of a text; outside ASCII they are half as long, because letters are wide."""
    if not text.isascii():
        max_chars //= 2
    return textwrap.wrap(text, max_chars) or [""]
