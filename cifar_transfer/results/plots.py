"""Plots from plain arrays: curves, confusion, reliability, grids of images.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which the colour-blind tell apart.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cifar_transfer.base.files import atomic_write
from cifar_transfer.base.text import printable
from cifar_transfer.results.predictions import Predictions
from cifar_transfer.results.words import Lettering, lettering, word

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # all but yellow and black
BLUE, ORANGE, SKY, GREY = COLOURS[0], COLOURS[1], COLOURS[5], "#999999"
DPI = 100
LEVELS = 8  # rates that are marked on the scale
FEW = 100  # points of a curve, which are marked
COLUMNS = 8  # images in a row at most
NUMBERED = 20  # classes up to which a confusion matrix has numbers in its cells
MOST_CLASSES = 100  # in a figure; of more, those with the most mistakes
BY_EPOCH = ("train/loss_epoch", "val/loss", "train/acc", "val/acc", "lr")
SPLITS = {"val": "validation", "test": "test"}  # in words
SMOOTHED = 0.95  # weight of the past in the smoothed loss, as TensorBoard's slider has it


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure as a PNG, in one move, with options of matplotlib's `savefig`."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", **{"dpi": DPI} | options)


def shortened(name: str, most: int = 40) -> str:
    """A name of at most so many letters: a folder's may have 255, beside which nothing else has room."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


class Curve(NamedTuple):
    """A logged figure: x (steps or epochs) and y, float64 [N] each."""

    x: np.ndarray
    y: np.ndarray


class Phases(NamedTuple):
    """What is frozen at first, and when that changes."""

    frozen: str  # of the first phase: "backbone frozen" or "partly frozen"
    begins: Sequence[
        float
    ]  # epochs or steps before each other phase; the last one may be the run's end


def iterations(curves: dict[str, Curve], phases: Phases, val: str = "validation") -> Figure:
    """Loss and accuracy by iteration from 1, of batches and smoothed, with the validations; the first phase shaded.

    Args:
        curves: Of `train/loss`, `train/acc_step`, `val/loss_step`, `val/acc_step`; what is missing is left out.
        phases: With their steps.
        val: "test" where the validation images are those of the test.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = [
        ("loss", 1, "train/loss", "val/loss_step"),
        ("accuracy", 100, "train/acc_step", "val/acc_step"),
    ]
    panels = [panel for panel in panels if panel[2] in curves]
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (what, scale, batch, tested) in zip(places, panels, strict=True):
        x, y = curves[batch].x + 1, scale * curves[batch].y
        marker = "." if len(x) < FEW else ""
        axes.plot(x, y, BLUE, marker=marker, alpha=0.35, lw=0.8, label=word("one batch"))
        axes.plot(x, smooth(y), BLUE, marker=marker, lw=1.8, label=word(f"training {what}"))
        if tested in curves:
            x, y = curves[tested].x + 1, scale * curves[tested].y
            axes.plot(x, y, "s-", color=ORANGE, ms=3, lw=1, label=word(f"{val} {what}"))
        _shade(axes, phases)
        _finish(axes, "iteration", what if scale == 1 else f"{what} (%)")
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average without the pull of its beginning (Adam's correction, arXiv:1412.6980)."""
    past = min(SMOOTHED, max(0, 1 - 10 / len(values)))  # of few values less
    kernel = past ** np.arange(min(len(values), 1000))
    return (
        np.convolve(values, kernel)[: len(values)]
        / np.convolve(np.ones(len(values)), kernel)[: len(values)]
    )


def epochs(curves: dict[str, Curve], phases: Phases, val: str = "validation") -> Figure:
    """Loss and accuracy by epoch from 1: the first phase is shaded, and steps of the learning rate are marked.

    Args:
        curves: Of `lr`, `train/loss_epoch`, `val/loss`, `train/acc`, `val/acc`; what is missing is left out.
        phases: With their epochs.
        val: "test" where the validation images are those of the test.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    lr = curves["lr"]
    changes = lr.x[1:][lr.y[1:] != lr.y[:-1]] - 1
    if len(changes) > len(lr.x) / 2:
        changes = changes[:0]  # a rate that always changes has no steps
    panels = (
        ("loss", 1, ("train/loss_epoch", "val/loss")),
        ("accuracy", 100, ("train/acc", "val/acc")),
    )
    for axes, (what, scale, tags) in zip(figure.subplots(1, 2), panels, strict=True):
        for tag, color, label, marker in zip(
            tags, (BLUE, ORANGE), ("training", val), "os", strict=True
        ):
            if tag in curves:
                x, y = curves[tag].x, scale * curves[tag].y
                axes.plot(x, y, marker + "-", color=color, ms=3, label=word(f"{label} {what}"))
        _shade(axes, phases)
        for number, epoch in enumerate(sorted({*changes} - {*phases.begins})):
            axes.axvline(
                epoch + 0.5,
                color=GREY,
                ls=":",
                lw=1,
                label="" if number else word("learning rate changed"),
            )
        _finish(axes, "epoch", what if scale == 1 else f"{what} (%)")
    return figure


def _shade(axes: Axes, phases: Phases) -> None:
    for number, begin in enumerate(phases.begins):
        if number:
            axes.axvline(
                begin + 0.5,
                color=GREY,
                ls="--",
                lw=1,
                label="" if number > 1 else word("more unfrozen"),
            )
        else:
            axes.axvspan(0.5, begin + 0.5, color=GREY, alpha=0.2, lw=0, label=word(phases.frozen))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.02)


def rates_by_stage(rates: np.ndarray, stages: Sequence[str]) -> Figure:
    """Which stage trains when, and how fast: learning rates, float [stages, epochs], 0 while frozen; last on top."""
    shown = np.ma.masked_equal(rates, 0)[::-1]
    height = 1.6 + 0.28 * len(stages)
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("#dddddd")
    low, high = (shown.min(), shown.max()) if shown.count() else (1.0, 1.0)
    colours = LogNorm(low, high if high > low else 2 * low)
    extent = 0.5, rates.shape[1] + 0.5, len(stages), 0
    picture = axes.imshow(shown, "viridis", norm=colours, aspect="auto", extent=extent)
    axes.set_yticks(
        np.arange(len(stages)) + 0.5, [printable(stage) for stage in reversed(stages)], fontsize=9
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(
        xlabel=word("epoch"),
        title=word("Learning rate by stage at the end of each epoch (grey: 0)"),
    )
    levels = np.unique(shown.compressed())
    exact: dict[str, Any] = {"ticks": levels, "format": "%.2g"} if len(levels) <= LEVELS else {}
    figure.colorbar(picture, ax=axes, pad=0.01, **exact).minorticks_off()
    return figure


def confusion(predictions: Predictions, split: str = "test") -> Figure:
    """Counts, and shares of each class's images; numbers in the cells of up to 20 classes."""
    counts = predictions.confusion()
    mistakes = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    shown = np.sort(np.argsort(-mistakes, kind="stable")[:MOST_CLASSES])
    shares = (counts / np.maximum(counts.sum(1, keepdims=True), 1))[np.ix_(shown, shown)]
    every, counts = len(counts), counts[np.ix_(shown, shown)]
    letters, classes, few = (
        lettering(predictions.names[row] for row in shown),
        len(shown),
        len(shown) <= NUMBERED,
    )
    names = [shortened(letters.names[predictions.names[row]]) for row in shown]
    # Letters and cells in inches; other scripts' letters are wide.
    letter, side = (0.085, max(2.4, 0.42 * classes)) if few else (0.048, 0.13 * classes)
    longest = letter * max(len(name) * (1 if name.isascii() else 1.6) for name in names)
    figure = Figure(figsize=(2 * (side + longest + 1), side + longest + 1.8), layout="constrained")
    panels = ("number of images", counts), ("% of the class", 100 * shares)
    for axes, (title, values) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.imshow(values, cmap="Blues", vmin=0, vmax=max(1, values.max()))
        axes.set_title(word(title))
        for axis, label in ((axes.xaxis, "predicted"), (axes.yaxis, "true")):
            axis.set_ticks(range(classes), names, fontsize=9 if few else 5, family=letters.families)
            axis.set_label_text(word(label))
        axes.tick_params(axis="x", rotation=90 if longest * classes > side else 0)
        for (row, column), value in np.ndenumerate(values) if few else ():
            color = "w" if value > values.max() / 2 else "k"
            axes.text(
                column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color
            )
    accuracy, of = float(predictions.correct.float().mean()), len(predictions.labels)
    score = word(f"{SPLITS[split]} accuracy")
    title = word(
        "Confusion matrix: {score} {value:.2%} of {count:,} images",
        score=score,
        value=accuracy,
        count=of,
    )
    if classes < every:
        title += "\n" + word(
            "The {shown} of {all:,} classes with the most mistakes", shown=classes, all=every
        )
    figure.suptitle(title)
    note(figure, letters)
    return figure


def per_class(predictions: Predictions) -> Figure:
    """A table of precision, recall, F1 and the number of images; the worst F1 first."""
    counts = predictions.confusion()
    hits, truth, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    f1 = 2 * hits / np.maximum(said + truth, 1)
    order = np.argsort(f1, kind="stable")[:MOST_CLASSES]
    letters = lettering(predictions.names[row] for row in order)
    lines, names = (
        range(len(order)),
        [shortened(letters.names[predictions.names[row]]) for row in order],
    )
    figure = Figure(figsize=(7, 0.9 + 0.24 * len(order)), layout="constrained")
    axes = figure.subplots()
    axes.barh(lines, 100 * f1[order], color=BLUE, alpha=0.3, height=0.8)
    axes.set_yticks(lines, names, family=letters.families)
    precision, recall = hits / np.maximum(said, 1), hits / np.maximum(truth, 1)
    columns = (
        ("precision", 100 * precision),
        ("recall", 100 * recall),
        ("F1", 100 * f1),
        ("images", truth),
    )
    for x, (title, values) in zip(range(116, 180, 20), columns, strict=True):
        axes.text(x, -1, word(title), ha="right", va="center", weight="bold")
        for line, value in zip(lines, values[order], strict=True):
            axes.text(
                x,
                line,
                f"{value:d}" if title == "images" else f"{value:.1f}",
                ha="right",
                va="center",
            )
    axes.set(xlim=(0, 180), ylim=(len(order) - 0.4, -1.6), xticks=[0, 50, 100])
    axes.set_xlabel("F1 (%)", loc="left")
    if len(order) < len(counts):
        title = word(
            "The {shown} of {all:,} classes with the lowest F1", shown=len(order), all=len(counts)
        )
        axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    note(figure, letters)
    return figure


def reliability(predictions: Predictions, bins: int = 15) -> Figure:
    """Accuracy by confidence, with the expected calibration error, and how many images there are to each."""
    confidences = predictions.confidences.numpy()
    place = np.minimum((confidences * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    full, edges = count > 0, np.arange(bins) / bins
    accuracy = np.bincount(place, predictions.correct.numpy(), bins)[full] / count[full]
    confidence = np.bincount(place, confidences, bins)[full] / count[full]
    figure = Figure(figsize=(6, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.bar(edges[full], accuracy, 1 / bins, align="edge", color=BLUE, alpha=0.6, edgecolor="w")
    upper.plot(confidence, accuracy, "o", color=BLUE, ms=4)
    upper.plot([0, 1], [0, 1], "--", color=GREY, lw=1)
    upper.set_title(
        word("expected calibration error {error:.1%}", error=predictions.calibration_error(bins))
    )
    _finish(upper, "", "accuracy")
    bars = lower.bar(edges, count, 1 / bins, align="edge", color=GREY, edgecolor="w")
    lower.bar_label(
        bars, [f"{number:,}" if number else "" for number in count], fontsize=7, padding=1
    )
    lower.margins(y=0.15)
    lower.set_xlim(0, 1)
    _finish(lower, "confidence", "images")
    return figure


def grid(images: np.ndarray, titles: Sequence[Sequence[str]], heading: str) -> Figure:
    """Images, uint8 [N, 3, H, W], RGB, with a few lines of words above each, in full rows of five to eight.

    Of more than eight, the last few that would begin a row are left out.
    """
    few = len(images) <= COLUMNS
    columns = (
        len(images) if few else min(range(COLUMNS, COLUMNS // 2, -1), key=lambda n: len(images) % n)
    )
    rows = len(images) // columns
    letters = lettering(line for lines in titles for line in lines)
    lines = max(map(len, titles), default=0)
    size = max(4.0, 1.35 * columns), 0.5 + rows * (1.3 + 0.17 * lines)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(heading, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, pixels, words in zip(axes, images, titles, strict=False):
        image(ax, pixels)
        text = "\n".join(shortened(letters.names[line], 16) for line in words)
        ax.set_title(text, fontsize=8, family=letters.families, pad=3)
    note(figure, letters)
    return figure


def image(axes: Axes, pixels: np.ndarray) -> None:
    """Show uint8 [3, H, W], RGB."""
    axes.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")


def note(figure: Figure, letters: Lettering) -> None:
    """Say below all else what was done to the names, if anything was."""
    if letters.note:
        figure.supxlabel(letters.note, fontsize=7, color=GREY)


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=word(x), ylabel=word(y), axisbelow=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
