"""The comparison of several networks: a table, the same as CSV, and a figure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from cifar_transfer.base.files import write_csv, write_text
from cifar_transfer.base.text import markdown
from cifar_transfer.results import plots

COLUMNS = (
    "network",
    "parameters (M)",
    "test accuracy (%)",
    "validation accuracy (%)",
    "training time (min)",
    "images/s",
)
MARKERS = "os^Dvph<>X"
FIGURE = "comparison.png"


@dataclass(frozen=True)
class ComparedNetwork:
    """A network of a comparison, and what its run came to."""

    backbone: str
    label: str  # for people: the backbone and its weights
    scratch: bool  # whether it was trained without pretrained weights
    # Contents of the run's `result.json`: "parameters", "best/val_acc", ...
    result: dict[str, float] = field(default_factory=dict)
    failure: str = ""  # why there is no result

    @property
    def parameters(self) -> float | None:
        """Number of parameters in millions."""
        return self._scaled("parameters", 1e-6)

    @property
    def test_accuracy(self) -> float | None:
        """Accuracy on the test images in per cent; None if there are none."""
        return self._scaled("best/test_acc", 100)

    @property
    def validation_accuracy(self) -> float | None:
        """Accuracy on the validation images in per cent."""
        return self._scaled("best/val_acc", 100)

    @property
    def minutes(self) -> float | None:
        """Time that the training took, in minutes."""
        return self._scaled("seconds", 1 / 60)

    @property
    def images_per_second(self) -> float | None:
        """Training speed while everything is unfrozen."""
        return self._scaled("images_per_second", 1)

    def _scaled(self, key: str, factor: float) -> float | None:
        value = self.result.get(key)
        return None if value is None else factor * value


def write_comparison(networks: Sequence[ComparedNetwork], folder: Path) -> None:
    """Write `comparison.md`, `comparison.csv` and, if a network has a result, `comparison.png`."""
    table = [list(COLUMNS)]
    for network in networks:
        table.append(table_row(network))
    write_text(folder / "comparison.md", markdown(table))
    write_csv(folder / "comparison.csv", table)
    successful = [network for network in networks if not network.failure]
    if successful:
        plots.save(draw_comparison(successful), folder / FIGURE, dpi=110, bbox_inches="tight")


def table_row(network: ComparedNetwork) -> list[str]:
    """Return the cells of a network, one for each of `COLUMNS`; what is not known is empty."""
    label = network.label
    if network.failure:
        label = f"{label}: {network.failure}"
    return [
        label,
        number(network.parameters, 2),
        number(network.test_accuracy, 2),
        number(network.validation_accuracy, 2),
        number(network.minutes, 1),
        number(network.images_per_second, 0),
    ]


def number(value: float | None, decimals: int) -> str:
    """Return a number with so many decimals; "" for None."""
    return "" if value is None else f"{value:.{decimals}f}"


def draw_comparison(networks: Sequence[ComparedNetwork]) -> Figure:
    """Draw accuracy against parameters, training time and speed.

    Markers are hollow for training from scratch. The accuracy is that on the test images if all
    networks have it, else that on the validation images.

    Args:
        networks: Networks with a result.
    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    by_parameters, by_time, by_speed = figure.subplots(1, 3, sharey=True)
    all_tested = all(network.test_accuracy is not None for network in networks)
    by_parameters.set_ylabel("test accuracy (%)" if all_tested else "validation accuracy (%)")
    by_parameters.set_xlabel("parameters (M)")
    by_time.set_xlabel("training time (min)")
    by_speed.set_xlabel("training speed, everything unfrozen (images/s)")

    backbones = list(dict.fromkeys(network.backbone for network in networks))
    for network in networks:
        accuracy = network.test_accuracy if all_tested else network.validation_accuracy
        index = backbones.index(network.backbone)
        color = plots.COLOURS[index % len(plots.COLOURS)]
        style = {
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": "none",
            "color": color,
            "markerfacecolor": "white" if network.scratch else color,
            "markersize": 10,
            "markeredgewidth": 2,
            "label": network.label,
        }
        by_parameters.plot(network.parameters, accuracy, **style)
        by_time.plot(network.minutes, accuracy, **style)
        by_speed.plot(network.images_per_second, accuracy, **style)

    for axes in (by_parameters, by_time, by_speed):
        axes.grid(alpha=0.3)
        axes.margins(0.12)
    handles, labels = by_parameters.get_legend_handles_labels()
    columns = min(3, len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure
