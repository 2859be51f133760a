"""Stop a run that is told to by Ctrl-C or a scheduler: finish the step, save it, and end."""

import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from cifar_transfer.base.console import say
from cifar_transfer.training.lightning_internals import requeue_handler
from cifar_transfer.training.run_checkpoints import RunCheckpoint

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Several processes ask each other whether one of them was told to stop, which takes time.
MAX_STEPS_BETWEEN_QUESTIONS = 10


class Interrupt(Callback):
    """Save a run within its epoch when it is told to stop, so that it continues exactly from there.

    The first Ctrl-C or SIGTERM waits for the end of the step, in a validation for its end; the
    second does not wait. It is enough that one of several processes is told: all stop after the
    same step.

    Args:
        last: Checkpoint to write; None saves none.

    Attributes:
        received: Signal by which this process or another one was told to stop, or None.
    """

    def __init__(self, last: RunCheckpoint | None) -> None:
        self.received: signal.Signals | None = None
        self._last = last
        self._noted: signal.Signals | None = None
        self._requeue_is_due = False
        self._requeue: Any = None
        self._earlier_handlers: dict[signal.Signals, Any] = {}

    @property
    def exit_status(self) -> int:
        """Status of a shell for a program that was ended by the signal."""
        return 128 + (self.received or signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals, which only the main thread of a process can do."""
        if threading.current_thread() is not threading.main_thread():
            return

        def stop_later(number: int, _: FrameType | None) -> None:
            self._noted = signal.Signals(number)
            signal.signal(number, self._earlier_handlers[self._noted])
            with suppress(RuntimeError):  # the signal may have come while a line was printed
                say(trainer, f"Stopping after this step ({self._noted.name}; again: at once) ...")

        def requeue_later(number: int, _: FrameType | None) -> None:
            self._requeue_is_due = True

        for number in STOP_SIGNALS:
            self._earlier_handlers[number] = signal.signal(number, stop_later)
        # Lightning 2.6.6 saves the run at once, also between the first and the last parameter of an
        # optimizer's step. Seen by test_stopped.py, test_lightning_requeues_after_the_step.
        self._requeue = requeue_handler()
        if self._requeue is not None:
            self._earlier_handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, requeue_later)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the run if it is to stop."""
        interval = trainer.accumulate_grad_batches
        if trainer.world_size > 1:
            interval *= MAX_STEPS_BETWEEN_QUESTIONS
        if not trainer.is_last_batch and (batch_idx + 1) % interval:
            return
        self._agree(trainer)
        if trainer.is_last_batch:  # the checkpoint of the epoch follows, after its validation
            return
        if self.received is not None and self._last is not None:
            self._last.save_within_epoch(trainer)
        self._requeue_if_due(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop, now that the step before is logged."""
        if trainer.world_size == 1 and batch_idx == 0:  # it may have been told in a validation
            self._agree(trainer)
        if self.received is not None:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no more."""
        self._agree(trainer)
        self._requeue_if_due(trainer)
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)

    def _agree(self, trainer: Trainer) -> None:
        if _is_true_of_any(trainer, self._noted is not None):
            self.received = self._noted or signal.SIGTERM

    def _requeue_if_due(self, trainer: Trainer) -> None:
        if self._requeue is None or not _is_true_of_any(trainer, self._requeue_is_due):
            return
        self._requeue_is_due = False
        self._requeue(signal.SIGUSR1, None)


def _is_true_of_any(trainer: Trainer, answer: bool) -> bool:
    """Return whether the answer of any process is yes; all processes ask together."""
    if trainer.world_size == 1:
        return answer
    return trainer.strategy.reduce_boolean_decision(answer, all=False)
