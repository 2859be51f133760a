"""The checkpoints of a run: `best.ckpt` and `last.ckpt`, each replaced in one move."""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import atomic_write
from cifar_transfer.training import lightning_internals
from cifar_transfer.training.run import CHECKPOINTS, RunFolder


class RunCheckpoint(ModelCheckpoint):
    """Keep one checkpoint of a run, which is replaced in one move.

    The best one is written at the validation that finds it so, with the weights that were
    validated; the last one when an epoch is over and the schedule has stepped.

    Args:
        folder: Folder of the run.
        file_name: Name of the checkpoint, `BEST` or `LAST`.
        monitor: Figure of which the highest value is kept; None keeps the latest weights.
    """

    def __init__(self, folder: RunFolder, file_name: str, monitor: str | None = None) -> None:
        super().__init__(
            filename=Path(file_name).stem,
            monitor=monitor,
            mode="max",
            save_top_k=1,
            save_on_train_epoch_end=monitor is None,
            enable_version_counter=False,
        )
        self._folder = folder
        self._file_name = file_name
        self._save_after_validation = False

    @property
    def path(self) -> Path:
        """The file. That of a new run is final after `setup`."""
        return self._folder.path / CHECKPOINTS / self._file_name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the checkpoint in the folder of the run, which is made by now."""
        self.dirpath = str(self.path.parent)
        super().setup(trainer, pl_module, stage)

    def save_within_epoch(self, trainer: Trainer) -> None:
        """Save a run that stops before its epoch is over.

        If a validation follows this step, the run is saved again after it, with its scores.
        """
        trainer.save_checkpoint(self.path)
        self._save_after_validation = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the best checkpoint, and the last one of a run that stops."""
        super().on_validation_end(trainer, pl_module)
        if self._save_after_validation and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let an epoch that `max_steps` or `max_time` ended early go on when the run is resumed."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.is_last_batch:
            lightning_internals.leave_epoch_open(checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the scores of the run so far, also if its folder has moved since.

        A new run that begins from the checkpoint of another one has a best score of its own.
        """
        if self._folder.is_resumed:
            state_dict = lightning_internals.moved_checkpoints(state_dict, str(self.path.parent))
        super().load_state_dict(state_dict)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints whole: the one before is kept until the new one is on the disk.

    Lightning writes them into the system's folder for temporary files first, which may be on
    another disk, so that moving them is not one step.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            UserError: It cannot be written. The one before is kept.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            cause: BaseException | None = error
            if isinstance(error, RuntimeError):
                # torch says "write failed" or "unexpected pos" when its zip file cannot grow.
                cause = error.__context__
            if not isinstance(cause, OSError):
                raise
            before = "there is none before"
            if path.is_file():
                before = "the one before is kept"
            raise UserError(
                f"The checkpoint {path} cannot be written ({cause.strerror}); {before}."
            ) from error
