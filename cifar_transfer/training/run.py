"""A run: its folder, which process it belongs to, its configuration, and where it continues."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout
from jsonargparse import set_parsing_settings
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import CONFIG, RESULT, atomic_write, remove_partial, write_text
from cifar_transfer.data import splits
from cifar_transfer.training.checkpoint_file import read_checkpoint
from cifar_transfer.training.logger import RunLogger, slurm_job, trim_events

LOCK = ".lock"  # held by the process that trains the run


def import_nothing_else(args: Sequence[str]) -> None:
    """Let a run's own configuration name no class but this project's, Lightning's and those on the command line.

    It may be somebody else's, and to see what a name stands for its module is imported, which is to run it. What
    `--config` gives is a choice of whoever gives it, and may name any. From here on this holds for the whole process.
    """
    values = [arg.partition("=")[2] if arg.startswith("--") else arg for arg in args]
    named = [
        value
        for value in values
        if re.fullmatch(r"(?!jsonargparse\.)[^\W\d]\w*(\.[^\W\d]\w*)+", value)
    ]
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=["cifar_transfer", "lightning", *named]
    )


def check_places(trainer: Trainer, run: Path) -> None:
    """Refuse a run's own configuration that has files written elsewhere than in its folder or in those beside it.

    It may be somebody else's, and name any place.
    """
    writers = [*trainer.callbacks, trainer.profiler, *trainer.loggers]  # type: ignore[attr-defined]
    places = [getattr(writer, name, None) for writer in writers for name in ("dirpath", "log_dir")]
    for place in filter(None, places):
        if not Path(place).resolve().is_relative_to(run.parent):
            raise UserError(
                f"{run / CONFIG} has files written to {place}, outside of the run: take that out of it first."
            )


class RunCheckpoint(ModelCheckpoint):
    """A file of a run, replaced in one move: the best is written at the validation that finds it so, with the weights
    that were validated; the latest when an epoch is over and the schedule has stepped.

    Args:
        filename: Its name without the ending.
        monitor: Keep the best by this metric (highest); None keeps the latest.
        in_place: The run is continued in its own folder. Should that have moved, the best score is still known, which
            Lightning's class would forget, and then replace the best checkpoint by a worse one.

    Attributes:
        stopping: The run is to stop: what was written before a validation within the epoch is written again after it,
            with its scores.
    """

    def __init__(self, filename: str, monitor: str | None = None, in_place: bool = False) -> None:
        own: dict[str, Any] = {
            "save_on_train_epoch_end": monitor is None,
            "enable_version_counter": False,
        }
        super().__init__(filename=filename, monitor=monitor, mode="max", save_top_k=1, **own)
        self.in_place, self.stopping = in_place, False

    @property
    def path(self) -> Path | None:
        """The file; None before `setup`."""
        return Path(self.dirpath, f"{self.filename}{self.FILE_EXTENSION}") if self.dirpath else None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the best, and the latest of a run that is to stop."""
        super().on_validation_end(trainer, pl_module)
        if self.stopping and self.path and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let an epoch that `max_steps`, `max_time` or a callback ended early go on when the run is resumed.

        Lightning counts it as processed, and would begin with the next one.
        """
        if trainer.state.fn == TrainerFn.FITTING and not trainer.is_last_batch:
            for counts in ("total", "current"):
                progress = checkpoint["loops"]["fit_loop"]["epoch_progress"][counts]
                progress["processed"] = progress["completed"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the scores of the run so far."""
        if self.in_place and self.dirpath:

            def here(path: str) -> str:
                return path and str(Path(self.dirpath or "", Path(path).name))

            keys = ("best_model_path", "kth_best_model_path", "last_model_path")
            scores = {here(path): score for path, score in state_dict["best_k_models"].items()}
            state_dict = state_dict | {key: here(state_dict[key]) for key in keys}
            state_dict |= {"best_k_models": scores, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)


class RunFolder(Callback):
    """Makes a run's folder its own when training starts, for then options, data, network and checkpoint are accepted.

    Before that nothing on the disk is changed. The folder is locked until `release` or the end of the process; what was
    logged after the checkpoint is removed; the configuration is written.

    Args:
        config: Text of `config.yaml`.
        resumed: Folder of the run if it is continued in place, None for a new one.
        state: Checkpoint that training continues from.

    Attributes:
        started: Whether the folder is this run's.
    """

    def __init__(self, config: str, resumed: Path | None, state: Path | None) -> None:
        self.config, self.resumed, self.state = config, resumed, state
        self.started = False
        self._lock: BaseFileLock | None = None

    def lock(self, trainer: Trainer) -> None:
        """Lock the folder of a run that continues, on the first rank; one that has no lock yet only when it starts."""
        if trainer.is_global_zero and self.resumed and (self.resumed / LOCK).is_file():
            self._acquire(self.resumed)

    def _acquire(self, folder: Path) -> None:
        if self._lock is not None:
            return
        lock, where = FileLock(folder / LOCK), os.path.relpath(folder)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"{where} is being trained by another process: wait for its end, or stop it."
            ) from None
        except OSError as error:  # of a file system without locks, or another user's file
            rank_zero_warn(
                f"{where} cannot be locked ({error.strerror}): see to it that no other process trains it."
            )
            return
        self._lock = lock

    def release(self) -> None:
        """Let other processes continue the run."""
        if self._lock is not None:
            self._lock.release()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note what a run that continues from this one is compared with."""
        self._options: dict[str, Any] = {
            "processes": trainer.world_size,
            "max_epochs": trainer.max_epochs,
        }

    def state_dict(self) -> dict[str, Any]:
        """The number of processes and of epochs, and the training images, which are in no hyper-parameters."""
        return self._options

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the folder."""
        self._start(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the folder of a run that has no epoch left to train, but perhaps its test."""
        self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        if self.started:
            return
        if names := trainer.datamodule.names.get("train"):  # type: ignore[attr-defined] # as it is one of ours
            self._options["training_images"] = splits.digest(names)
        if isinstance(trainer.logger, RunLogger):
            trainer.logger.start(trainer)
        folder = trainer.log_dir  # asked for by all ranks together
        if trainer.is_global_zero and folder is not None:
            self._write(trainer, Path(folder))
        self.started = True

    def _write(self, trainer: Trainer, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self.resumed or isinstance(trainer.logger, RunLogger):
            self._acquire(self.resumed or folder)
        if self.resumed:
            for place in (self.resumed, self.resumed / "checkpoints"):
                remove_partial(place)
            trim_events(self.resumed, *_done(self.state))
        trainer.datamodule.record_splits(folder)  # type: ignore[attr-defined] # as it is one of ours
        write_text(folder / CONFIG, self.config)
        if isinstance(trainer.logger, TensorBoardLogger):
            text = "\n".join(f"    {line}" for line in self.config.splitlines())
            trainer.logger.experiment.add_text(CONFIG, text)
            trainer.logger.save()


def requeued_run(logs: Path, config: str) -> Path | None:
    """The run that a requeued SLURM job continues, told from others of the job by its configuration, or None.

    An unfinished one comes before a finished one.
    """
    if (job := slurm_job()) is None or int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0:
        return None
    runs = [
        path.parent for path in logs.glob(f"slurm_{job}*/{CONFIG}") if path.read_text() == config
    ]
    ours = [
        run for run in runs if run.name == f"slurm_{job}" or run.name.startswith(f"slurm_{job}_")
    ]
    ours.sort(key=lambda run: ((run / RESULT).is_file(), len(run.name), run.name))
    return ours[0] if ours else None


def newest_state(run: Path) -> Path | None:
    """The checkpoint to continue a run from: `last.ckpt`, or Lightning's for SLURM if newer; None before any."""
    states = [
        path
        for path in (run / "checkpoints" / "last.ckpt", *run.glob("hpc_ckpt_*.ckpt"))
        if path.is_file()
    ]
    return max(states, key=os.path.getmtime, default=None)


def _done(state: Path | None) -> tuple[int, int]:
    """Whole epochs and optimizer steps that a checkpoint has behind it."""
    if state is None:
        return 0, 0
    checkpoint = torch.load(state, "cpu", weights_only=True, mmap=True)
    over = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
    return checkpoint["epoch"] + over, checkpoint["global_step"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are never half written: the one before is kept until the new one is on the disk.

    Lightning's come from the system's folder for temporary files, which may be another disk: that is no single move.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, or raise a `UserError` and keep the one before."""
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
            raise UserError(
                f"The checkpoint {path} cannot be written ({cause.strerror}); {kept}."
            ) from error

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint as everywhere, onto the CPU: no code that it may hold is run."""
        return read_checkpoint(path)
