"""Results of `probe`: a table and a figure of what the frozen features of each backbone tell."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cifar_transfer.base.files import write_csv, write_json, write_text
from cifar_transfer.base.text import markdown
from cifar_transfer.results import plots

TABLE = "probe.md"
TABLE_CSV = "probe.csv"
FIGURE = "probe.png"
HEADINGS = [  # of the table, in the order of `row_cells`
    "network",
    "test (%)",
    "balanced (%)",
    "val (%)",
    "1-nearest (%)",
    "5-nearest (%)",
    "20-nearest (%)",
    "means (%)",
    "1-shot (%)",
    "5-shot (%)",
    "10-shot (%)",
    "50-shot (%)",
    "features",
    "images/s",
    "features (s)",
    "heads (s)",
]


@dataclass(frozen=True)
class ProbeResult:
    """What the frozen features of a backbone tell of the classes. Accuracies are shares of 1.

    Args:
        label: Name of the backbone and its weights.
        val: Accuracy of logistic regression on the validation images.
        test: The same on the test images; None without any.
        balanced_accuracy: Mean of the accuracies on each class of these images.
        nearest_neighbours: Accuracy of a vote, by the number of neighbours that vote.
        nearest_mean: Accuracy of the nearest class mean.
        few_shot: Accuracies of several draws by the number of training images of a class.
        penalty: L2 penalty of the logistic regression.
        width: Number of features.
        images_per_class: Training images of a class, on average.
        precision: Precision in which the features were computed, "32-true" or "bf16-mixed".
        computed: Number of images whose features were not on disk.
        feature_seconds: Time that the features took.
        head_seconds: Time that the heads took.
    """

    label: str
    val: float
    test: float | None
    balanced_accuracy: float
    nearest_neighbours: dict[str, float]
    nearest_mean: float
    few_shot: dict[str, list[float]]
    penalty: float
    width: int
    images_per_class: int
    precision: str
    computed: int
    feature_seconds: float
    head_seconds: float

    @property
    def accuracy(self) -> float:
        """Accuracy by which backbones are ranked: on the test images if there are any."""
        return self.val if self.test is None else self.test


def write_result(path: Path, result: ProbeResult) -> None:
    """Write a result as JSON."""
    write_json(path, asdict(result))


def read_result(path: Path) -> ProbeResult:
    """Return the result that `write_result` has written."""
    return ProbeResult(**json.loads(path.read_text()))


def row_cells(result: ProbeResult) -> list[str]:
    """Return the cells of a backbone."""
    return [
        result.label,
        _percent(result.test),
        _percent(result.balanced_accuracy),
        _percent(result.val),
        _percent(result.nearest_neighbours["1"]),
        _percent(result.nearest_neighbours["5"]),
        _percent(result.nearest_neighbours["20"]),
        _percent(result.nearest_mean),
        _mean_and_deviation(result.few_shot.get("1")),
        _mean_and_deviation(result.few_shot.get("5")),
        _mean_and_deviation(result.few_shot.get("10")),
        _mean_and_deviation(result.few_shot.get("50")),
        str(result.width),
        _images_per_second(result),
        f"{result.feature_seconds:.0f}",
        f"{result.head_seconds:.0f}",
    ]


def _percent(share: float | None) -> str:
    """Return a share of 1 in percent, or an empty cell."""
    if share is None:
        return ""
    return f"{100 * share:.2f}"


def _mean_and_deviation(shares: Sequence[float] | None) -> str:
    """Return mean and standard deviation of shares in percent, or an empty cell."""
    if shares is None:
        return ""
    return f"{100 * np.mean(shares):.1f} ± {100 * np.std(shares):.1f}"


def _images_per_second(result: ProbeResult) -> str:
    """Return the speed of the features, or an empty cell if they were on disk."""
    if result.computed == 0:
        return ""
    return f"{result.computed / result.feature_seconds:.0f}"


def full_table(results: Sequence[ProbeResult], failed_labels: Sequence[str]) -> list[list[str]]:
    """Return the headings and a row for each backbone, the best first, the failed ones last."""
    table = [HEADINGS]
    for result in _ranked(results):
        table.append(row_cells(result))
    return table + _failed_rows(failed_labels, len(table[0]))


def short_table(results: Sequence[ProbeResult], failed_labels: Sequence[str]) -> list[list[str]]:
    """Return the same with fewer columns, which fit into a terminal."""
    table = [["network", "test (%)", "val (%)", "features (s)"]]
    for result in _ranked(results):
        table.append(
            [
                result.label,
                _percent(result.test),
                _percent(result.val),
                f"{result.feature_seconds:.0f}",
            ]
        )
    return table + _failed_rows(failed_labels, len(table[0]))


def _ranked(results: Sequence[ProbeResult]) -> list[ProbeResult]:
    """Return results, the most accurate first."""
    return sorted(results, key=lambda result: result.accuracy, reverse=True)


def _failed_rows(labels: Sequence[str], num_columns: int) -> list[list[str]]:
    """Return a row for each backbone that failed."""
    return [[f"{label}: failed", *[""] * (num_columns - 1)] for label in labels]


def write_tables(
    results: Sequence[ProbeResult], failed_labels: Sequence[str], folder: Path
) -> None:
    """Write the table as Markdown and CSV, and the figure, into a folder."""
    table = full_table(results, failed_labels)
    write_text(folder / TABLE, markdown(table))
    write_csv(folder / TABLE_CSV, table)
    if results:
        plots.save(accuracy_figure(results), folder / FIGURE)


def accuracy_figure(results: Sequence[ProbeResult]) -> Figure:
    """Draw the accuracy of logistic regression by the training images of a class.

    There is a line for each backbone.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, result in enumerate(_ranked(results)):
        accuracies = _accuracy_by_images(result)
        axes.plot(
            list(accuracies),
            [100 * share for share in accuracies.values()],
            "o-",
            color=plots.COLOURS[number % len(plots.COLOURS)],
            ms=4,
            label=result.label,
        )
    axes.set(xlabel="training images of a class", ylabel="accuracy (%)", xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _accuracy_by_images(result: ProbeResult) -> Mapping[int, float]:
    """Return the accuracy by the number of training images of a class, that of all images last."""
    accuracies: dict[int, float] = {}
    for shots, draws in result.few_shot.items():
        accuracies[int(shots)] = float(np.mean(draws))
    accuracies[result.images_per_class] = result.accuracy
    return accuracies
