"""`metrics.csv` in the folder of a run: the names of its figures, and the curves that they make.

It has a row for each logged step and one for each epoch, which alone says how many parameters
train::

    epoch,step,train/loss,train/acc_step,val/loss,val/acc,lr,trainable_parameters
    1,0,2.5,0.125,,,,
    1,9,2.25,0.25,,,,
    1,9,,,2.0,0.5,0.001,5130.0

Epochs count from 1, steps from 0.
"""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from cifar_transfer.results.plots import Curve, RunCurves

METRICS = "metrics.csv"

# Names of the figures that are logged by epoch, beside "train/acc", "train/loss_epoch", "val/acc"
# and "val/loss".
STEPS_FIGURE = "steps"  # optimizer steps that the run has made; in the file it is the row's step
LEARNING_RATE_FIGURE = "lr"
TRAINABLE_FIGURE = "trainable_parameters"
STAGE_RATE_PREFIX = "stages/"  # before the name of a stage: its learning rate


def read_curves(run: Path) -> RunCurves:
    """Read the curves of a run; all are None where nothing was logged so far.

    Raises:
        ValueError: The file is damaged.
    """
    by_step = []
    by_epoch = []
    for row in read_rows(run / METRICS):
        if row.get(TRAINABLE_FIGURE):
            by_epoch.append(row)
        else:
            by_step.append(row)
    steps = _curves(by_step, "step")
    epochs = _curves(by_epoch, "epoch")
    stage_rates = {}
    for name, curve in epochs.items():
        if name.startswith(STAGE_RATE_PREFIX):
            stage_rates[name.removeprefix(STAGE_RATE_PREFIX)] = curve.y
    steps_so_far = None
    if "step" in epochs:
        last_steps = epochs["step"]
        steps_so_far = Curve(last_steps.x, last_steps.y + 1)
    return RunCurves(
        step_loss=steps.get("train/loss"),
        step_accuracy=steps.get("train/acc_step"),
        step_val_loss=steps.get("val/loss_step"),
        step_val_accuracy=steps.get("val/acc_step"),
        train_loss=epochs.get("train/loss_epoch"),
        train_accuracy=epochs.get("train/acc"),
        val_loss=epochs.get("val/loss"),
        val_accuracy=epochs.get("val/acc"),
        learning_rate=epochs.get(LEARNING_RATE_FIGURE),
        trainable_parameters=epochs.get(TRAINABLE_FIGURE),
        steps=steps_so_far,
        stage_rates=stage_rates,
    )


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of the file by the names of its columns; none if there is no file.

    Raises:
        ValueError: It is no table.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except csv.Error as error:
        raise ValueError(f"{path.name}: {error}") from None


def _curves(rows: Iterable[Mapping[str, str]], place: str) -> dict[str, Curve]:
    """Return a curve for each column, over the "step" or the "epoch" of its rows.

    Of what was logged twice at one place the later value counts.
    """
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        if not row[place]:  # what is logged after the training has no epoch
            continue
        x = int(row[place])
        for name, text in row.items():
            if text and name != place:
                values.setdefault(name, {})[x] = float(text)
    curves = {}
    for name, by_place in values.items():
        points = np.array(sorted(by_place.items()), np.float64)
        curves[name] = Curve(points[:, 0], points[:, 1])
    return curves
