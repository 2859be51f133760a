"""Pictures of predictions: images beside bars of their likeliest classes, and images under a heat map.

All words are wrapped and none cut: at half the width if they go beyond ASCII, for Chinese letters are wide.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cifar_transfer.console import printable
from cifar_transfer.results.lettering import Lettering, lettering
from cifar_transfer.results.plots import SKY, note
from cifar_transfer.results.predictions import ImagePrediction

SHOWN = 24  # images in a gallery
BARS = 10  # classes of each in it
TRACK, WORDS = "#EEEEEE", "#666666"
DPI = 100
_COLUMNS = 3
_LINE = 0.15  # inches
_GAP = 0.4  # lines between two bars


def gallery(predictions: Sequence[ImagePrediction], count: int) -> Figure:
    """Images, each with the names and probabilities of its likeliest classes.

    Args:
        predictions: At least one; the first 24 are drawn, with their first ten classes.
        count: Of all images, said above if there are more than are drawn.
    """
    predictions = predictions[:SHOWN]
    sources = [_place(prediction) for prediction in predictions]
    names = [name for prediction in predictions for name, _ in prediction.classes[:BARS]]
    letters = lettering([*sources, *names])
    drawn = dict(zip([*sources, *names], letters.names, strict=True))
    cells = [
        [_wrap(drawn[source], 38), *(_wrap(drawn[name], 32) for name, _ in prediction.classes[:BARS])]
        for source, prediction in zip(sources, predictions, strict=True)
    ]
    lines = max(sum(len(text) + _GAP for text in cell) for cell in cells)
    columns = min(_COLUMNS, len(predictions))
    rows = -(-len(predictions) // columns)
    height = max(1.2, _LINE * lines)
    figure = Figure(figsize=(4.5 * columns, rows * (height + 0.15) + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    if count > len(predictions):
        figure.suptitle(f"The first {len(predictions)} of {count:,} images", fontsize=10)
    axes = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1.2, 3] * columns).reshape(-1, 2)
    for pair, prediction, cell in zip(axes, predictions, cells, strict=False):
        _image(pair[0], prediction.pixels)
        pair[0].set_anchor("NE")
        _bars(pair[1], cell, [share for _, share in prediction.classes], height / _LINE, letters)
    for pair in axes[len(predictions) :]:
        pair[0].axis("off")
        pair[1].axis("off")
    note(figure, letters)
    return figure


def _bars(
    axes: Axes, texts: Sequence[Sequence[str]], shares: Sequence[float], lines: float, letters: Lettering
) -> None:
    """The first text alone, each other on a bar; one line is one unit of the vertical axis."""
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(lines, 0)
    top = 0.0
    for number, text in enumerate(texts):
        height = len(text) + _GAP
        middle = top + height / 2
        if number:
            axes.barh(middle, 1, height - 0.15, color=TRACK)
            axes.barh(middle, shares[number - 1], height - 0.15, color=SKY)
            axes.text(0.99, middle, f"{shares[number - 1]:.1%}", ha="right", va="center", fontsize=8)
        words = axes.text(0.015, middle, "\n".join(text), va="center", fontsize=8, family=letters.families)
        words.set(color="k" if number else WORDS, linespacing=1.15)
        top += height


def heated(prediction: ImagePrediction, heat: np.ndarray) -> Figure:
    """An image, and beside it in grey under the heat map of its likeliest class.

    Args:
        prediction: With at least one class.
        heat: float [S, S] in [0, 1].
    """
    name, share = prediction.classes[0]
    letters = lettering([name, _place(prediction)])
    title = _wrap(f"{letters.names[0]}   {share:.1%}", 56)
    figure = Figure(figsize=(6.4, 3.1 + 0.2 * len(title)), layout="constrained")
    figure.suptitle("\n".join(title), fontsize=11, family=letters.families)
    left, right = figure.subplots(1, 2)
    _image(left, prediction.pixels)
    left.set_title("\n".join(_wrap(letters.names[1], 28)), fontsize=8, family=letters.families, color=WORDS)
    right.axis("off")
    right.imshow(prediction.pixels.mean(0), cmap="gray", vmin=0, vmax=255)
    shade = right.imshow(heat, cmap="plasma", vmin=0, vmax=1, alpha=0.6, interpolation="bilinear")
    right.set_title("what speaks for it" if heat.any() else "nothing speaks for it here", fontsize=8, color=WORDS)
    scale = figure.colorbar(shade, ax=right, ticks=[0, 1], shrink=0.8)
    scale.ax.set_yticklabels(["none", "most"], fontsize=8)
    note(figure, letters)
    return figure


def _image(axes: Axes, pixels: np.ndarray) -> None:
    axes.axis("off")
    axes.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")


def _place(prediction: ImagePrediction) -> str:
    """A file by its name and its folder's."""
    return printable(str(Path(*Path(str(prediction.source)).parts[-2:])))


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width if text.isascii() else width // 2) or [""]
