"""The checkpoints of a run: `best.ckpt` and `last.ckpt`, each replaced in one move."""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import atomic_write
from cifar_transfer.training import lightning_internals
from cifar_transfer.training.run import CHECKPOINTS, RunFolder

BestFigure = Literal["val/acc", "val/loss", "val/macro_f1"]
# Whether the lowest ("min") or the highest ("max") value of a figure is the best.
MODES: dict[str, str] = {"val/acc": "max", "val/loss": "min", "val/macro_f1": "max"}
TIE_BREAKER = "val/loss"
TIE_LOSS_KEY = "tie_loss"  # in the state of a `RunCheckpoint`
BEST_EPOCH_KEY = "best_epoch"


class RunCheckpoint(ModelCheckpoint):
    """Keep one checkpoint of a run, which is replaced in one move.

    The best one is written at the validation that finds it so, with the weights that were
    validated; the last one when an epoch is over and the schedule has stepped. Of weights that are
    equally good, those with the lower `val/loss` are the best, and of these the first.

    Args:
        folder: Folder of the run.
        file_name: Name of the checkpoint, `BEST` or `LAST`.
        monitor: Figure whose best value is kept; None keeps the latest weights.

    Attributes:
        best_epoch: Epoch of the best validation so far, from 0; None before the first one.
    """

    def __init__(
        self, folder: RunFolder, file_name: str, monitor: BestFigure | None = None
    ) -> None:
        super().__init__(
            filename=Path(file_name).stem,
            monitor=monitor,
            mode=MODES.get(monitor or "", "max"),
            save_top_k=1,
            save_on_train_epoch_end=monitor is None,
            enable_version_counter=False,
        )
        self._folder = folder
        self._file_name = file_name
        self._save_after_validation = False
        self.best_epoch: int | None = None
        self._tie_loss = math.inf  # `val/loss` of the best validation so far

    @property
    def path(self) -> Path:
        """The file. That of a new run is final after `setup`."""
        return self._folder.path / CHECKPOINTS / self._file_name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the checkpoint in the folder of the run, which is made by now."""
        self.dirpath = str(self.path.parent)
        super().setup(trainer, pl_module, stage)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether a value of the figure is the best so far, and note its epoch if it is.

        Lightning asks once for each validation, before it writes the checkpoint.

        Args:
            trainer: Trainer of the run.
            current: The value, a scalar; None if there is none.
        """
        loss = float(trainer.callback_metrics.get(TIE_BREAKER, math.inf))
        is_better = super().check_monitor_top_k(trainer, current)
        if not is_better and current is not None and current == self.best_model_score:
            # All processes must come to one decision.
            is_better = trainer.strategy.reduce_boolean_decision(loss < self._tie_loss)
        if is_better:
            self.best_epoch = trainer.current_epoch
            self._tie_loss = loss
        return is_better

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

    def state_dict(self) -> dict[str, Any]:
        """Return the scores of the run so far, and what decides a tie with the best of them."""
        state = super().state_dict()
        return state | {BEST_EPOCH_KEY: self.best_epoch, TIE_LOSS_KEY: self._tie_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the scores of the run so far, also if its folder has moved since.

        A new run that begins from the checkpoint of another one has a best score of its own.
        """
        if self._folder.is_resumed:
            state_dict = lightning_internals.moved_checkpoints(state_dict, str(self.path.parent))
            self.best_epoch = state_dict[BEST_EPOCH_KEY]
            self._tie_loss = state_dict[TIE_LOSS_KEY]
        super().load_state_dict(state_dict)


def best_checkpoint_of(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the callback that keeps the best checkpoint of a run by some figure, or None.

    Where users have added callbacks of Lightning's, that of the run comes first.
    """
    monitoring = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor:
            monitoring.append(callback)
    for callback in monitoring:
        if isinstance(callback, RunCheckpoint):
            return callback
    if monitoring:
        return monitoring[0]
    return None


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
