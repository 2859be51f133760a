"""What the frozen features of backbones tell of the classes: `python -m cifar_transfer.probe NAME[=WEIGHTS]...`.

Each backbone's features are computed once and kept; on them are fitted logistic regression, nearest neighbours, nearest
class means, and few-shot heads. The best logistic regression becomes a checkpoint, for `predict`, `evaluate`, `export`,
and for `fit --model.weights=CHECKPOINT --freeze.unfreeze_epoch=0` to go on from
(Kumar et al. 2022, https://arxiv.org/abs/2202.10054).

All other options are those of fit, say `--data.root=photos --model.image_size=128`.
"""

from cifar_transfer import start

if __name__ == "__main__":
    start.run("probe")

import argparse
import codecs
import csv
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from matplotlib.figure import Figure

from cifar_transfer.errors import UserError, check
from cifar_transfer.features import heads
from cifar_transfer.features.extract import FeatureExtractor, features
from cifar_transfer.features.store import FOLDER, LIMIT_GB
from cifar_transfer.files import LOGS, RESULT, atomic_write
from cifar_transfer.network.contestant import Contestant, contestant
from cifar_transfer.results import plots
from cifar_transfer.text import markdown
from cifar_transfer.training.cli import FitCLI

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
    **{f"{shots}-shot (%)": partial(lambda shots, row: _few(row, shots), shots) for shots in heads.SHOTS},
    "features": lambda row: str(row["width"]),
    "images/s": lambda row: f"{row['computed'] / row['feature_seconds']:.0f}" if row["computed"] else "",
    "features (s)": lambda row: f"{row['feature_seconds']:.0f}",
    "heads (s)": lambda row: f"{row['head_seconds']:.0f}",
}
SHOWN = ("test (%)", "val (%)", "features (s)")  # on the terminal


def _percent(row: Row, name: str) -> str:
    return f"{100 * row[name]:.2f}" if name in row else ""


def _few(row: Row, shots: int) -> str:
    accuracies = row["few_shot"].get(str(shots), [])
    return f"{100 * np.mean(accuracies):.1f} ± {100 * np.std(accuracies):.1f}" if accuracies else ""


class ProbeCLI(FitCLI):
    """The options of `fit`, and a Trainer that keeps nothing, whose loaders say themselves which process reads what."""

    keeps_nothing = True

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As of `fit`; a `UserError` refuses options that are for training alone."""
        for name in ("find_lr", "resume", "ckpt_path"):
            if self.config[name]:
                raise UserError(f"--{name} is for fit: leave it out.")
        return super().instantiate_trainer(**kwargs | {"use_distributed_sampler": False})


def probe(one: Contestant, options: Sequence[str], home: Path, views: int, folder: Path, limit_gb: float) -> Row:
    """Fit heads on the features of a backbone, and write the network with the best one as a checkpoint.

    Args:
        one: The backbone and its weights.
        options: Of `fit`.
        home: Where `checkpoints/best.ckpt` and `result.json` go.
        views: Of each training image, see `FeatureExtractor`.
        folder: Where features are kept.
        limit_gb: Most that it may hold.

    Returns:
        Accuracies as shares of 1, and what it took; the same on all processes.

    Raises:
        UserError: A mistake in the options, the data or the weights, or a network whose head is no linear layer.
    """
    cli = ProbeCLI([*options, *one.options])
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    begun = time.monotonic()
    extractor = FeatureExtractor(model, data, folder, views, limit_gb)
    found = features(trainer, extractor)
    row: Row = {"label": one.label, "feature_seconds": time.monotonic() - begun, "computed": extractor.computed}
    head = None
    if trainer.is_global_zero:
        begun = time.monotonic()
        head, scores = heads.best(found, data.num_classes)
        row |= scores | {"head_seconds": time.monotonic() - begun}
    head, row = trainer.strategy.broadcast((head, row))
    extractor.put(head, found["val"])
    trainer.strategy.connect(model)
    trainer.save_checkpoint(home / CHECKPOINT, weights_only=True)  # there is no optimizer
    if trainer.is_global_zero:
        data.record_splits(home)
        with atomic_write(home / RESULT) as file:
            file.write(f"{json.dumps(row, indent=1)}\n".encode())
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
def write(rows: Sequence[Row], out: Path) -> None:
    """Write `probe.md`, `probe.csv` and `probe.png` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    lines = table(rows, [*COLUMNS])
    with atomic_write(out / "probe.md") as file:
        file.write(markdown(lines).encode())
    with atomic_write(out / "probe.csv") as file:
        csv.writer(codecs.getwriter("utf-8")(file)).writerows(lines)
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
        axes.plot([*few], [100 * share for share in few.values()], "o-", color=color, ms=4, label=row["label"])
    axes.set(xlabel="training images of a class", ylabel="accuracy (%)", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return drawn


@rank_zero_only
def _tell(rows: Sequence[Row], out: Path, done: Sequence[str]) -> None:
    print(f"\n{markdown(table(rows, SHOWN))}")
    print(f"all of it   {out / 'probe.md'}, {out / 'probe.png'}")
    for folder in done:
        print(f"checkpoint  {out / folder / CHECKPOINT}")


def main(args: Sequence[str]) -> int:
    """Parse the options, probe each backbone, print the table; 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_transfer.probe",
        allow_abbrev=False,
    )
    wanted = "A backbone, with a name or a file of weights if not those of its library."
    parser.add_argument("backbones", nargs="+", metavar="NAME[=WEIGHTS]", help=wanted)
    parser.add_argument("--config", metavar="FILE", help="A recipe, as fit takes it.")
    seen = "Views of each training image: 1 itself, 2 also mirrored, each further one augmented (default: 1)."
    parser.add_argument("--views", type=int, default=1, metavar="N", help=seen)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"Where to write (default: {OUT}).")
    kept = "Where features are kept (default: in the user's cache)."
    parser.add_argument("--features", type=Path, default=FOLDER, metavar="FOLDER", help=kept)
    most = f"Most that it may hold, 1e9 bytes each (default: {LIMIT_GB:g}); those not used for longest go first."
    parser.add_argument("--limit_gb", type=float, default=LIMIT_GB, metavar="GB", help=most)
    options, of_fit = parser.parse_known_args(args)
    check("--views", options.views, lambda n: 1 <= n <= MOST_VIEWS, f"1 to {MOST_VIEWS}")
    recipe = [f"--config={options.config}"] if options.config else []
    contestants = [contestant(text) for text in options.backbones]
    rows: list[Row] = []
    for number, one in enumerate(contestants, 1):
        rank_zero_info(f"{number}/{len(contestants)} {one.label}")
        try:
            home = options.out / one.folder
            rows.append(probe(one, [*recipe, *of_fit], home, options.views, options.features, options.limit_gb))
        except UserError as error:
            if len(contestants) == 1:
                raise
            rank_zero_warn(f"{one.label}: {error}")
            rows.append({"label": one.label, "failed": str(error)})
        write(rows, options.out)
    _tell(rows, options.out, [one.folder for one, row in zip(contestants, rows, strict=True) if "failed" not in row])
    return int(any("failed" in row for row in rows))
