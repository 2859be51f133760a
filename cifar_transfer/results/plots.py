"""Plots from plain arrays: curves of a run, predictions for a split, grids of images.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which colour-blind readers
can tell apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cifar_transfer.base.files import atomic_write
from cifar_transfer.base.text import printable
from cifar_transfer.network.temperature import NO_TEMPERATURE
from cifar_transfer.results.calibration import CALIBRATION_BINS, ConfidenceBins
from cifar_transfer.results.coverage import THRESHOLDS, answered, coverage_curve
from cifar_transfer.results.predictions import Predictions
from cifar_transfer.results.scores import class_scores
from cifar_transfer.results.words import Lettering, lettering, word

BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PINK = "#CC79A7"
YELLOW = "#E69F00"
SKY = "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY)
GREY = "#999999"
LIGHT_GREY = "#dddddd"

DPI = 100
SMOOTHING = 0.95  # weight of the past in the smoothed loss, as TensorBoard's slider has it
MAX_SMOOTHING_STEPS = 1000  # older steps weigh less than 1e-22
MAX_MARKED_POINTS = 99  # a longer curve is drawn without markers
MAX_COLORBAR_TICKS = 8  # more learning rates are not named one by one
MAX_NUMBERED_CLASSES = 20  # larger confusion matrices have no numbers in their cells
MAX_CLASSES = 100  # in a figure; of more, those with the most mistakes
MAX_CLASS_NAME_CHARS = 40  # a folder's name may have 255, beside which nothing else has room
MAX_TITLE_CHARS = 16  # in a line above an image of a grid
MAX_GRID_COLUMNS = 8
MIN_GRID_COLUMNS = 5  # in a grid of several rows
# Width of a letter in inches, in the larger and the smaller font of a confusion matrix.
LETTER_INCHES = 0.085
SMALL_LETTER_INCHES = 0.048
WIDE_LETTER = 1.6  # width of a letter outside ASCII, such as a Chinese one, in letters


class Curve(NamedTuple):
    """Values that were logged under one name."""

    x: np.ndarray  # steps from 0 or epochs from 1, float64 [N]
    y: np.ndarray  # float64 [N]


@dataclass(frozen=True)
class RunCurves:
    """Curves of a run; None for those that were not logged. Accuracies are shares of 1.

    Attributes:
        step_loss: Loss of single training batches, by step.
        step_accuracy: Accuracy of single training batches, by step.
        step_val_loss: Validation loss, by step.
        step_val_accuracy: Validation accuracy, by step.
        train_loss: Mean training loss, by epoch, like all that follow.
        train_accuracy: Training accuracy.
        val_loss: Validation loss.
        val_accuracy: Validation accuracy.
        learning_rate: Learning rate at the end of each epoch.
        trainable_parameters: How many parameters train.
        steps: How many steps the run has made by the end of each epoch.
        stage_rates: Learning rates of each stage of the network by epoch, float64 [N], from stem to
            head; 0 while it is frozen.
    """

    step_loss: Curve | None = None
    step_accuracy: Curve | None = None
    step_val_loss: Curve | None = None
    step_val_accuracy: Curve | None = None
    train_loss: Curve | None = None
    train_accuracy: Curve | None = None
    val_loss: Curve | None = None
    val_accuracy: Curve | None = None
    learning_rate: Curve | None = None
    trainable_parameters: Curve | None = None
    steps: Curve | None = None
    stage_rates: dict[str, np.ndarray] = field(default_factory=dict)


class Phases(NamedTuple):
    """Phases of a run, to be marked in its curves."""

    first: str  # what is frozen in the first phase: "backbone frozen" or "partly frozen"
    # How many epochs or steps came before each later phase. The first phase is shaded up to the
    # first of these, which may be the end of the run; none means that nothing was frozen.
    beginnings: Sequence[float]


class _MatrixLayout(NamedTuple):
    """How large a confusion matrix is drawn."""

    matrix_inches: float  # side of the square
    name_inches: float  # length of the longest name
    font_size: int
    name_rotation: int  # of the names below, in degrees
    numbered: bool  # whether each cell has its number


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure as a PNG file, in one move.

    Args:
        figure: The figure.
        path: The file, in an existing folder.
        options: Further arguments of `Figure.savefig`.
    """
    options.setdefault("dpi", DPI)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", **options)


def shortened(name: str, max_chars: int = MAX_CLASS_NAME_CHARS) -> str:
    """Return a name, cut off with an ellipsis if it has more than `max_chars` letters."""
    if len(name) <= max_chars:
        return name
    return f"{name[: max_chars - 1]}…"


def curves_by_step(curves: RunCurves, phases: Phases, val_name: str = "validation") -> Figure:
    """Plot loss and accuracy by iteration, counted from 1. The first phase is shaded.

    Args:
        curves: Those by step are drawn. There must be a `step_loss`.
        phases: Phases of the run, in steps.
        val_name: "test" if the run validates on the test images.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    if curves.step_accuracy is None:
        loss_axes = figure.subplots()
    else:
        loss_axes, accuracy_axes = figure.subplots(1, 2)
        accuracy = _percent(curves.step_accuracy)
        val_accuracy = _percent(curves.step_val_accuracy)
        _plot_by_step(accuracy_axes, "accuracy", accuracy, val_accuracy, val_name)
        _mark_phases(accuracy_axes, phases)
        _finish(accuracy_axes, "iteration", "accuracy (%)")
    _plot_by_step(loss_axes, "loss", curves.step_loss, curves.step_val_loss, val_name)
    _mark_phases(loss_axes, phases)
    _finish(loss_axes, "iteration", "loss")
    return figure


def _plot_by_step(
    axes: Axes, name: str, batches: Curve | None, validations: Curve | None, val_name: str
) -> None:
    """Plot single batches, their smoothed curve, and the validations."""
    if batches is not None:
        x = batches.x + 1
        marker = ""
        if len(x) <= MAX_MARKED_POINTS:
            marker = "."
        axes.plot(
            x, batches.y, BLUE, marker=marker, alpha=0.35, linewidth=0.8, label=word("one batch")
        )
        axes.plot(
            x,
            smooth(batches.y),
            BLUE,
            marker=marker,
            linewidth=1.8,
            label=word(f"training {name}"),
        )
    if validations is not None:
        label = word(f"{val_name} {name}")
        axes.plot(
            validations.x + 1,
            validations.y,
            "s-",
            color=ORANGE,
            markersize=3,
            linewidth=1,
            label=label,
        )


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the exponential moving average of values, both float64 [N].

    Its beginning is corrected as in Adam (arXiv:1412.6980).
    """
    count = len(values)
    decay = min(SMOOTHING, max(0, 1 - 10 / count))  # few values are smoothed less
    weights = decay ** np.arange(min(count, MAX_SMOOTHING_STEPS))
    sums = np.convolve(values, weights)[:count]
    sums_of_weights = np.convolve(np.ones(count), weights)[:count]
    return sums / sums_of_weights


def curves_by_epoch(curves: RunCurves, phases: Phases, val_name: str = "validation") -> Figure:
    """Plot loss and accuracy by epoch, counted from 1.

    The first phase is shaded, and changes of the learning rate are marked.

    Args:
        curves: Those by epoch are drawn. There must be a `learning_rate`.
        phases: Phases of the run, in epochs.
        val_name: "test" if the run validates on the test images.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    changes = sorted(_rate_changes(curves.learning_rate) - set(phases.beginnings))
    _plot_by_epoch(loss_axes, "loss", curves.train_loss, curves.val_loss, val_name)
    _plot_by_epoch(
        accuracy_axes,
        "accuracy",
        _percent(curves.train_accuracy),
        _percent(curves.val_accuracy),
        val_name,
    )
    for axes in (loss_axes, accuracy_axes):
        _mark_phases(axes, phases)
        _vertical_lines(axes, changes, ":", word("learning rate changed"))
    _finish(loss_axes, "epoch", "loss")
    _finish(accuracy_axes, "epoch", "accuracy (%)")
    return figure


def _plot_by_epoch(
    axes: Axes, name: str, training: Curve | None, validation: Curve | None, val_name: str
) -> None:
    if training is not None:
        label = word(f"training {name}")
        axes.plot(training.x, training.y, "o-", color=BLUE, markersize=3, label=label)
    if validation is not None:
        label = word(f"{val_name} {name}")
        axes.plot(validation.x, validation.y, "s-", color=ORANGE, markersize=3, label=label)


def _rate_changes(rate: Curve | None) -> set[float]:
    """Return after which epochs the learning rate changed.

    A rate that changes after most epochs, as a decay does, has no such epochs.
    """
    if rate is None:
        return set()
    changed = rate.y[1:] != rate.y[:-1]
    changes = rate.x[1:][changed] - 1
    if len(changes) > len(rate.x) / 2:
        return set()
    return set(changes.tolist())


def _percent(curve: Curve | None) -> Curve | None:
    if curve is None:
        return None
    return Curve(curve.x, 100 * curve.y)


def _mark_phases(axes: Axes, phases: Phases) -> None:
    """Shade the first phase and mark where later ones begin."""
    if phases.beginnings:
        end = phases.beginnings[0] + 0.5
        axes.axvspan(0.5, end, color=GREY, alpha=0.2, linewidth=0, label=word(phases.first))
    _vertical_lines(axes, phases.beginnings[1:], "--", word("more unfrozen"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.02)


def _vertical_lines(axes: Axes, positions: Sequence[float], style: str, label: str) -> None:
    """Draw a line between each position and the next whole number; the legend has one of them."""
    for number, position in enumerate(positions):
        line = axes.axvline(position + 0.5, color=GREY, linestyle=style, linewidth=1)
        if number == 0:
            line.set_label(label)


def rates_by_stage(rates: np.ndarray, stages: Sequence[str]) -> Figure:
    """Plot which stage of the network trains when, and at which learning rate.

    Args:
        rates: Learning rates, float64 [stages, epochs], 0 while a stage is frozen.
        stages: Names of the stages, from stem to head; the head is drawn on top.
    """
    positive_rates = np.ma.masked_equal(rates, 0)[::-1]
    distinct_rates = np.unique(positive_rates.compressed())
    lowest = 1.0
    highest = 1.0
    if len(distinct_rates):
        lowest = distinct_rates[0]
        highest = distinct_rates[-1]
    if lowest == highest:
        highest = 2 * lowest  # a logarithmic scale needs two ends
    num_stages, num_epochs = rates.shape
    figure = Figure(figsize=(10, 1.6 + 0.28 * num_stages), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(LIGHT_GREY)
    image = axes.imshow(
        positive_rates,
        "viridis",
        norm=LogNorm(lowest, highest),
        aspect="auto",
        extent=(0.5, num_epochs + 0.5, num_stages, 0),
    )
    names = [printable(stage) for stage in reversed(stages)]
    axes.set_yticks(np.arange(num_stages) + 0.5, names, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(word("epoch"))
    axes.set_title(word("Learning rate by stage at the end of each epoch (grey: 0)"))
    colorbar = figure.colorbar(image, ax=axes, pad=0.01)
    if len(distinct_rates) <= MAX_COLORBAR_TICKS:
        colorbar.set_ticks(distinct_rates.tolist())
        colorbar.ax.yaxis.set_major_formatter("{x:.2g}")
    colorbar.minorticks_off()
    return figure


def confusion(predictions: Predictions, split: str = "test") -> Figure:
    """Plot the confusion matrix twice: as counts, and as shares of the images of each class.

    Args:
        predictions: Of more than 100 classes, those with the most mistakes are drawn.
        split: "val" or "test".
    """
    all_counts = predictions.confusion()
    mistakes = all_counts.sum(0) + all_counts.sum(1) - 2 * all_counts.diagonal()
    classes = np.sort(np.argsort(-mistakes, kind="stable")[:MAX_CLASSES])
    cells = np.ix_(classes, classes)
    counts = all_counts[cells]
    images_of_class = np.maximum(all_counts.sum(1, keepdims=True), 1)
    shares = (all_counts / images_of_class)[cells]
    names, letters = _names_of(predictions, classes)

    layout = _matrix_layout(names)
    width = 2 * (layout.matrix_inches + layout.name_inches + 1)
    # The widths leave a matrix a little more room than it asks for, and it stays a square.
    height = 1.08 * layout.matrix_inches + layout.name_inches + 1.8
    figure = Figure(figsize=(width, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set_title(word("number of images"))
    right.set_title(word("% of the class"))
    for axes, values in ((left, counts), (right, 100 * shares)):
        _draw_matrix(axes, values, names, letters, layout)
    figure.suptitle(_confusion_title(predictions, split, len(classes)))
    add_note(figure, letters)
    return figure


def _matrix_layout(names: Sequence[str]) -> _MatrixLayout:
    """Return how large a confusion matrix of these classes is drawn."""
    longest = max(map(_width, names))
    numbered = len(names) <= MAX_NUMBERED_CLASSES
    if numbered:
        font_size = 9
        name_inches = LETTER_INCHES * longest
        matrix_inches = max(2.4, 0.42 * len(names))
    else:
        font_size = 5
        name_inches = SMALL_LETTER_INCHES * longest
        matrix_inches = 0.13 * len(names)
    rotation = 0
    if name_inches * len(names) > matrix_inches:
        rotation = 90
    return _MatrixLayout(matrix_inches, name_inches, font_size, rotation, numbered)


def _draw_matrix(
    axes: Axes,
    values: np.ndarray,
    names: Sequence[str],
    letters: Lettering,
    layout: _MatrixLayout,
) -> None:
    """Draw a matrix, float64 or int64 [C, C], true classes downwards."""
    axes.imshow(values, cmap="Blues", vmin=0, vmax=max(1, values.max()))
    ticks = range(len(names))
    axes.set_xticks(ticks, names, fontsize=layout.font_size, family=letters.families)
    axes.set_yticks(ticks, names, fontsize=layout.font_size, family=letters.families)
    axes.set_xlabel(word("predicted"))
    axes.set_ylabel(word("true"))
    axes.tick_params(axis="x", rotation=layout.name_rotation)
    if layout.numbered:
        _number_cells(axes, values)


def _names_of(predictions: Predictions, classes: np.ndarray) -> tuple[list[str], Lettering]:
    """Return texts to draw for some of the classes, and how to draw them."""
    names = [predictions.names[number] for number in classes]
    letters = lettering(names)
    texts = [shortened(letters.text(name)) for name in names]
    return texts, letters


def _width(name: str) -> float:
    """Return the width of a name in letters of ASCII."""
    if name.isascii():
        return len(name)
    return WIDE_LETTER * len(name)


def _number_cells(axes: Axes, values: np.ndarray) -> None:
    """Write each value into its cell of a matrix, in white where the cell is dark."""
    for (row, column), value in np.ndenumerate(values):
        text = axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8)
        if value > values.max() / 2:
            text.set_color("w")


def _confusion_title(predictions: Predictions, split: str, num_shown: int) -> str:
    accuracy = word("test accuracy")
    if split == "val":
        accuracy = word("validation accuracy")
    title = word(
        "Confusion matrix: {score} {value:.2%} of {count:,} images",
        score=accuracy,
        value=float(predictions.correct.float().mean()),
        count=len(predictions.labels),
    )
    num_classes = len(predictions.names)
    if num_shown == num_classes:
        return title
    selection = word(
        "The {shown} of {all:,} classes with the most mistakes", shown=num_shown, all=num_classes
    )
    return f"{title}\n{selection}"


def per_class(predictions: Predictions) -> Figure:
    """Draw a table of precision, recall, F1 and images of each class, the lowest F1 first."""
    scores = class_scores(predictions.confusion())
    order = np.argsort(scores.f1, kind="stable")[:MAX_CLASSES]
    names, letters = _names_of(predictions, order)

    # Beside long names the columns need their width all the same.
    width = max(7, 5.6 + LETTER_INCHES * max(map(_width, names)))
    figure = Figure(figsize=(width, 0.9 + 0.24 * len(order)), layout="constrained")
    axes = figure.subplots()
    lines = range(len(order))
    axes.barh(lines, 100 * scores.f1[order], color=BLUE, alpha=0.3, height=0.8)
    axes.set_yticks(lines, names, family=letters.families)
    # Bars end at 100; the columns of the table are to their right.
    _add_column(axes, 116, word("precision"), 100 * scores.precision[order], ".1f")
    _add_column(axes, 136, word("recall"), 100 * scores.recall[order], ".1f")
    _add_column(axes, 156, "F1", 100 * scores.f1[order], ".1f")
    _add_column(axes, 176, word("images"), scores.support[order], "d")
    axes.set(xlim=(0, 180), ylim=(len(order) - 0.4, -1.6), xticks=[0, 50, 100])
    axes.set_xlabel("F1 (%)", loc="left")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if len(order) < len(predictions.names):
        title = word(
            "The {shown} of {all:,} classes with the lowest F1",
            shown=len(order),
            all=len(predictions.names),
        )
        axes.set_title(title, fontsize=10)
    add_note(figure, letters)
    return figure


def _add_column(axes: Axes, x: float, heading: str, values: np.ndarray, form: str) -> None:
    """Write a column of a table, aligned to the right at `x`."""
    axes.text(x, -1, heading, ha="right", va="center", weight="bold")
    for line, value in enumerate(values):
        axes.text(x, line, format(value, form), ha="right", va="center")


def reliability(predictions: Predictions, num_bins: int = CALIBRATION_BINS) -> Figure:
    """Plot accuracy by confidence, the expected calibration error, and a histogram below.

    With a temperature, the same without it is drawn to the left.
    """
    drawn = [(word("temperature {value:.2f}", value=predictions.temperature), predictions)]
    if predictions.temperature != NO_TEMPERATURE:
        before = predictions.at_temperature(NO_TEMPERATURE)
        drawn.insert(0, (word("without temperature"), before))
    columns = len(drawn)
    figure = Figure(figsize=(6 * columns, 6.5), layout="constrained")
    grid_axes = figure.subplots(
        2, columns, sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1)
    )
    for (heading, shown), (upper, lower) in zip(drawn, grid_axes.T, strict=True):
        bins = shown.confidence_bins(num_bins)
        _draw_reliability(upper, lower, bins)
        title = word("expected calibration error {error:.1%}", error=bins.calibration_error)
        if columns > 1:
            title = f"{heading}\n{title}"
        upper.set_title(title)
    return figure


def _draw_reliability(upper: Axes, lower: Axes, bins: ConfidenceBins) -> None:
    """Plot accuracy by confidence, and below how many predictions have that confidence."""
    num_bins = len(bins.counts)
    edges = np.arange(num_bins) / num_bins
    width = 1 / num_bins
    filled = bins.counts > 0
    accuracies = bins.accuracies[filled]
    upper.bar(edges[filled], accuracies, width, align="edge", color=BLUE, alpha=0.6, edgecolor="w")
    upper.plot(bins.confidences[filled], accuracies, "o", color=BLUE, markersize=4)
    upper.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
    _finish(upper, "", "accuracy")

    bars = lower.bar(edges, bins.counts, width, align="edge", color=GREY, edgecolor="w")
    lower.bar_label(bars, fmt=_count_label, fontsize=7, padding=1)
    lower.margins(y=0.15)
    lower.set_xlim(0, 1)
    _finish(lower, "confidence", "images")


def coverage(predictions: Predictions) -> Figure:
    """Plot accuracy by the share of images that is answered, and mark some thresholds."""
    curve = coverage_curve(predictions)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(100 * curve.shares, 100 * curve.accuracies, BLUE, linewidth=1.8)
    share_before = None
    for threshold in THRESHOLDS:
        share, accuracy = answered(predictions, threshold)
        if accuracy is None or share == share_before:
            continue
        share_before = share
        axes.plot(100 * share, 100 * accuracy, "o", color=ORANGE, markersize=5, clip_on=False)
        if threshold == 0:
            continue
        axes.annotate(
            f"{threshold:g}",
            (100 * share, 100 * accuracy),
            xytext=(3, 5),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xlim(0, 100)
    axes.margins(y=0.12)
    title = word("Answering where the confidence reaches a threshold")
    legend = word(
        "orange: {thresholds}, and all",
        thresholds=", ".join(f"{threshold:g}" for threshold in THRESHOLDS[1:]),
    )
    axes.set_title(f"{title}\n({legend})", fontsize=10)
    _finish(axes, "share of the images that is answered (%)", "accuracy of the answers (%)")
    return figure


def _count_label(count: float) -> str:
    if count == 0:
        return ""
    return f"{count:,.0f}"


def grid(images: np.ndarray, titles: Sequence[Sequence[str]], heading: str) -> Figure:
    """Draw images in full rows: up to eight in one row, more in rows of five to eight.

    Of more than eight images, the last ones that would begin another row are left out.

    Args:
        images: uint8 [N, 3, H, W], RGB.
        titles: Lines of text above each image.
        heading: Text above all.
    """
    columns = _grid_columns(len(images))
    rows = len(images) // columns
    letters = lettering(chain.from_iterable(titles))
    title_lines = max(map(len, titles), default=0)
    width = max(4.0, 1.35 * columns)
    height = 0.5 + rows * (1.3 + 0.17 * title_lines)
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(heading, fontsize=11)
    grid_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, pixels, lines in zip(grid_axes, images, titles, strict=False):
        show_image(axes, pixels)
        title = "\n".join(shortened(letters.text(line), MAX_TITLE_CHARS) for line in lines)
        axes.set_title(title, fontsize=8, family=letters.families, pad=3)
    add_note(figure, letters)
    return figure


def _grid_columns(num_images: int) -> int:
    """Return the number of columns that leaves out the fewest images, the largest of several."""
    if num_images <= MAX_GRID_COLUMNS:
        return num_images
    columns = range(MAX_GRID_COLUMNS, MIN_GRID_COLUMNS - 1, -1)
    return min(columns, key=lambda number: num_images % number)


def show_image(axes: Axes, pixels: np.ndarray) -> None:
    """Show an image, uint8 [3, H, W], RGB, without a frame."""
    axes.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")
    axes.axis("off")


def add_note(figure: Figure, letters: Lettering) -> None:
    """Write below the figure which letters were replaced, if any were."""
    if letters.note:
        figure.supxlabel(letters.note, fontsize=7, color=GREY)


def _finish(axes: Axes, x_label: str, y_label: str) -> None:
    """Add the labels of the axes, the grid, and a legend above if anything has a label."""
    axes.set(xlabel=word(x_label), ylabel=word(y_label), axisbelow=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
