"""Ctrl-C: finish the step, save, and say how to go on."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from cifar_transfer.report import say

STATUS = 128 + signal.SIGINT  # the shell's, for a program that was interrupted


class Interrupt(Callback):
    """Saves a checkpoint within the epoch when the user interrupts, from which the run continues exactly.

    The first Ctrl-C waits for the end of the step (of the epoch, in validation), the second does not. Several processes
    are stopped at once, as they would be by Lightning: each may be at another step.

    Args:
        last: Names the checkpoint's folder and file; None saves none.

    Attributes:
        asked: Whether the user has.
    """

    def __init__(self, last: ModelCheckpoint | None) -> None:
        self.last = last
        self.asked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._before = None
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, lambda number, frame: self._note(trainer, number, frame))

    def _note(self, trainer: Trainer, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)
        say(trainer, "Stopping after this step (Ctrl-C again: at once) ...")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if asked to stop."""
        if self.asked and self.last is not None and self.last.dirpath is not None:
            trainer.save_checkpoint(Path(self.last.dirpath, f"{self.last.filename}.ckpt"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop, now that the step before is logged."""
        if self.asked:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no more."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
