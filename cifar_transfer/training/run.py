"""A run: its folder and what lies there, its lock, its configuration, and its Trainer.

lightning_logs/version_0/
    config.yaml             options of the run, with which `--resume` begins
    splits.json.gz          which image is in which split
    checkpoints/best.ckpt   weights of the best epoch, see `RunCheckpoint`
    checkpoints/last.ckpt   state of the latest epoch, from which `--resume` continues
    result.json             what the run came to, written when it is finished
    .lock                   held by the process that trains the run

Each run has a folder of its own, `version_N` or one with a name, whatever its loggers are. Loggers
of the user's own write where their options say.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, FileLock, Timeout
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import CONFIG, new_versions, remove_partial, write_text
from cifar_transfer.data import splits
from cifar_transfer.training import lightning_internals

CHECKPOINTS = "checkpoints"  # folder in the folder of a run
BEST = "best.ckpt"
LAST = "last.ckpt"
LOCK = ".lock"
MAX_NAME_BYTES = 255  # of a folder, on most file systems


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        epochs: Whole epochs that are trained.
        steps: Steps of the optimizer.
    """

    epochs: int = 0
    steps: int = 0

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "Progress":
        """Return how far a run had come when a checkpoint was written."""
        epochs = checkpoint["epoch"]
        if lightning_internals.ended_epoch(checkpoint):
            epochs += 1
        return cls(epochs, checkpoint["global_step"])


class RunFolder(Callback):
    """Make the folder of a run, lock it, and write the configuration and the record of the splits.

    The folder of a new run is made when the Trainer is set up. One that exists is never taken. A
    start that is refused, because data, network or checkpoint do not fit, leaves nothing behind,
    and changes nothing in the folder of a run that continues. Checkpoints hold the configuration,
    with which a run that continues from one of them is compared.

    It is the first of the callbacks, because others write into the folder.

    Args:
        logs: Folder of the runs.
        config: Text of `config.yaml`.
        resumed: Folder of the run if it continues in place; None for a new one.
        name: Name of the folder of a new run; see `named_folder`. None: `version_N`.

    Attributes:
        path: Folder of the run. Of a new run it is final after `setup`.
        is_resumed: Whether the run continues in place.
        started: Whether training has begun, and the folder is to be written into.

    Raises:
        UserError: The name is not that of a folder, or there is such a folder already.
    """

    def __init__(
        self, logs: Path, config: str, resumed: Path | None = None, name: str | None = None
    ) -> None:
        if resumed is not None:
            self.path = resumed
        elif name is not None:
            self.path = named_folder(logs, name)
            check_new(self.path, logs)
        else:
            self.path = next(new_versions(logs))
        self.is_resumed = resumed is not None
        self.started = False
        self._logs = logs
        self._has_name = name is not None
        self._config = config
        self._options = yaml.safe_load(config)
        self._made_folders: list[Path] = []
        self._lock: BaseFileLock | None = None
        self._processes = 1
        self._training_images: str | None = None

    def lock(self) -> None:
        """Lock the folder of a run that continues; other processes of this run must not call it.

        A run that has no lock yet gets one when it starts.

        Raises:
            UserError: Another process trains the run.
        """
        if self.is_resumed and (self.path / LOCK).is_file():
            self._acquire_lock()

    def release(self) -> None:
        """Let other processes continue the run."""
        if self._lock is not None:
            self._lock.release()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the folder of a new run, and tell the other processes of it."""
        if stage != "fit" or self.started:
            return
        expected_path = self.path
        if trainer.is_global_zero and not self.is_resumed:
            self._make_folder()
        self.path = trainer.strategy.broadcast(self.path)
        self._processes = trainer.world_size
        lightning_internals.move_profiler(trainer, expected_path, self.path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write into the folder, because the run is accepted now."""
        self._start(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a run that has no epoch left to train, but perhaps its test."""
        self._start(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the folder of a run that has not started."""
        if self.started:
            return
        for folder in reversed(self._made_folders):
            with suppress(OSError):  # it is not empty: another run has begun in it
                folder.rmdir()

    def state_dict(self) -> dict[str, Any]:
        """Return what `resume` compares a run that continues with."""
        return {
            "config": self._options,
            "processes": self._processes,
            "training_images": self._training_images,
        }

    def _make_folder(self) -> None:
        for folder in reversed(self.path.parents):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                self._made_folders.append(folder)
        folders = iter([self.path]) if self._has_name else new_versions(self._logs)
        for folder in folders:
            try:
                folder.mkdir()
            except FileExistsError:  # of a run that began at the same time
                continue
            self._made_folders.append(folder)
            self.path = folder
            return
        raise _taken(self.path)

    def _start(self, trainer: Trainer) -> None:
        if self.started:
            return
        data = lightning_internals.data_of(trainer)  # the command line has always one
        self._training_images = splits.digest(data.names["train"])
        if trainer.is_global_zero:
            self._acquire_lock()
            for folder in (self.path, self.path / CHECKPOINTS):
                remove_partial(folder)
            data.record_splits(self.path)
            write_text(self.path / CONFIG, self._config)
        self.started = True
        if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            preformatted = "\n".join(f"    {line}" for line in self._config.splitlines())
            trainer.logger.experiment.add_text(CONFIG, preformatted)
            trainer.logger.save()

    def _acquire_lock(self) -> None:
        if self._lock is not None:
            return
        lock = FileLock(self.path / LOCK)
        shown_path = os.path.relpath(self.path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"{shown_path} is being trained by another process: wait for its end, or stop it."
            ) from None
        except OSError as error:  # a file system without locks, or another user's file
            rank_zero_warn(
                f"{shown_path} cannot be locked ({error.strerror}): make sure that no other "
                f"process trains it."
            )
            return
        self._lock = lock


def named_folder(logs: Path, name: str) -> Path:
    """Return the folder of a run that has a name.

    Args:
        logs: Folder of the runs.
        name: Name of the folder, which may be within others: "small" or "sweep/small".

    Raises:
        UserError: It is no name of a folder within `logs`.
    """
    for part in name.split("/"):
        is_word = part.isprintable() and part == part.strip() != ""
        is_short = len(part.encode(errors="surrogatepass")) <= MAX_NAME_BYTES
        if not is_word or not is_short or part.startswith((".", "-")) or "\\" in part:
            raise UserError(
                f"--run={name} is no name of a folder in {logs.name}: take a name such as small, "
                f"or sweep/small for a folder within another."
            )
    return logs / name


def check_new(folder: Path, logs: Path) -> None:
    """Refuse the folder of a new run if it exists, or if it is within that of another run.

    Raises:
        UserError: See above.
    """
    if os.path.lexists(folder):
        raise _taken(folder)
    for parent in folder.parents:
        if parent == logs:
            return
        if (parent / CONFIG).is_file():
            raise UserError(
                f"{os.path.relpath(parent)} is the folder of a run, which keeps no other runs: "
                f"give --run another name."
            )


def _taken(folder: Path) -> UserError:
    shown_path = os.path.relpath(folder)
    return UserError(
        f"{shown_path} is there already, and a run writes into no folder but its own: give --run "
        f"another name, or continue that run with --resume={shown_path}."
    )


class RunTrainer(Trainer):
    """A Trainer whose `log_dir` is the folder of the run, whatever its loggers are.

    Args:
        folder: Folder of the run, which is also among the callbacks.
        **options: Options of the Trainer.
    """

    def __init__(self, folder: RunFolder, **options: Any) -> None:
        self._folder = folder
        super().__init__(**options)

    @property
    def log_dir(self) -> str:
        """Folder of the run. The other processes know that of a new run after `setup`."""
        return str(self._folder.path)


def folder_of(trainer: Trainer) -> Path | None:
    """Return the folder in which a run keeps files; None if it keeps none.

    All processes must ask. A plain Trainer without a logger keeps none, although its `log_dir` is
    the current folder.
    """
    folder = trainer.log_dir
    keeps_files = trainer.logger is not None or isinstance(trainer, RunTrainer)
    if folder is None or not keeps_files:
        return None
    return Path(folder)
