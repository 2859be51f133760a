"""The folder of a run: how it gets its name, and how what must outlive the process is written into it."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.summary.writer.record_writer import RecordWriter

from cifar_transfer.errors import UserError
from cifar_transfer.files import atomic_write
from cifar_transfer.training.checkpoint import LOGS, read_checkpoint
from cifar_transfer.training.classifier import EPOCH_SCORES

CONFIG = "config.yaml"
EPOCH_TAGS = {*EPOCH_SCORES, "lr", "trainable_parameters"}


def import_nothing_else(args: Sequence[str]) -> None:
    """Let a run's own configuration name no class but this project's, Lightning's and those on the command line.

    It may be somebody else's, and to see what a name stands for its module is imported, which is to run it. A
    configuration given with `--config` is a choice of whoever gives it, and may name any. From here on this holds for
    the whole process.

    Args:
        args: The command line.
    """
    values = [arg.partition("=")[2] if arg.startswith("--") else arg for arg in args]
    named = [value for value in values if re.fullmatch(r"(?!jsonargparse\.)[^\W\d]\w*(\.[^\W\d]\w*)+", value)]
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["cifar_transfer", "lightning", *named])


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are never half written: the one before is kept until the new one is on the disk.

    Lightning's own are written into the system's folder for temporary files and moved from there, which is no single
    step where that is another disk, and nothing waits for the disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            UserError: It cannot be written; the one before is kept.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch says "write failed" or "unexpected pos" when its zip file cannot grow.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            kept = "the one before is kept" if path.is_file() else "there is none before"
            raise UserError(f"The checkpoint {path} cannot be written ({cause.strerror}); {kept}.") from error

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint as everywhere, onto the CPU: no code that it may hold is run.

        Raises:
            UserError: It cannot be read.
        """
        return read_checkpoint(path)


class RunCheckpoint(ModelCheckpoint):
    """A file of a run, written when an epoch is over and the schedule has stepped, and replaced in one move.

    Args:
        filename: Its name without the ending.
        monitor: Keep the best by this metric (highest); None keeps the latest.
        in_place: The run is continued in its own folder. Should that have moved, the best score is still known, which
            Lightning's class would forget, and then replace the best checkpoint by a worse one.
    """

    def __init__(self, filename: str, monitor: str | None = None, in_place: bool = False) -> None:
        super().__init__(
            filename=filename,
            monitor=monitor,
            mode="max",
            save_top_k=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self.in_place = in_place

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the scores of the run so far."""
        if self.in_place and self.dirpath:
            folder = Path(self.dirpath)
            paths = {
                key: str(folder / Path(value).name) if value else value
                for key, value in state_dict.items()
                if key in ("best_model_path", "kth_best_model_path", "last_model_path")
            }
            scores = {str(folder / Path(path).name): score for path, score in state_dict["best_k_models"].items()}
            state_dict = state_dict | paths | {"best_k_models": scores, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` at once, but for a run that continues only when its checkpoint has accepted the options."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write, unless a checkpoint is still to be read."""
        if not self.config.ckpt_path:
            self._write(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is not written yet."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = trainer.log_dir  # asked for by all ranks together
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Into the folder, and as text into TensorBoard."""
        text = self.parser.dump(self.config, skip_none=False)
        if self._folder is not None:
            folder = Path(self._folder)
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / CONFIG) as file:
                file.write(text.encode())
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_text(CONFIG, "\n".join(f"    {line}" for line in text.splitlines()))


class Board(TensorBoardLogger):
    """TensorBoard in a folder of its own, and without Lightning's chart of the epoch, which would come first.

    Args:
        save_dir: As in Lightning's.
        name: As in Lightning's.
        version: The run's folder, or None for a new one.
    """

    def __init__(self, save_dir: str, name: str, version: str | None = None) -> None:
        super().__init__(save_dir, name, version, default_hp_metric=False)
        self._folder = version
        self._number: int | None = None

    @property
    def version(self) -> int | str:
        """Of the run; made when first asked for, so that of two runs that start at once each has its own."""
        if self._folder is not None:
            return self._folder
        if self._number is None:
            first = rank_zero_only.rank == 0  # type: ignore[attr-defined] # set on import
            self._number = self._claim() if first else 0  # the first rank's is what counts
        return self._number

    def _claim(self) -> int:
        parent = Path(self.root_dir)
        parent.mkdir(parents=True, exist_ok=True)
        numbers = [entry.name.removeprefix("version_") for entry in parent.glob("version_*")]
        number = max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1
        while True:
            try:
                (parent / f"version_{number}").mkdir()
            except FileExistsError:
                number += 1
            else:
                return number

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


def job_folder(root: Path) -> Path | None:
    """The folder of the run that is this SLURM job, which keeps its number when it is requeued; elsewhere None.

    Args:
        root: Where runs go.
    """
    if not SLURMEnvironment.detect() or (job := SLURMEnvironment.job_id()) is None:
        return None
    return root / LOGS / f"slurm_{job}"


def newest_state(run: Path) -> Path | None:
    """The checkpoint from which a run is continued: `last.ckpt`, or Lightning's for SLURM if that is newer.

    Args:
        run: Its folder.

    Returns:
        None if the run was stopped before its first checkpoint.
    """
    states = [path for path in (run / "checkpoints" / "last.ckpt", *run.glob("hpc_ckpt_*.ckpt")) if path.is_file()]
    return max(states, key=os.path.getmtime, default=None)


def trim_events(run: Path, epoch: int, step: int) -> None:
    """Remove from a run's event files what was logged after its last checkpoint, and will be logged again.

    A killed run has logged more than it has saved; resumed, its curves would overlap.

    Args:
        run: Folder of the run.
        epoch: First epoch that will be run again; scores of epochs have it as their step.
        step: First optimizer step that will be run again.
    """
    for path in sorted(run.glob("events.out.tfevents.*")):
        with atomic_write(path) as file:
            writer = RecordWriter(file)
            for event in LegacyEventFileLoader(str(path)).Load():  # stops before a record that was cut short
                tags = {value.tag for value in event.summary.value}
                final = any(tag.startswith("best/") for tag in tags)
                if not tags or (not final and event.step < (epoch if tags & EPOCH_TAGS else step)):
                    writer.write(event.SerializeToString())
