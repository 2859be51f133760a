"""Several backbones under one recipe: `python -m cifar_transfer compare NAME[=WEIGHTS]... [options of fit]`.

Each is a `fit` of its own, in a process of its own, one after another. What is done is not done again: the same command
continues after a stop, and tries again what failed. All other options are those of `fit`, for every backbone alike.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cifar_transfer.base.files import (
    CONFIG,
    LOGS,
    RESULT,
    make_folder,
    write_csv,
    write_json,
    write_text,
)
from cifar_transfer.base.text import markdown
from cifar_transfer.cli import start
from cifar_transfer.cli.parsers import RECIPE, PartParser, check_recipe
from cifar_transfer.network.contestant import Contestant, contestants
from cifar_transfer.results import plots

Row = dict[
    str, Any
]  # of the comparison: what `result.json` says, "backbone", "label" and "scratch", perhaps "failed"

OUT = Path(LOGS, "comparison")
MARKERS = "os^Dvph<>X"
# Columns after the network's: how a value is written, and the value.
COLUMNS: dict[str, tuple[str, Callable[[Row], float]]] = {
    "parameters (M)": (".2f", lambda row: row["parameters"] / 1e6),
    "test accuracy (%)": (".2f", lambda row: 100 * row["best/test_acc"]),
    "validation accuracy (%)": (".2f", lambda row: 100 * row["best/val_acc"]),
    "training time (min)": (".1f", lambda row: row["seconds"] / 60),
    "images/s": (".0f", lambda row: row["images_per_second"]),
}
# Shown while it goes.
SHOWN = {
    "val %": "validation accuracy (%)",
    "test %": "test accuracy (%)",
    "minutes": "training time (min)",
}
LOG = "fit.log"  # in a network's folder, what its runs print


def compare(backbones: Sequence[Contestant], options: Sequence[str], out: Path) -> list[Row]:
    """Fit each that is not done yet, and write the tables and the figure after each.

    Args:
        backbones: Whom to compare.
        options: Of `fit`, for all alike.
        out: Folder of the runs, the tables and the figure.

    Raises:
        UserError: `out` is no folder or holds results of another recipe.
    """
    make_folder(out, "--out")
    write_json(out / RECIPE, check_recipe(out, options))
    rows: list[Row] = []
    width = max(len(one.label) for one in backbones)
    print(
        f"What each run prints: {out / '*' / LOG}\n\n{'network':<{width}}  {'  '.join(f'{name:>7}' for name in SHOWN)}"
    )
    for one in backbones:
        home = out / one.folder
        made = check_recipe(home, one.options)  # two files of weights may have one name
        print(f"{one.label:<{width}}", end="", flush=True)
        if not (result := _result(home)):
            begun, new = _runs(home), [*options, *one.options, f"--trainer.default_root_dir={home}"]
            ours = ["--resume", str(begun[-1])] if begun else new
            home.mkdir(exist_ok=True)
            write_json(home / RECIPE, made)
            with (home / LOG).open("a") as log:
                command = [sys.executable, "-m", "cifar_transfer.fit", *ours]
                done = subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT)
            result = _result(home) or {"failed": f"failed with exit status {done.returncode}"}
        rows.append({"backbone": one.name, "label": one.label, "scratch": one.scratch} | result)
        cells = [f"{_cell(rows[-1], column):>7}" for column in SHOWN.values()]
        print("", *([result["failed"]] if "failed" in result else cells), sep="  ", flush=True)
        if "failed" in result:
            print(*(home / LOG).read_text(errors="replace").splitlines()[-1:], file=sys.stderr)
        write(rows, out)
    return rows


def _runs(home: Path) -> list[Path]:
    return [
        path.parent
        for path in sorted((home / LOGS).glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
    ]


def _result(home: Path) -> Row:
    """What the first run that is finished came to; empty without one."""
    finished = [run for run in _runs(home) if (run / RESULT).is_file()]
    return (
        {"run": str(finished[0])} | json.loads((finished[0] / RESULT).read_text())
        if finished
        else {}
    )


def write(rows: Sequence[Row], out: Path) -> None:
    """Write `comparison.md`, `comparison.csv` and `comparison.png` into `out`."""
    table = [["network", *COLUMNS]]
    for row in rows:
        network = f"{row['label']}: {row['failed']}" if "failed" in row else row["label"]
        table.append([network, *(_cell(row, column) for column in COLUMNS)])
    write_text(out / "comparison.md", markdown(table))
    write_csv(out / "comparison.csv", table)
    if done := [row for row in rows if "failed" not in row]:
        plots.save(figure(done), out / "comparison.png", dpi=110, bbox_inches="tight")


def _cell(row: Row, column: str) -> str:
    form, value = COLUMNS[column]
    try:
        return format(value(row), form)
    except KeyError:  # it failed, or was not tested
        return ""


def figure(rows: Sequence[Row]) -> Figure:
    """Accuracy against parameters, training time and speed; hollow without pretraining."""
    drawn = Figure(figsize=(12, 4.6), layout="constrained")
    names = list(dict.fromkeys(row["backbone"] for row in rows))
    tested = all("best/test_acc" in row for row in rows)
    accuracy = "test accuracy (%)" if tested else "validation accuracy (%)"
    axes = drawn.subplots(1, 3, sharey=True)
    axes[0].set_ylabel(accuracy)
    for axis, column in zip(
        axes, ("parameters (M)", "training time (min)", "images/s"), strict=True
    ):
        for row in rows:
            index = names.index(row["backbone"])
            color, marker = plots.COLOURS[index % len(plots.COLOURS)], MARKERS[index % len(MARKERS)]
            face = "white" if row["scratch"] else color
            x, y = (COLUMNS[name][1](row) for name in (column, accuracy))
            axis.plot(x, y, marker, color=color, mfc=face, markersize=10, mew=2, label=row["label"])
        axis.set_xlabel(
            "training speed, everything unfrozen (images/s)" if column == "images/s" else column
        )
        axis.grid(alpha=0.3)
        axis.margins(0.12)
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(
        handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False
    )
    return drawn


def main(args: Sequence[str]) -> int:
    """Parse the options, compare, print the table; 1 if one failed."""
    parser = PartParser("compare")
    wanted = "A backbone, with a name or a file of weights if not those of the recipe"
    scratch = "NAME=none trains from scratch, without frozen epochs."
    parser.add_argument(
        "backbones", nargs="+", metavar="NAME[=WEIGHTS]", help=f"{wanted}; {scratch}"
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="A recipe, as fit takes it."
    )
    place = f"Folder of the runs, tables and figure (default: {OUT})."
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=place)
    options, of_fit = parser.parse_known_args(start.with_recipes(args))
    recipes = [f"--config={file}" for file in options.config]
    backbones = contestants(options.backbones)
    try:
        rows = compare(backbones, [*recipes, *of_fit], options.out)
    except KeyboardInterrupt:
        print("\nStopped; the same command continues.")
        return 130
    print(f"\nlook at it  {options.out / 'comparison.png'}, .md, .csv")
    return int(any("failed" in row for row in rows))
