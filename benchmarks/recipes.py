"""Accuracy on the test images against minutes, of the recipes: `python -m benchmarks.recipes --out FOLDER [options]`.

Runs `fit` for each recipe and seed, one after the other, with the options given (data, weights); what is done is not
done again, and what was stopped is continued. Then it evaluates the epochs' checkpoints on the test images, outside the
clock, and draws the curves into FOLDER/recipes.png. The minutes are those of training and validation.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

from lightning import Trainer
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from cifar_transfer import TransferClassifier
from cifar_transfer.results.report import RESULT
from cifar_transfer.training.checkpoint_file import read_checkpoint
from cifar_transfer.training.evaluation import load_data

RECIPES = {
    "default": [],
    "fast": ["--config=configs/fast.yaml"],
    "scratch": ["--config=configs/scratch.yaml"],
}
EPOCHS = """
trainer:
  callbacks:
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {filename: "epoch-{epoch:03d}", auto_insert_metric_name: false, save_top_k: -1,
                save_on_train_epoch_end: true}
"""
COLORS = {"default": "tab:blue", "fast": "tab:red", "scratch": "tab:gray"}


def train(out: Path, recipe: str, seed: int, options: list[str]) -> Path:
    """The folder of a finished run of a recipe."""
    root = out / f"{recipe}-{seed}"
    run = root / "lightning_logs" / "version_0"
    if not (run / RESULT).is_file():
        every = out / "every_epoch.yaml"
        out.mkdir(parents=True, exist_ok=True)
        every.write_text(EPOCHS)
        begin = [f"--config={every}", *RECIPES[recipe], f"--seed_everything={seed}", *options]
        how = [f"--resume={run}"] if (run / "config.yaml").is_file() else begin
        command = [
            sys.executable,
            "-m",
            "cifar_transfer.fit",
            *how,
            f"--trainer.default_root_dir={root}",
        ]
        subprocess.run(command, check=True)
    return run


def curve(run: Path, every: int = 1) -> list[tuple[float, float]]:
    """Minutes and test accuracy after each epoch of a run, or each so many; evaluated once, then kept beside it."""
    kept = run / "curve.csv"
    if not kept.is_file():
        paths = sorted(run.glob("checkpoints/epoch-*.ckpt"))
        paths = [
            path for number, path in enumerate(paths, 1) if number % every == 0 or path == paths[-1]
        ]
        data = load_data(read_checkpoint(paths[0]))
        trainer = Trainer(
            logger=False, enable_checkpointing=False, enable_progress_bar=False, devices=1
        )
        points = []
        for path in paths:
            seconds = read_checkpoint(path)["callbacks"]["Report"]["seconds"]
            figures = trainer.test(
                TransferClassifier.load_from_checkpoint(path), data, verbose=False
            )[0]
            points.append((seconds / 60, figures["test/acc"]))
        with kept.open("w", newline="") as file:
            csv.writer(file).writerows(points)
    with kept.open(newline="") as file:
        return [(float(minutes), float(accuracy)) for minutes, accuracy in csv.reader(file)]


def draw(curves: dict[str, list[list[tuple[float, float]]]], path: Path) -> None:
    """A line for each run; the recipe's name once."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for recipe, runs in curves.items():
        for number, points in enumerate(runs):
            minutes, accuracy = zip(*points, strict=True)
            label = f"{recipe} ({len(runs)} seeds)" if len(runs) > 1 else recipe
            shares = [100 * value for value in accuracy]
            axes.plot(
                minutes,
                shares,
                ".-",
                color=COLORS[recipe],
                lw=1,
                ms=5,
                label=None if number else label,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("minutes of training and validation")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, evaluate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="Folder for runs and picture.")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=1, help="Seeds of each recipe: 0, 1, ...")
    parser.add_argument(
        "--every", type=int, default=1, help="Epochs from one evaluation to the next."
    )
    known, options = parser.parse_known_args()
    curves = {
        recipe: [
            curve(train(known.out, recipe, seed, options), known.every)
            for seed in range(known.seeds)
        ]
        for recipe in known.recipes
    }
    draw(curves, known.out / "recipes.png")
    for recipe, runs in curves.items():
        for seed, points in enumerate(runs):
            print(f"{recipe:8} seed {seed}: {points[-1][1]:.2%} after {points[-1][0]:.1f} minutes")


if __name__ == "__main__":
    main()
