"""Learning rates to begin with: `python -m cifar_transfer.fit --find_lr [options]`.

A range test (https://arxiv.org/abs/1506.01186): a hundred steps, the rate of each higher than the one before, on a copy
of the network, once as it is frozen and once as a whole. The suggestion is a tenth of the rate at which the loss is
lowest, as in fastai.

Why not Lightning's `Tuner`: it removes all callbacks, so that nothing would be frozen, it writes a checkpoint, and its
suggestion comes from a running mean that lags, so that it lies just before the explosion (pytorch-lightning #21141).
"""

import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import Callback
from matplotlib.figure import Figure

from cifar_transfer.console import say
from cifar_transfer.data.images import Batch
from cifar_transfer.results import plots
from cifar_transfer.results.plots import BLUE, GREY, ORANGE
from cifar_transfer.training.classifier import TransferClassifier
from cifar_transfer.training.freeze import BackboneFreeze

STEPS = 100
LOWEST, HIGHEST = 1e-6, 1.0
BELOW = 10  # how far below the rate of the lowest loss the suggestion lies
PLOT = "find_lr.png"


class Curve(NamedTuple):
    """What a range test saw."""

    title: str  # what was trained
    option: str  # of `fit`, the one that the rate is for
    rates: list[float]  # of the batches, rising
    losses: list[float]
    smooth: list[float]  # the losses' mean around each rate
    suggestion: float | None  # the learning rate to begin with, or None if the loss fell at none

    def __str__(self) -> str:
        """The option as `fit` takes it."""
        return f"{self.option}={self.suggestion:.2g}" if self.suggestion else "falls at no rate"


class RangeTest(Callback):
    """Freezes as another callback does when training starts, raises the rate from step to step, notes the losses."""

    def __init__(self, freeze: BackboneFreeze) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.freeze = freeze

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be frozen."""
        self.freeze.setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze."""
        self.freeze.on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put frozen modules into eval mode; nothing unfreezes later, whatever the epoch."""
        self.freeze.on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Set the rate of all parameters, whatever a schedule has set."""
        self.rates.append(LOWEST * (HIGHEST / LOWEST) ** (len(self.rates) / (STEPS - 1)))
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.rates[-1] * group.get("lr_scale", 1.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Note the loss, and stop after the highest rate."""
        self.losses.append(float(outputs["loss"]))
        trainer.should_stop = len(self.losses) == STEPS


def settings() -> dict[str, Any]:
    """Options of a Trainer that keeps nothing, and goes on until `RangeTest` stops it."""
    off = {"logger": False, "enable_checkpointing": False, "fast_dev_run": False, "limit_val_batches": 0}
    ends = {"max_epochs": STEPS, "max_steps": -1, "max_time": None, "min_epochs": None, "min_steps": None}
    return {"callbacks": [], **off, **ends}


def find_lr(trainer: Trainer, model: TransferClassifier, data: LightningDataModule) -> list[Curve]:
    """Find the learning rates of a run, print them as options and plot what they were found from.

    Args:
        trainer: With `settings` and the run's `BackboneFreeze`.
        model: Its weights stay as they are.

    Returns:
        The curve of the frozen phase, if the run has one, and that of the whole network.
    """
    freeze = next(callback for callback in trainer.callbacks if isinstance(callback, BackboneFreeze))  # type: ignore[attr-defined]
    head_lr = "--model.lr" if model.hparams["head_lr"] is None else "--model.head_lr"
    phases = [("while frozen", head_lr, freeze), ("everything", "--freeze.unfrozen_lr", BackboneFreeze(0))]
    curves = []
    for title, option, frozen in [("everything", "--model.lr", freeze)] if not freeze.freezes else phases:
        test = RangeTest(frozen)
        _run(trainer, model, data, test)
        curves.append(Curve(title, option, test.rates, test.losses, *suggest(test.rates, test.losses)))
    path = Path(trainer.default_root_dir, PLOT)
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        plots.save(plot(curves), path)
    if found := [str(curve) for curve in curves if curve.suggestion]:
        say(trainer, f"options     {' '.join(found)}")
    for curve in curves:
        if not curve.suggestion:
            say(trainer, f"no rate     for {curve.option}: the loss falls at none from {LOWEST:g} to {HIGHEST:g}")
    say(trainer, f"look at it  {os.path.relpath(path)}")
    return curves


def _run(trainer: Trainer, model: TransferClassifier, data: LightningDataModule, test: RangeTest) -> None:
    copy, bar = deepcopy(model), trainer.progress_bar_callback
    copy.hparams.update(compile=False, ema=None)  # the first would take longer than all else
    trainer.callbacks = [test, *([bar] if bar else [])]  # type: ignore[attr-defined]
    beginning = deepcopy(trainer.fit_loop.state_dict())
    trainer.fit(copy, data)
    trainer.fit_loop.load_state_dict(beginning)  # so that the next test sees the same batches
    trainer.fit_loop.restarting = False


def suggest(rates: Sequence[float], losses: Sequence[float]) -> tuple[list[float], float | None]:
    """The mean around each rate of losses, some of which may be NaN or infinite, and the rate that they suggest.

    The mean is under a bell that falls to a half within 0.3 decades. There is no suggestion if it falls by no more than
    the losses at the lowest rates differ among themselves.
    """
    at, values = np.log10(rates), np.array(losses)
    bell = np.exp(-(((at[:, None] - at) / 0.25) ** 2) / 2) * np.isfinite(values)
    smooth = bell @ np.nan_to_num(values, posinf=0) / bell.sum(1)
    falls = smooth[0] - smooth.min() > values[at < at[0] + 1].std()
    return smooth.tolist(), rates[int(smooth.argmin())] / BELOW if falls else None


def plot(curves: Sequence[Curve]) -> Figure:
    """The loss against the rate, a panel for each curve, and what it suggests."""
    figure = Figure(figsize=(5.5 * len(curves), 4.2), layout="constrained")
    for axis, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        axis.plot(curve.rates, curve.losses, ".", color=GREY, label="a batch")
        axis.plot(curve.rates, curve.smooth, color=BLUE, linewidth=2, label="mean")
        axis.set(title=f"{curve.title}: {curve}", xlabel="learning rate", xscale="log")
        if curve.suggestion:
            axis.axvline(curve.suggestion, color=ORANGE, linestyle="--", linewidth=2, label="suggested")
            low, high = min(curve.smooth), curve.smooth[0]
            axis.set_ylim(1.5 * low - 0.5 * high, 2 * high - low)  # where it explodes is out of sight
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("training loss")
    figure.axes[0].legend(loc="lower left")
    return figure
