"""The curves of a run: TensorBoard's logger in a folder of the run's own, and its event files without overlaps."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain, count, dropwhile
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.summary.writer.record_writer import RecordWriter

from cifar_transfer.base.console import counted
from cifar_transfer.base.files import atomic_write
from cifar_transfer.training.classifier import (
    LEARNING_RATE_FIGURE,
    STAGE_RATE_PREFIX,
    STEPS_FIGURE,
)
from cifar_transfer.training.metrics_file import OF_EPOCH, MetricsFile, trim_metrics

# Names in TensorBoard of figures that are called otherwise elsewhere: it sorts by names, and opens the first groups.
TAGS = {
    "train/acc": "accuracy/train",
    "train/acc_step": "accuracy/train_step",
    "val/acc": "accuracy/val",
    "val/acc_step": "accuracy/val_step",
    "train/loss_epoch": "loss/train",
    "train/loss": "loss/train_step",
    "val/loss": "loss/val",
    "val/loss_step": "loss/val_step",
}
NAMES = {tag: name for name, tag in TAGS.items()}
FINAL = "result/"  # in TensorBoard before the name of a score of the best checkpoint

EPOCH_SCORES = ("train/acc", "train/loss_epoch", "val/acc", "val/loss")
BY_EPOCH = {*EPOCH_SCORES, LEARNING_RATE_FIGURE, OF_EPOCH, STEPS_FIGURE}


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger, which names a run's folder at once, but makes it and writes into it only when told to.

    Lightning asks for both before data, network and checkpoint are checked, and a run that is then refused would leave
    them. Lightning's chart of the epoch is left out. All that is logged is in `metrics.csv` too.

    Args:
        logs: Folder of the runs, absolute, because a ModelCheckpoint that finds another path forgets its best score.
        run: Name of the run's folder if it continues; None for a new one.
    """

    def __init__(self, logs: Path, run: str | None = None) -> None:
        super().__init__(str(logs.parent), logs.name, run, default_hp_metric=False)
        self._run, self._new, self._started = run, run is None, False
        self._metrics: MetricsFile | None = None

    @property
    def version(self) -> str:
        """Name of the run's folder; of a new run, until it starts, the first one that is free."""
        if self._run is None:
            self._run = next(new_names(Path(self.root_dir)))
        return self._run

    @property
    def experiment(self) -> Any:
        """TensorBoard's writer; before the run starts, and on other ranks than the first, one that writes nothing."""
        return super().experiment if self._started else DummyLogger().experiment

    def start(self, trainer: Trainer) -> None:
        """Make the folder, on the first rank, and tell the others; of two runs that start at once each has its own."""
        expected = Path(self.log_dir)
        if self._new and trainer.is_global_zero:
            self._make_folder()
        expected, self._run = trainer.strategy.broadcast((expected, self._run))
        self._started, folder = True, Path(self.log_dir)
        if folder == expected:
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and Path(
                callback.dirpath or "/"
            ).is_relative_to(expected):
                callback.dirpath = str(folder / Path(callback.dirpath or "").relative_to(expected))
        rank = trainer.local_rank if trainer.world_size > 1 else None
        trainer.profiler.setup("fit", rank, str(folder))  # type: ignore[attr-defined] # set by one of its connectors

    def _make_folder(self) -> None:
        logs = Path(self.root_dir)
        logs.mkdir(parents=True, exist_ok=True)
        for name in chain([self.version], new_names(logs)):
            with suppress(FileExistsError):
                (logs / name).mkdir()
                self._run = name
                return

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars."""
        scalars = {name: value for name, value in metrics.items() if name != "epoch"}
        super().log_metrics({TAGS.get(name, name): value for name, value in scalars.items()}, step)
        if not self._started:
            return
        self._metrics = self._metrics or MetricsFile(Path(self.log_dir))
        if STEPS_FIGURE in metrics:  # of an epoch
            self._metrics.add(step, int(scalars.pop(STEPS_FIGURE)) - 1, scalars)
        else:
            self._metrics.add(
                counted(int(metrics["epoch"])) if "epoch" in metrics else None, step, scalars
            )

    @rank_zero_only
    def save(self) -> None:
        """Write what is held back, once the run has started."""
        if self._started:
            super().save()
        if self._metrics:
            self._metrics.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is held back, and close the files."""
        super().finalize(status)
        self.save()


def slurm_job() -> int | None:
    """The number of the SLURM job that this process is a task of, which stays when the job is requeued; else None."""
    return SLURMEnvironment.job_id() if SLURMEnvironment.detect() else None


def new_names(logs: Path) -> Iterator[str]:
    """Names for the folder of a new run, the first of which is free: `version_N`, in a SLURM job `slurm_JOB[_N]`."""
    if (job := slurm_job()) is None:
        numbers = [path.name.removeprefix("version_") for path in logs.glob("version_*")]
        first = max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1
        return (f"version_{number}" for number in count(first))
    names = chain([f"slurm_{job}"], (f"slurm_{job}_{number}" for number in count(1)))
    return dropwhile(lambda name: (logs / name).exists(), names)


def trim_events(run: Path, epochs: int, steps: int) -> None:
    """Remove from a run's event files and its table what was logged after its last checkpoint, to be logged again.

    TensorBoard's own `purge_step` does not do, because it knows one x axis, and a run has two: epochs and steps. So
    this reads and writes the files with TensorBoard's internals.

    Args:
        run: Folder of the run.
        epochs: How many are not trained again; scores of epochs have the epoch, from 1, as their step.
        steps: How many optimizer steps are not made again.
    """
    trim_metrics(run, epochs, steps)
    for path in sorted(run.glob("events.out.tfevents.*")):
        with atomic_write(path) as file:
            writer = RecordWriter(file)
            for event in LegacyEventFileLoader(
                str(path)
            ).Load():  # stops before a record that was cut short
                tags = {NAMES.get(value.tag, value.tag) for value in event.summary.value}
                final = any(tag.startswith(("best/", FINAL)) for tag in tags)
                by_epoch = tags & BY_EPOCH or any(tag.startswith(STAGE_RATE_PREFIX) for tag in tags)
                kept = event.step <= epochs if by_epoch else event.step < steps
                if not tags or (kept and not final):
                    writer.write(event.SerializeToString())
