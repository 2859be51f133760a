"""Plots of single predictions: images beside bars of their likeliest classes, and images under a heat map."""

import math
import textwrap
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cifar_transfer.base.text import printable
from cifar_transfer.results.plots import SKY, image, note
from cifar_transfer.results.predictions import SHOWN, ImagePrediction
from cifar_transfer.results.words import class_name, lettering, word

BARS = 10  # classes of an image in a gallery
TRACK, WORDS = "#EEEEEE", "#666666"
LINE, GAP = 0.15, 0.4  # height of a line of text in inches, lines between two bars


def gallery(predictions: Sequence[ImagePrediction], count: int) -> Figure:
    """The first 24 images, each beside its likeliest classes, ten at most, on bars as long as their probabilities.

    Of more images than are drawn the `count` is said above.
    """
    predictions = predictions[:SHOWN]
    words = [
        (_place(one), [class_name(name) for name, _ in one.classes[:BARS]]) for one in predictions
    ]
    letters = lettering(chain.from_iterable([place, *names] for place, names in words))
    cells = [
        [_wrap(letters.names[place], 38), *(_wrap(letters.names[name], 32) for name in names)]
        for place, names in words
    ]
    height = max(1.2, LINE * max(sum(len(text) + GAP for text in cell) for cell in cells))
    columns = next(n for n in (3, 2, 1) if len(predictions) % n == 0 or len(predictions) > 9)
    rows = math.ceil(len(predictions) / columns)
    figure = Figure(figsize=(4.5 * columns, rows * (height + 0.15) + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    if count > len(predictions):
        figure.suptitle(
            word("The first {shown} of {all:,} images", shown=len(predictions), all=count),
            fontsize=10,
        )
    axes = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1.2, 3] * columns)
    for ax in axes.flat:
        ax.axis("off")
    for (left, right), one, cell in zip(axes.reshape(-1, 2), predictions, cells, strict=False):
        image(left, one.pixels)
        left.set_anchor("NE")
        right.set(xlim=(0, 1), ylim=(height / LINE, 0))
        _bars(right, cell, [share for _, share in one.classes], letters.families)
    note(figure, letters)
    return figure


def _bars(
    axes: Axes, texts: Sequence[Sequence[str]], shares: Sequence[float], families: list[str]
) -> None:
    """The first text alone, each other on a bar; a line of text is one unit of the vertical axis."""
    top = 0.0
    for number, text in enumerate(texts):
        height = len(text) + GAP
        middle = top + height / 2
        if number:
            axes.barh(middle, 1, height - 0.15, color=TRACK)
            axes.barh(middle, shares[number - 1], height - 0.15, color=SKY)
            axes.text(
                0.99, middle, f"{shares[number - 1]:.1%}", ha="right", va="center", fontsize=8
            )
        color = "k" if number else WORDS
        words = "\n".join(text)
        axes.text(
            0.015,
            middle,
            words,
            va="center",
            color=color,
            fontsize=8,
            family=families,
            linespacing=1.15,
        )
        top += height


def heated(prediction: ImagePrediction, heat: np.ndarray) -> Figure:
    """An image, and beside it in grey under the heat map of its likeliest class, float [H, W] in [0, 1]."""
    (name, share), place = prediction.classes[0], _place(prediction)
    name = class_name(name)
    letters = lettering([name, place])
    title = _wrap(f"{letters.names[name]}   {share:.1%}", 56)
    figure = Figure(figsize=(6.4, 3.1 + 0.2 * len(title)), layout="constrained")
    figure.suptitle("\n".join(title), fontsize=11, family=letters.families)
    left, right = figure.subplots(1, 2)
    for ax in (left, right):
        ax.axis("off")
    image(left, prediction.pixels)
    left.set_title(
        "\n".join(_wrap(letters.names[place], 28)), fontsize=8, family=letters.families, color=WORDS
    )
    right.imshow(prediction.pixels.mean(0), cmap="gray", vmin=0, vmax=255)
    shade = right.imshow(heat, cmap="plasma", vmin=0, vmax=1, alpha=0.6, interpolation="bilinear")
    right.set_title(
        word("what speaks for it" if heat.any() else "nothing speaks for it here"),
        fontsize=8,
        color=WORDS,
    )
    scale = figure.colorbar(shade, ax=right, ticks=[0, 1], shrink=0.8)
    scale.ax.set_yticklabels([word("none"), word("most")], fontsize=8)
    note(figure, letters)
    return figure


def _place(prediction: ImagePrediction) -> str:
    """A file by its name and its folder's."""
    return printable(str(Path(*Path(str(prediction.source)).parts[-2:])))


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` letters, half as many beyond ASCII, because Chinese letters are wide."""
    return textwrap.wrap(text, width if text.isascii() else width // 2) or [""]
