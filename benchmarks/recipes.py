"""Accuracy on the test images against minutes, of the recipes.

    python -m benchmarks.recipes --out FOLDER [options of fit]

Runs `fit` for each recipe and seed, one after the other, with the options given (data, weights).
What is done is not done again, and what was stopped is continued. Then it evaluates the epochs'
checkpoints on the test images, outside the clock, and draws the curves into FOLDER/recipes.png. The
minutes are those of training and validation.
"""

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning import Trainer
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from cifar_transfer import TransferClassifier
from cifar_transfer.base.files import RESULT
from cifar_transfer.training.checkpoint_file import read_checkpoint
from cifar_transfer.training.evaluation import load_data

RECIPES: dict[str, list[str]] = {
    "default": [],
    "fast": ["--config=configs/fast.yaml"],
    "scratch": ["--config=configs/scratch.yaml"],
}
CHECKPOINT_OF_EACH_EPOCH = """
trainer:
  callbacks:
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {filename: "epoch-{epoch:03d}", auto_insert_metric_name: false, save_top_k: -1,
                save_on_train_epoch_end: true}
"""
COLORS = {"default": "tab:blue", "fast": "tab:red", "scratch": "tab:gray"}
Curve = list[
    tuple[float, float]
]  # minutes and test accuracy (share of 1), an epoch after the other


def train(out: Path, recipe: str, seed: int, options: list[str]) -> Path:
    """Return the folder of a finished run of a recipe; train it, or continue it, if it is not."""
    root = out / f"{recipe}-{seed}"
    run = root / "lightning_logs" / "version_0"
    if (run / RESULT).is_file():
        return run
    if (run / "config.yaml").is_file():
        arguments = [f"--resume={run}"]
    else:
        out.mkdir(parents=True, exist_ok=True)
        config = out / "every_epoch.yaml"
        config.write_text(CHECKPOINT_OF_EACH_EPOCH)
        arguments = [f"--config={config}", *RECIPES[recipe], f"--seed_everything={seed}", *options]
    command = [sys.executable, "-m", "cifar_transfer.fit", *arguments]
    subprocess.run([*command, f"--trainer.default_root_dir={root}"], check=True)
    return run


def curve(run: Path, interval: int = 1) -> Curve:
    """Return minutes and test accuracy after every `interval` epochs of a run, and after the last.

    They are evaluated once, and then kept beside the run.
    """
    file = run / "curve.csv"
    if not file.is_file():
        with file.open("w", newline="") as table:
            csv.writer(table).writerows(evaluate(run, interval))
    with file.open(newline="") as table:
        return [(float(minutes), float(accuracy)) for minutes, accuracy in csv.reader(table)]


def evaluate(run: Path, interval: int) -> Curve:
    """Evaluate a run's checkpoints on the test images."""
    paths = sorted(run.glob("checkpoints/epoch-*.ckpt"))
    chosen = paths[interval - 1 :: interval]
    if paths[-1] not in chosen:
        chosen.append(paths[-1])
    data = load_data(read_checkpoint(paths[0]))
    trainer = Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, devices=1
    )
    points = []
    for path in chosen:
        seconds = read_checkpoint(path)["callbacks"]["Report"]["seconds"]
        model = TransferClassifier.load_from_checkpoint(path)
        (scores,) = trainer.test(model, data, verbose=False)
        points.append((seconds / 60, scores["test/acc"]))
    return points


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Draw a line for each run; the recipe's name stands once in the legend."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for recipe, runs in curves.items():
        label: str | None = recipe
        if len(runs) > 1:
            label = f"{recipe} ({len(runs)} seeds)"
        for points in runs:
            minutes = [point[0] for point in points]
            percent = [100 * point[1] for point in points]
            axes.plot(minutes, percent, ".-", color=COLORS[recipe], lw=1, ms=5, label=label)
            label = None
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("minutes of training and validation")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(args: Sequence[str]) -> None:
    """Train, evaluate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="Folder for runs and picture.")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=1, help="Seeds of each recipe: 0, 1, ...")
    parser.add_argument("--every", type=int, default=1, help="Epochs between two evaluations.")
    known, options = parser.parse_known_args(args)
    curves: dict[str, list[Curve]] = {}
    for recipe in known.recipes:
        curves[recipe] = []
        for seed in range(known.seeds):
            run = train(known.out, recipe, seed, options)
            curves[recipe].append(curve(run, known.every))
    draw(curves, known.out / "recipes.png")
    for recipe, runs in curves.items():
        for seed, points in enumerate(runs):
            minutes, accuracy = points[-1]
            print(f"{recipe:8} seed {seed}: {accuracy:.2%} after {minutes:.1f} minutes")


if __name__ == "__main__":
    main(sys.argv[1:])
