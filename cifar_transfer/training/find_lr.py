"""Learning rates to begin with: `python -m cifar_transfer.fit --find_lr [options]`.

Lightning's range test (https://arxiv.org/abs/1506.01186): a hundred steps, the rate of each higher than the one before.
It is done for the head while the backbone is frozen, and for the whole network, each time on a copy, so that nothing is
learned, and nothing is written but a picture.

What is suggested is a tenth of the rate at which the loss is lowest, as fastai does, and not what Lightning suggests.
That is the steepest fall of a running mean, which lags so far behind that it lies just before the explosion, and a fall
by the rate itself instead of its logarithm (pytorch-lightning #21141).
"""

import copy
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning import LightningDataModule, Trainer
from lightning.pytorch.tuner import Tuner
from matplotlib.figure import Figure

from cifar_transfer.console import say
from cifar_transfer.data.images import Batch
from cifar_transfer.results.plots import BLUE, GREY, ORANGE
from cifar_transfer.training.classifier import TransferClassifier
from cifar_transfer.training.freeze import BackboneFreeze

STEPS = 100
LOWEST, HIGHEST = 1e-6, 1.0
BELOW = 10  # how far below the rate of the lowest loss the suggestion lies
PICTURE = "find_lr.png"
# Lightning's words on a run, which this is not, and where they come from.
SOURCES = ("utilities.rank_zero", "tuner.lr_finder", "trainer.connectors.checkpoint_connector")
NOISE = re.compile(r"LR finder stopped|`Trainer.fit` stopped|Restor(ing|ed all) states|`weights_only` was not set")


class Curve(NamedTuple):
    """What a range test saw.

    Attributes:
        title: What was trained.
        option: Of `fit`, the one that the rate is for.
        rates: Of the batches, rising.
        losses: Of the batches.
        smooth: The losses' mean around each rate.
        suggestion: The learning rate to begin with, or None if the loss fell at none.
    """

    title: str
    option: str
    rates: list[float]
    losses: list[float]
    smooth: list[float]
    suggestion: float | None

    def __str__(self) -> str:
        """The option as `fit` takes it."""
        return f"{self.option}={self.suggestion:.2g}" if self.suggestion else "falls at no rate"


class Probe(TransferClassifier):
    """A copy of a network that is frozen and noted from its own hooks: the range test sets all callbacks aside."""

    freezing: BackboneFreeze
    rates: list[float]
    losses: list[float]

    @classmethod
    def of(cls, model: TransferClassifier, freeze: BackboneFreeze) -> "Probe":
        """The copy, as `freeze` will have it."""
        probe = copy.deepcopy(model)
        probe.__class__ = cls
        assert isinstance(probe, cls)
        probe.freezing, probe.rates, probe.losses = freeze, [], []
        return probe

    def on_train_start(self) -> None:
        """Freeze; and do not compile, which would take longer than all else."""
        self.freezing.on_train_start(self.trainer, self)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Note the rate."""
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Note the loss."""
        self.losses.append(float(outputs["loss"]))


def settings() -> dict[str, Any]:
    """Options of a Trainer that keeps nothing, and goes on for as many steps as it takes."""
    return {
        "callbacks": [],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,  # the range test has its own
        "fast_dev_run": False,
        "max_epochs": STEPS,
        "check_val_every_n_epoch": STEPS + 1,
    }


def find_lr(trainer: Trainer, model: TransferClassifier, data: LightningDataModule) -> list[Curve]:
    """Find the learning rates of a run, print them as options and draw what they were found from.

    Args:
        trainer: With `settings` and the run's `BackboneFreeze`.
        model: Whose weights stay as they are.
        data: For training.

    Returns:
        The curve of the frozen phase, if the run has one, and that of the whole network.
    """
    freeze = next(callback for callback in trainer.callbacks if isinstance(callback, BackboneFreeze))  # type: ignore[attr-defined]
    everything = BackboneFreeze(unfreeze_epoch=0)
    if freeze.unfrozen:
        curves = [_curve(trainer, model, data, everything, "everything", "--model.lr")]
    else:
        head = "--model.lr" if model.hparams["head_lr"] is None else "--model.head_lr"
        curves = [
            _curve(trainer, model, data, freeze, "while frozen", head),
            _curve(trainer, model, data, everything, "everything", "--freeze.unfrozen_lr"),
        ]
    path = Path(trainer.default_root_dir, PICTURE)
    if trainer.is_global_zero:
        figure(curves).savefig(path, dpi=110)
    if found := [str(curve) for curve in curves if curve.suggestion]:
        say(trainer, f"options     {' '.join(found)}")
    for curve in curves:
        if not curve.suggestion:
            say(trainer, f"no rate     for {curve.option}: the loss falls at none from {LOWEST:g} to {HIGHEST:g}")
    say(trainer, f"look at it  {os.path.relpath(path)}")
    return curves


def _curve(
    trainer: Trainer,
    model: TransferClassifier,
    data: LightningDataModule,
    freeze: BackboneFreeze,
    title: str,
    option: str,
) -> Curve:
    probe = Probe.of(model, freeze)
    trainer.callbacks = [freeze]  # type: ignore[attr-defined]
    with _quietly():
        Tuner(trainer).lr_find(
            probe, datamodule=data, min_lr=LOWEST, max_lr=HIGHEST, num_training=STEPS, update_attr=False
        )
    smooth, suggestion = suggest(probe.rates, probe.losses)
    return Curve(title, option, probe.rates, probe.losses, smooth, suggestion)


def suggest(rates: Sequence[float], losses: Sequence[float]) -> tuple[list[float], float | None]:
    """The losses' mean around each rate, and the learning rate that they suggest.

    Args:
        rates: Rising from `LOWEST`.
        losses: As many; not all need be numbers.

    Returns:
        Means under a bell that falls to a half within 0.3 decades, and the suggestion, or None if they fall by no more
        than the losses at the lowest rates differ among themselves.
    """
    at, values = np.log10(rates), np.array(losses)
    bell = np.exp(-(((at[:, None] - at) / 0.25) ** 2) / 2) * np.isfinite(values)
    smooth = bell @ np.nan_to_num(values, posinf=0) / bell.sum(1)
    falls = smooth[0] - smooth.min() > values[at < at[0] + 1].std()
    return smooth.tolist(), rates[int(smooth.argmin())] / BELOW if falls else None


@contextmanager
def _quietly() -> Iterator[None]:
    """Without `NOISE`, and without the range test's bar where that would fill a log."""
    loggers, held = [logging.getLogger(f"lightning.pytorch.{name}") for name in SOURCES], io.StringIO()

    def told(record: logging.LogRecord) -> bool:
        return not NOISE.match(record.getMessage())

    for logger in loggers:
        logger.addFilter(told)
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(held):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(told)
        lines = held.getvalue().splitlines(keepends=True)  # also at the bar's carriage returns
        sys.stderr.writelines(line for line in lines if line.strip() and not line.startswith("Finding best initial lr"))


def figure(curves: Sequence[Curve]) -> Figure:
    """The loss against the rate, a panel for each curve, and what it suggests."""
    drawn = Figure(figsize=(5.5 * len(curves), 4.2), layout="constrained")
    for axis, curve in zip(drawn.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        axis.plot(curve.rates, curve.losses, ".", color=GREY, label="a batch")
        axis.plot(curve.rates, curve.smooth, color=BLUE, linewidth=2, label="mean")
        axis.set(title=f"{curve.title}: {curve}", xlabel="learning rate", xscale="log")
        if curve.suggestion:
            axis.axvline(curve.suggestion, color=ORANGE, linestyle="--", linewidth=2, label="suggested")
            low, high = min(curve.smooth), curve.smooth[0]
            axis.set_ylim(1.5 * low - 0.5 * high, 2 * high - low)  # where it explodes is out of sight
        axis.grid(alpha=0.3)
    drawn.axes[0].set_ylabel("training loss")
    drawn.axes[0].legend(loc="lower left")
    return drawn
