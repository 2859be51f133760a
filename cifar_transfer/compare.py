"""Several backbones under one recipe: `python -m cifar_transfer.compare NAME[=WEIGHTS]... [options of fit]`.

Each is a `fit` of its own, in a process of its own, one after another. What is done is not done again: the same command
continues after a stop, and tries again what failed.
"""

import argparse
import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cifar_transfer.console import markdown
from cifar_transfer.errors import UserError, one_sentence
from cifar_transfer.network import catalog
from cifar_transfer.results.plots import COLOURS
from cifar_transfer.results.report import RESULT
from cifar_transfer.training.checkpoint import LOGS
from cifar_transfer.training.run import CONFIG

OUT = Path(LOGS, "comparison")
MARKERS = "os^Dvph<>X"


@dataclass(frozen=True)
class Contestant:
    """A backbone with its weights.

    Attributes:
        name: Of the backbone.
        weights: As `--model.weights` takes them, or None for what the recipe says.
    """

    name: str
    weights: str | None

    @property
    def scratch(self) -> bool:
        """Whether it starts without pretraining."""
        return (self.weights or "").lower() == "none"

    @property
    def label(self) -> str:
        """For people."""
        if self.scratch:
            return f"{self.name}, from scratch"
        weights = Path(self.weights).stem.removeprefix(self.name).strip("-_.") if self.weights else ""
        return f"{self.name}, {weights or 'pretrained'}"

    @property
    def folder(self) -> str:
        """For the file system."""
        return re.sub(r"[^\w.]+", "-", self.label)

    @property
    def options(self) -> list[str]:
        """For `fit`; without pretraining there is nothing worth freezing."""
        weights = [] if self.weights is None else [f"--model.weights={self.weights}"]
        return [f"--model.backbone={self.name}", *weights, *(["--freeze.unfreeze_epoch=0"] if self.scratch else [])]


def contestant(text: str) -> Contestant:
    """NAME or NAME=WEIGHTS.

    Raises:
        UserError: There is no such backbone, or no such file or weights.
    """
    name, _, weights = text.partition("=")
    catalog.check(name)
    if weights and weights.lower() != "none" and weights not in ("DEFAULT", *catalog.weights(name)):
        if not Path(weights).expanduser().is_file():
            raise UserError(f"{text}: {weights} is neither a file nor a name of {name}'s weights, nor none.")
        weights = str(Path(weights).expanduser().resolve())
    return Contestant(name, weights or None)


def compare(contestants: Sequence[Contestant], options: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Fit each that is not done yet, and write the tables and the figure after each.

    Args:
        contestants: Whom to compare.
        options: Of `fit`, for all alike.
        out: Folder for the runs, `comparison.md`, `comparison.csv` and `comparison.png`.

    Returns:
        A row for each contestant: its scores, or what went wrong in "failed".

    Raises:
        UserError: Two contestants are the same, or `out` holds a comparison under another recipe.
    """
    if len({one.folder for one in contestants}) < len(contestants):
        raise UserError("Two of the backbones are the same: name each once.")
    out.mkdir(parents=True, exist_ok=True)
    _check_recipe(options, out / "recipe.json")
    rows: list[dict[str, Any]] = []
    for number, one in enumerate(contestants, 1):
        home = out / one.folder
        print(f"\n--- {number}/{len(contestants)} {one.label} ---", flush=True)
        row: dict[str, Any] = {"backbone": one.name, "label": one.label, "scratch": one.scratch}
        if (result := _result(home)) is None:
            status = subprocess.run(_command(one, options, home), check=False).returncode
            result = _result(home)
            row |= {} if result else {"failed": f"failed with exit status {status}"}
        else:
            print("done before", flush=True)
        rows.append(row | (result or {}))
        write(rows, out)
    return rows


def _check_recipe(options: Sequence[str], path: Path) -> None:
    recipe = {"options": list(options)}
    for option in options:
        if option.startswith("--config="):
            config = Path(option.partition("=")[2])
            if not config.is_file():
                raise UserError(f"The recipe {config} does not exist.")
            recipe["config"] = config.read_text().splitlines()
    if path.is_file() and json.loads(path.read_text()) != recipe:
        raise UserError(
            f"{path.parent} holds a comparison under another recipe ({path}): name another folder with --out."
        )
    path.write_text(json.dumps(recipe, indent=1))


def _runs(home: Path) -> list[Path]:
    return [path.parent for path in sorted((home / LOGS).glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime)]


def _result(home: Path) -> dict[str, Any] | None:
    for run in _runs(home):
        if (run / RESULT).is_file():
            return {"run": str(run)} | json.loads((run / RESULT).read_text())
    return None


def _command(one: Contestant, options: Sequence[str], home: Path) -> list[str]:
    if started := _runs(home):
        ours: list[str] = ["--resume", str(started[-1])]
    else:
        ours = [*options, *one.options, f"--trainer.default_root_dir={home}"]
    return [sys.executable, "-m", "cifar_transfer.fit", *ours]


COLUMNS = {
    "network": lambda row: row["label"],
    "parameters (M)": lambda row: f"{row['parameters'] / 1e6:.2f}",
    "test accuracy (%)": lambda row: f"{100 * row['best/test_acc']:.2f}" if "best/test_acc" in row else "",
    "validation accuracy (%)": lambda row: f"{100 * row['best/val_acc']:.2f}",
    "training time (min)": lambda row: f"{row['seconds'] / 60:.1f}",
    "images/s": lambda row: f"{row['images_per_second']:.0f}",
}


def write(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write `comparison.md`, `comparison.csv` and `comparison.png` into `out`."""
    cells = [
        [f"{row['label']}: {row['failed']}", *[""] * (len(COLUMNS) - 1)]
        if "failed" in row
        else [cell(row) for cell in COLUMNS.values()]
        for row in rows
    ]
    (out / "comparison.md").write_text(markdown([list(COLUMNS), *cells]))
    text = io.StringIO()
    csv.writer(text).writerows([list(COLUMNS), *cells])
    (out / "comparison.csv").write_text(text.getvalue())
    done = [row for row in rows if "failed" not in row]
    if done:
        figure(done).savefig(out / "comparison.png", dpi=110, bbox_inches="tight")


def figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy against parameters, training time and speed; hollow without pretraining."""
    drawn = Figure(figsize=(12, 4.6), layout="constrained")
    axes = drawn.subplots(1, 3, sharey=True)
    names = list(dict.fromkeys(row["backbone"] for row in rows))
    metric = "best/test_acc" if all("best/test_acc" in row for row in rows) else "best/val_acc"
    quantities = (
        ("parameters (M)", lambda row: row["parameters"] / 1e6),
        ("training time (min)", lambda row: row["seconds"] / 60),
        ("training speed, everything unfrozen (images/s)", lambda row: row["images_per_second"]),
    )
    for axis, (label, value) in zip(axes, quantities, strict=True):
        for row in rows:
            index = names.index(row["backbone"])
            colour = COLOURS[index % len(COLOURS)]
            axis.plot(
                value(row),
                100 * row[metric],
                MARKERS[index % len(MARKERS)],
                color=colour,
                markerfacecolor="white" if row["scratch"] else colour,
                markersize=10,
                markeredgewidth=2,
                label=row["label"],
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.margins(0.12)
    axes[0].set_ylabel("test accuracy (%)" if metric == "best/test_acc" else "validation accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    return drawn


def main() -> int:
    """Parse the options, compare, print the table; 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_transfer.compare",
        description="Fit several backbones under one recipe and compare them.",
        epilog="All other options are those of fit and hold for every backbone, say --trainer.max_epochs=10.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "backbones",
        nargs="+",
        metavar="NAME[=WEIGHTS]",
        help="A backbone, with a name or a file of weights if not those of the recipe; NAME=none trains from scratch, "
        "without frozen epochs.",
    )
    parser.add_argument("--config", metavar="FILE", help="The recipe, as fit takes it.")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"Where to write (default: {OUT}).")
    options, of_fit = parser.parse_known_args()
    recipe = [f"--config={options.config}"] if options.config else []
    contestants = [contestant(text) for text in options.backbones]
    try:
        rows = compare(contestants, [*recipe, *of_fit], options.out)
    except KeyboardInterrupt:
        print("\nStopped; the same command continues.")
        return 130
    print(f"\n{(options.out / 'comparison.md').read_text()}\n{options.out / 'comparison.png'}")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    with one_sentence():
        sys.exit(main())
