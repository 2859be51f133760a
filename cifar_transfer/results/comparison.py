"""The comparison of several networks over one seed or more: tables, and a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cifar_transfer.base.files import write_csv, write_text
from cifar_transfer.base.text import latex, markdown
from cifar_transfer.results import plots
from cifar_transfer.results.intervals import (
    DIFFERENCE,
    Interval,
    interval_cells,
    interval_columns,
    interval_of,
    interval_text,
    number,
    paired_difference,
    seeds_note,
)

MARKERS = "os^Dvph<>X"
FIGURE = "comparison.png"
TABLE = "comparison.md"


@dataclass(frozen=True)
class ComparedRun:
    """What the run of a network with one seed came to.

    Attributes:
        seed: Seed of the run.
        result: Content of its `result.json`: "parameters", "best/val_acc", ...; {} if it failed.
        failure: Why there is no result; "" if there is one.
    """

    seed: int
    result: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""

    def value(self, key: str, factor: float = 1.0) -> float | None:
        """Return a value of the result times a factor, or None if there is no such value."""
        value = self.result.get(key)
        if value is None:
            return None
        return factor * float(value)

    @property
    def test_accuracy(self) -> float | None:
        """Accuracy on the test images in per cent; None if there are none."""
        return self.value("best/test_acc", 100)

    @property
    def validation_accuracy(self) -> float | None:
        """Accuracy on the validation images in per cent."""
        return self.value("best/val_acc", 100)

    @property
    def minutes(self) -> float | None:
        """Time that the training took, in minutes."""
        return self.value("seconds", 1 / 60)

    @property
    def images_per_second(self) -> float | None:
        """Training speed while everything is unfrozen."""
        return self.value("images_per_second")


@dataclass(frozen=True)
class ComparedNetwork:
    """A network of a comparison, with its runs.

    Attributes:
        backbone: Name of the backbone.
        label: The backbone and its weights, for people.
        scratch: Whether it was trained without pretrained weights.
        runs: A run for each seed.
    """

    backbone: str
    label: str
    scratch: bool
    runs: Sequence[ComparedRun]

    @property
    def finished_runs(self) -> list[ComparedRun]:
        """Runs that have a result."""
        return [run for run in self.runs if not run.failure]

    @property
    def failures(self) -> list[str]:
        """What failed, a text for each run that did."""
        if len(self.runs) == 1:
            return [run.failure for run in self.runs if run.failure]
        return [f"seed {run.seed} {run.failure}" for run in self.runs if run.failure]

    def accuracies(self, split: str) -> dict[int, float]:
        """Return the accuracies on a split, "test" or "val", in per cent by seed."""
        found = {}
        for run in self.finished_runs:
            accuracy = run.value(f"best/{split}_acc", 100)
            if accuracy is not None:
                found[run.seed] = accuracy
        return found

    def mean(self, key: str, factor: float = 1.0) -> float | None:
        """Return the mean of a value of the results times a factor, or None if there is none."""
        values = []
        for run in self.finished_runs:
            value = run.value(key, factor)
            if value is not None:
                values.append(value)
        interval = interval_of(values)
        if interval is None:
            return None
        return interval.mean


def accuracy(network: ComparedNetwork, split: str) -> Interval | None:
    """Return the mean accuracy of a network on a split in per cent, or None if there is none."""
    return interval_of(list(network.accuracies(split).values()))


def difference(network: ComparedNetwork, other: ComparedNetwork, split: str) -> Interval | None:
    """Return how much more accurate a network is than another, in points, over the same seeds.

    A seed chooses the same validation images, order and augmentation for both.
    """
    return paired_difference(network.accuracies(split), other.accuracies(split))


def write_comparison(networks: Sequence[ComparedNetwork], folder: Path) -> None:
    """Write the tables and, if a network has a result, the figure.

    These are `comparison.md`, `.tex` and `.csv`, a row for each network;
    `comparison-runs.csv`, a row for each run; and `comparison.png`.
    """
    table = summary_table(networks)
    text = markdown(table)
    num_seeds = len(networks[0].runs)
    if num_seeds > 1:
        text += f"\n{seeds_note(num_seeds, len(networks))}"
    write_text(folder / TABLE, text)
    write_text(folder / "comparison.tex", latex(table))
    write_csv(folder / "comparison.csv", numbers_table(networks))
    write_csv(folder / "comparison-runs.csv", runs_table(networks))
    successful = [network for network in networks if network.finished_runs]
    if successful:
        plots.save(draw_comparison(successful), folder / FIGURE, dpi=110, bbox_inches="tight")


def summary_table(networks: Sequence[ComparedNetwork]) -> list[list[str]]:
    """Return the table for people; of several seeds it has intervals and differences."""
    first = networks[0]
    has_seeds = any(len(network.runs) > 1 for network in networks)
    has_differences = has_seeds and len(networks) > 1
    split = _common_split(networks)
    heading = ["network", "parameters (M)", "test accuracy (%)", "validation accuracy (%)"]
    if has_differences:
        heading.append(DIFFERENCE)
    heading += ["training time (min)", "images/s"]
    table = [heading]
    for network in networks:
        row = [
            _label(network),
            number(network.mean("parameters", 1e-6), 2),
            interval_text(accuracy(network, "test")),
            interval_text(accuracy(network, "val")),
        ]
        if has_differences:
            gained = None
            if network is not first:
                gained = difference(network, first, split)
            row.append(interval_text(gained))
        row.append(number(network.mean("seconds", 1 / 60), 1))
        row.append(number(network.mean("images_per_second"), 0))
        table.append(row)
    return table


def short_table(networks: Sequence[ComparedNetwork]) -> list[list[str]]:
    """Return the accuracies and differences of `summary_table`, which fit into a terminal."""
    return [[row[0], *row[2:-2]] for row in summary_table(networks)]


def numbers_table(networks: Sequence[ComparedNetwork]) -> list[list[str]]:
    """Return the table for programs, with a number in each cell."""
    first = networks[0]
    split = _common_split(networks)
    table = [
        [
            "network",
            "seeds",
            "parameters (M)",
            *interval_columns("test accuracy (%)"),
            *interval_columns("validation accuracy (%)"),
            *interval_columns(DIFFERENCE),
            "training time (min)",
            "images/s",
        ]
    ]
    for network in networks:
        gained = None
        if network is not first:
            gained = difference(network, first, split)
        row = [
            _label(network),
            str(len(network.finished_runs)),
            number(network.mean("parameters", 1e-6), 2),
            *interval_cells(accuracy(network, "test")),
            *interval_cells(accuracy(network, "val")),
            *interval_cells(gained, lowest=-100),
            number(network.mean("seconds", 1 / 60), 1),
            number(network.mean("images_per_second"), 0),
        ]
        table.append(row)
    return table


def runs_table(networks: Sequence[ComparedNetwork]) -> list[list[str]]:
    """Return the table of all runs."""
    heading = ["network", "seed", "test accuracy (%)", "validation accuracy (%)"]
    table = [[*heading, "training time (min)", "images/s", "failure"]]
    for network in networks:
        for run in network.runs:
            row = [
                network.label,
                str(run.seed),
                number(run.test_accuracy, 2),
                number(run.validation_accuracy, 2),
                number(run.minutes, 1),
                number(run.images_per_second, 0),
                run.failure,
            ]
            table.append(row)
    return table


def _common_split(networks: Sequence[ComparedNetwork]) -> str:
    """Return the split by which networks are compared: "test" if all have it, else "val"."""
    for network in networks:
        if network.finished_runs and not network.accuracies("test"):
            return "val"
    return "test"


def _label(network: ComparedNetwork) -> str:
    """Return the label of a network, with what failed."""
    return ": ".join([network.label, *network.failures])


def draw_comparison(networks: Sequence[ComparedNetwork]) -> Figure:
    """Draw accuracy against parameters, training time and speed.

    Markers are hollow for training from scratch. Of several seeds each run is a small marker, and
    the mean a large one with its 95 % interval. The accuracy is that on the test images if all
    networks have it, else that on the validation images.

    Args:
        networks: Networks with a result.
    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    by_parameters, by_time, by_speed = figure.subplots(1, 3, sharey=True)
    split = _common_split(networks)
    names = {"test": "test accuracy (%)", "val": "validation accuracy (%)"}
    by_parameters.set_ylabel(names[split])
    by_parameters.set_xlabel("parameters (M)")
    by_time.set_xlabel("training time (min)")
    by_speed.set_xlabel("training speed, everything unfrozen (images/s)")

    backbones = list(dict.fromkeys(network.backbone for network in networks))
    for network in networks:
        index = backbones.index(network.backbone)
        color = plots.COLOURS[index % len(plots.COLOURS)]
        style = {
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": "none",
            "color": color,
            "markerfacecolor": "white" if network.scratch else color,
        }
        _draw_network(by_parameters, network, ("parameters", 1e-6), split, style)
        _draw_network(by_time, network, ("seconds", 1 / 60), split, style)
        _draw_network(by_speed, network, ("images_per_second", 1.0), split, style)

    for axes in (by_parameters, by_time, by_speed):
        axes.grid(alpha=0.3)
        axes.margins(0.12)
    handles, labels = by_parameters.get_legend_handles_labels()
    columns = min(3, len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _draw_network(
    axes: Axes,
    network: ComparedNetwork,
    place: tuple[str, float],
    split: str,
    style: dict[str, Any],
) -> None:
    """Draw the mean of a network, with its interval, and its runs if there are several.

    Args:
        axes: Where to draw.
        network: A network with a result.
        place: Key of the results that gives the horizontal place, and its factor.
        split: Split whose accuracy gives the vertical place.
        style: Colour and marker.
    """
    mean = accuracy(network, split)
    x = network.mean(*place)
    if mean is None or x is None:
        return
    axes.errorbar(
        x,
        mean.mean,
        yerr=mean.half_width,
        markersize=10,
        markeredgewidth=2,
        capsize=4,
        label=network.label,
        **style,
    )
    if len(network.finished_runs) == 1:
        return
    accuracies = network.accuracies(split)
    for run in network.finished_runs:
        run_x = run.value(*place)
        if run_x is not None and run.seed in accuracies:
            axes.plot(run_x, accuracies[run.seed], markersize=4, alpha=0.6, **style)
