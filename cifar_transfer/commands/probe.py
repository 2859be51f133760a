"""What the frozen features of backbones tell of the classes: `python -m cifar_transfer probe NAME[=WEIGHTS]...`.

Each backbone's features are computed once and kept; on them are fitted logistic regression, nearest neighbours, nearest
class means, and few-shot heads. The best logistic regression becomes a checkpoint, for `predict`, `evaluate`, `export`,
and for `fit --model.weights=CHECKPOINT --freeze.unfreeze_epoch=0 --model.lr=1e-4` with the same options of model and
data to go on from (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).

All other options are those of fit, say `--data.root=photos --model.image_size=128`.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from matplotlib.figure import Figure

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.files import LOGS, RESULT, write_csv, write_json, write_text
from cifar_transfer.base.text import markdown
from cifar_transfer.cli.features_cli import features_of, parser
from cifar_transfer.cli.recipes import RECIPE_FILE, check_recipe
from cifar_transfer.features import heads
from cifar_transfer.network.contestant import Contestant, parse_contestants
from cifar_transfer.results import plots

OUT = Path(LOGS, "probe")
MOST_VIEWS = 100
CHECKPOINT = Path("checkpoints", "best.ckpt")  # in the folder of a backbone
Row = dict[str, Any]  # of the table: label, and what `probe` gives, or why it "failed"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "test (%)": lambda row: _percent(row, "test"),
    "balanced (%)": lambda row: _percent(row, "balanced"),
    "val (%)": lambda row: _percent(row, "val"),
    **{
        f"{k}-nearest (%)": partial(lambda k, row: f"{100 * row['neighbours'][str(k)]:.2f}", k)
        for k in heads.NEIGHBOURS
    },
    "means (%)": lambda row: _percent(row, "means"),
    **{
        f"{shots}-shot (%)": partial(lambda shots, row: _few(row, shots), shots)
        for shots in heads.SHOTS
    },
    "features": lambda row: str(row["width"]),
    "images/s": lambda row: (
        f"{row['computed'] / row['feature_seconds']:.0f}" if row["computed"] else ""
    ),
    "features (s)": lambda row: f"{row['feature_seconds']:.0f}",
    "heads (s)": lambda row: f"{row['head_seconds']:.0f}",
}
SHOWN = ("test (%)", "val (%)", "features (s)")  # on the terminal


def _percent(row: Row, name: str) -> str:
    return f"{100 * row[name]:.2f}" if name in row else ""


def _few(row: Row, shots: int) -> str:
    accuracies = row["few_shot"].get(str(shots), [])
    return f"{100 * np.mean(accuracies):.1f} ± {100 * np.std(accuracies):.1f}" if accuracies else ""


def probe(one: Contestant, options: argparse.Namespace, of_fit: Sequence[str]) -> Row:
    """Fit heads on the features of a backbone, and write the network with the best one as a checkpoint.

    Args:
        one: The backbone and its weights.
        options: Of this command; `checkpoints/best.ckpt` and `result.json` go into a folder in `out`.
        of_fit: Options of `fit`.

    Returns:
        Accuracies as shares of 1, and what it took; the same on all processes.

    Raises:
        UserError: As `features_of`, or the network does more with its head's logits.
    """
    home = options.out / one.folder
    cli, extractor, found, seconds = features_of(one, options, of_fit, home, options.views)
    trainer, data = cli.trainer, cli.datamodule
    row: Row = {"label": one.label, "feature_seconds": seconds, "computed": extractor.computed}
    row["bfloat16"] = extractor.in_bfloat16
    head = None
    if trainer.is_global_zero:
        begun = time.monotonic()
        head, scores = heads.best(found, data.num_classes)
        row |= scores | {"head_seconds": time.monotonic() - begun}
    head, row = trainer.strategy.broadcast((head, row))
    extractor.put(head, found["val"])
    trainer.strategy.connect(cli.model)
    trainer.save_checkpoint(home / CHECKPOINT, weights_only=True)  # there is no optimizer
    if trainer.is_global_zero:
        data.record_splits(home)
        write_json(home / RESULT, row)
        write_json(home / RECIPE_FILE, check_recipe(home, one.options))
    return row


def _accuracy(row: Row) -> float:
    """By which backbones are ranked: of the test images if there are any."""
    accuracies = [row[name] for name in ("test", "val") if name in row]
    return accuracies[0] if accuracies else -1.0


def table(rows: Sequence[Row], columns: Sequence[str]) -> list[list[str]]:
    """A heading and a line for each backbone, the best first."""
    lines = [["network", *columns]]
    for row in sorted(rows, key=_accuracy, reverse=True):
        if "failed" in row:
            lines.append([f"{row['label']}: failed", *[""] * len(columns)])
        else:
            lines.append([row["label"], *(COLUMNS[column](row) for column in columns)])
    return lines


@rank_zero_only
def write(rows: Sequence[Row], out: Path, recipe: dict[str, Any]) -> None:
    """Write `probe.md`, `probe.csv` and `probe.png` into `out`, and the recipe of all."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECIPE_FILE, recipe)
    lines = table(rows, [*COLUMNS])
    write_text(out / "probe.md", markdown(lines))
    write_csv(out / "probe.csv", lines)
    if done := [row for row in rows if "failed" not in row]:
        plots.save(figure(done), out / "probe.png")


def figure(rows: Sequence[Row]) -> Figure:
    """Accuracy of logistic regression by the images of a class that it is fitted on, a line for each backbone."""
    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    axes = drawn.subplots()
    for number, row in enumerate(sorted(rows, key=_accuracy, reverse=True)):
        few = {int(shots): np.mean(found) for shots, found in row["few_shot"].items()}
        few[row["per_class"]] = _accuracy(row)
        color = plots.COLOURS[number % len(plots.COLOURS)]
        axes.plot(
            [*few],
            [100 * share for share in few.values()],
            "o-",
            color=color,
            ms=4,
            label=row["label"],
        )
    axes.set(xlabel="training images of a class", ylabel="accuracy (%)", xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return drawn


@rank_zero_only
def _tell(rows: dict[str, Row], out: Path) -> None:
    print(f"\n{markdown(table([*rows.values()], SHOWN))}")
    print(f"all of it   {out / 'probe.md'}, {out / 'probe.png'}")
    for folder in (folder for folder, row in rows.items() if "failed" not in row):
        print(f"checkpoint  {out / folder / CHECKPOINT}")


def main(args: Sequence[str]) -> int:
    """Parse the options, probe each backbone, print the table; 1 if one failed."""
    options = parser("probe", OUT)
    wanted = "A backbone, with a name or a file of weights if not those of its library."
    options.add_argument("backbones", nargs="+", metavar="NAME[=WEIGHTS]", help=wanted)
    seen = "Views of each training image: 1 itself, 2 also mirrored, each further one augmented (default: 1)."
    options.add_argument("--views", type=int, default=1, metavar="N", help=seen)
    given, of_fit = options.parse_known_args(args)
    check("--views", given.views, lambda n: 1 <= n <= MOST_VIEWS, f"1 to {MOST_VIEWS}")
    backbones = parse_contestants(given.backbones)
    recipe = check_recipe(
        given.out,
        [f"--views={given.views}", *(f"--config={file}" for file in given.config), *of_fit],
    )
    before = (
        given.out.glob(f"*/{RESULT}") if (given.out / RECIPE_FILE).is_file() else ()
    )  # of the same recipe
    rows: dict[str, Row] = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(before)
    }
    for one in backbones:
        check_recipe(given.out / one.folder, one.options)  # two files of weights may have one name
    for number, one in enumerate(backbones, 1):
        rank_zero_info(f"{number}/{len(backbones)} {one.label}")
        try:
            rows[one.folder] = probe(one, given, of_fit)
        except UserError as error:
            if len(backbones) == 1:
                raise
            rank_zero_info(f"error: {one.label}: {error}")
            rows[one.folder] = {"label": one.label, "failed": str(error)}
        write([*rows.values()], given.out, recipe)
    _tell(rows, given.out)
    return int(any("failed" in rows[one.folder] for one in backbones))
