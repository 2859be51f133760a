"""Tables and figure of `probe`: what the frozen features of each backbone tell of the classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cifar_transfer.base.files import write_csv, write_text
from cifar_transfer.base.text import markdown
from cifar_transfer.results import plots
from cifar_transfer.results.intervals import (
    DIFFERENCE,
    Interval,
    interval_cells,
    interval_columns,
    interval_of,
    interval_text,
    number,
    seeds_note,
)
from cifar_transfer.results.probe_result import (
    ACCURACIES,
    FEW_SHOT,
    TEST,
    VALIDATION,
    ProbedNetwork,
    ProbeResult,
)

TABLE = "probe.md"
TABLE_CSV = "probe.csv"
RUNS_CSV = "probe-runs.csv"
FIGURE = "probe.png"
FEATURES = ["features", "images/s", "features (s)", "heads (s)"]  # headings of `_feature_cells`


def write_tables(
    networks: Sequence[ProbedNetwork], failed_labels: Sequence[str], folder: Path
) -> None:
    """Write the tables and, if a network has a result, the figure.

    These are `probe.md` for people, and `probe.csv` for programs, a row for each network;
    `probe-runs.csv`, a row for each network and seed; and `probe.png`.
    """
    text = markdown(full_table(networks, failed_labels))
    if have_seeds(networks):
        text += f"\n{note(networks)}"
    write_text(folder / TABLE, text)
    write_csv(folder / TABLE_CSV, numbers_table(networks, failed_labels))
    write_csv(folder / RUNS_CSV, runs_table(networks))
    if networks:
        plots.save(accuracy_figure(networks), folder / FIGURE)


def have_seeds(networks: Sequence[ProbedNetwork]) -> bool:
    """Return whether a network has results of several seeds."""
    return any(len(network.results) > 1 for network in networks)


def note(networks: Sequence[ProbedNetwork]) -> str:
    """Return what the intervals of a table are."""
    num_seeds = max(len(network.results) for network in networks)
    return seeds_note(num_seeds, len(networks))


def full_table(networks: Sequence[ProbedNetwork], failed_labels: Sequence[str]) -> list[list[str]]:
    """Return the table for people: a row for each network, the best first, the failed ones last.

    Of several seeds it has intervals and, of several networks, differences.
    """
    has_seeds = have_seeds(networks)
    has_differences = has_seeds and len(networks) > 1
    ranked = _ranked(networks)
    heading = ["network", *ACCURACIES, *FEATURES]
    if has_differences:
        heading.append(DIFFERENCE)
    table = [heading]
    for network in ranked:
        if has_seeds:
            row = [network.label]
            for accuracy in ACCURACIES:
                row.append(interval_text(network.interval(accuracy)))
            row += _feature_cells(network.first, network.head_seconds)
        else:
            row = _run_cells(network.first)
        if has_differences:
            row.append(interval_text(_difference(network, ranked)))
        table.append(row)
    return table + _failed_rows(failed_labels, len(heading))


def short_table(networks: Sequence[ProbedNetwork], failed_labels: Sequence[str]) -> list[list[str]]:
    """Return the same with fewer columns, which fit into a terminal."""
    has_differences = have_seeds(networks) and len(networks) > 1
    ranked = _ranked(networks)
    heading = ["network", TEST, VALIDATION]
    if has_differences:
        heading.append(DIFFERENCE)
    else:
        heading.append("features (s)")
    table = [heading]
    for network in ranked:
        row = [
            network.label,
            interval_text(network.interval(TEST)),
            interval_text(network.interval(VALIDATION)),
        ]
        if has_differences:
            row.append(interval_text(_difference(network, ranked)))
        else:
            row.append(number(network.first.feature_seconds, 0))
        table.append(row)
    return table + _failed_rows(failed_labels, len(heading))


def numbers_table(
    networks: Sequence[ProbedNetwork], failed_labels: Sequence[str]
) -> list[list[str]]:
    """Return the table for programs, with a number in each cell."""
    ranked = _ranked(networks)
    heading = ["network", "seeds"]
    for accuracy in ACCURACIES:
        heading += interval_columns(accuracy)
    heading += interval_columns(DIFFERENCE)
    heading += FEATURES
    table = [heading]
    for network in ranked:
        row = [network.label, str(len(network.results))]
        for accuracy in ACCURACIES:
            row += interval_cells(network.interval(accuracy))
        row += interval_cells(_difference(network, ranked), lowest=-100)
        row += _feature_cells(network.first, network.head_seconds)
        table.append(row)
    return table + _failed_rows(failed_labels, len(heading))


def runs_table(networks: Sequence[ProbedNetwork]) -> list[list[str]]:
    """Return the table of all networks and seeds; few-shot cells are "mean ± deviation"."""
    table = [["seed", "network", *ACCURACIES, *FEATURES]]
    for network in _ranked(networks):
        for result in network.results:
            table.append([str(result.seed), *_run_cells(result)])
    return table


def _run_cells(result: ProbeResult) -> list[str]:
    """Return the cells of one seed; those of few-shot heads have the deviation over the draws."""
    cells = {}
    for heading, percentage in result.accuracies.items():
        cells[heading] = number(percentage, 2)
    for shots, draws in result.few_shot.items():
        cells[FEW_SHOT[shots]] = f"{100 * np.mean(draws):.1f} ± {100 * np.std(draws):.1f}"
    return [result.label, *cells.values(), *_feature_cells(result, result.head_seconds)]


def _feature_cells(result: ProbeResult, head_seconds: float) -> list[str]:
    """Return the number of features, and speed and times below `FEATURES`."""
    speed = None  # if the features were on disk
    if result.computed:
        speed = result.computed / result.feature_seconds
    return [
        str(result.width),
        number(speed, 0),
        number(result.feature_seconds, 0),
        number(head_seconds, 0),
    ]


def _difference(network: ProbedNetwork, ranked: Sequence[ProbedNetwork]) -> Interval | None:
    """Return the difference of a network to the first one in points; None for that one itself."""
    if network is ranked[0]:
        return None
    return network.difference(ranked[0], _common_accuracy(ranked))


def _common_accuracy(networks: Sequence[ProbedNetwork]) -> str:
    """Return the accuracy by which networks are compared: on test images if all have it."""
    for network in networks:
        if not network.by_seed(TEST):
            return VALIDATION
    return TEST


def _ranked(networks: Sequence[ProbedNetwork]) -> list[ProbedNetwork]:
    """Return networks, the most accurate first."""
    return sorted(networks, key=lambda network: network.accuracy, reverse=True)


def _failed_rows(labels: Sequence[str], num_columns: int) -> list[list[str]]:
    """Return a row for each backbone that failed."""
    return [[f"{label}: failed", *[""] * (num_columns - 1)] for label in labels]


def accuracy_figure(networks: Sequence[ProbedNetwork]) -> Figure:
    """Draw the accuracy of logistic regression by the training images of a class.

    There is a line for each backbone. Of several seeds it is their mean with its 95 % interval, and
    each seed is a small marker.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, network in enumerate(_ranked(networks)):
        color = plots.COLOURS[index % len(plots.COLOURS)]
        points = _accuracies_by_images(network)
        means = []
        half_widths = []
        for percentages in points.values():
            interval = interval_of(percentages)
            assert interval is not None
            means.append(interval.mean)
            half_widths.append(interval.half_width or 0.0)
        axes.errorbar(
            list(points),
            means,
            yerr=half_widths if len(network.results) > 1 else None,
            fmt="o-",
            color=color,
            ms=4,
            capsize=3,
            label=network.label,
        )
        if len(network.results) > 1:
            for num_images, percentages in points.items():
                places = [num_images] * len(percentages)
                axes.plot(places, percentages, "o", color=color, ms=2, alpha=0.6)
    axes.set(xlabel="training images of a class", ylabel="accuracy (%)", xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _accuracies_by_images(network: ProbedNetwork) -> Mapping[int, list[float]]:
    """Return accuracies in per cent by the number of training images of a class.

    There is one for each seed; those of few images are means over the draws, and those of all
    images come last.
    """
    accuracies: dict[int, list[float]] = {}
    for shots in network.first.few_shot:
        accuracies[int(shots)] = list(network.by_seed(FEW_SHOT[shots]).values())
    of_all = network.by_seed(TEST) or network.by_seed(VALIDATION)
    accuracies[network.first.images_per_class] = list(of_all.values())
    return accuracies
