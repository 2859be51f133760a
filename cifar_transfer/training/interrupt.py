"""Told to stop, by Ctrl-C or a scheduler: finish the step, save, and say how to go on."""

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from cifar_transfer.base.console import say
from cifar_transfer.training.run import RunCheckpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM)
MAX_STEPS_BETWEEN_STOP_CHECKS = (
    10  # of several processes, which ask each other whether one is to stop
)
SECONDS_BETWEEN_PARENT_CHECKS = 1.0


class Interrupt(Callback):
    """Saves a checkpoint within the epoch when told to stop, from which the run continues exactly.

    The first Ctrl-C or SIGTERM waits for the end of the step (of the epoch, in validation), the second does not. Of
    several processes one that is told suffices: all stop after the same step. SLURM's signal, SIGUSR1, saves likewise
    and requeues the job; Lightning's own handler would save in the middle of a step, when a part of the weights has
    made it, and into a file which Lightning then prefers to a newer `last.ckpt`.

    Args:
        last: The checkpoint to write; None saves none.

    Attributes:
        asked: The signal by which this or another process was told to stop, or None.
    """

    def __init__(self, last: RunCheckpoint | None) -> None:
        self.last = last
        self.asked: signal.Signals | None = None
        self._heard: signal.Signals | None = None
        self._requeue = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def status(self) -> int:
        """Of the process: the shell's, for a program that a signal ended."""
        return 128 + (self.asked or signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            self._before[number] = signal.signal(
                number, lambda number, frame: self._note(trainer, number)
            )
        if SLURMEnvironment.detect() and callable(lightnings := signal.getsignal(signal.SIGUSR1)):
            self._before[signal.SIGUSR1] = lightnings
            signal.signal(signal.SIGUSR1, self._note_requeue)

    def _note(self, trainer: Trainer, number: int) -> None:
        self._heard = signal.Signals(number)
        signal.signal(number, self._before[self._heard])
        with suppress(RuntimeError):  # the signal may have come amid a line
            say(trainer, f"Stopping after this step ({self._heard.name}; again: at once) ...")

    def _note_requeue(self, number: int, frame: FrameType | None) -> None:
        self._requeue = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and requeue, if told to."""
        every = trainer.accumulate_grad_batches * (
            MAX_STEPS_BETWEEN_STOP_CHECKS if trainer.world_size > 1 else 1
        )
        if not trainer.is_last_batch and (batch_idx + 1) % every:
            return
        self._agree(trainer)
        if trainer.is_last_batch:  # the checkpoint of the epoch follows, with its validation
            return
        requeue = self._requeue_asked(trainer)
        if (self.asked or requeue) and self.last is not None and self.last.path is not None:
            trainer.save_checkpoint(self.last.path)
            self.last.stopping = True
        if requeue:
            self._requeue_job(trainer)

    def _requeue_job(self, trainer: Trainer) -> None:
        self._requeue = False
        for logger in trainer.loggers:
            logger.save()  # SLURM may kill the process
        if not trainer.is_global_zero:
            return
        job = os.environ["SLURM_JOB_ID"]  # that of this task, also in an array of jobs
        try:
            status = subprocess.run(["scontrol", "requeue", job], check=False).returncode
        except OSError as error:
            status = error.errno or 1
        words = (
            "is requeued" if status == 0 else f"cannot be requeued: scontrol ended with {status}"
        )
        say(trainer, f"Saved; SLURM job {job} {words}.")

    def _requeue_asked(self, trainer: Trainer) -> bool:
        return signal.SIGUSR1 in self._before and self._any(trainer, self._requeue)

    def _agree(self, trainer: Trainer) -> None:
        if self._any(trainer, self._heard is not None):
            self.asked = self._heard or signal.SIGTERM

    def _any(self, trainer: Trainer, here: bool) -> bool:
        return (
            here
            if trainer.world_size == 1
            else trainer.strategy.reduce_boolean_decision(here, all=False)
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop, now that the step before is logged."""
        if trainer.world_size == 1 and batch_idx == 0:  # told in validation
            self._agree(trainer)
        if self.asked:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no more."""
        self._agree(trainer)
        if self._requeue_asked(trainer):  # in the last validation
            self._requeue_job(trainer)
        for number, handler in self._before.items():
            signal.signal(number, handler)


def end_with_the_first() -> None:
    """End this process should the one that started it for another device be gone, which would be waited for in vain.

    The first process sees to the end of the others; this is the other way round. Elsewhere than under Lightning's own
    launcher it is the business of torchrun or SLURM.
    """
    if (
        os.environ.get("LOCAL_RANK", "0") == "0"
        or "TORCHELASTIC_RUN_ID" in os.environ
        or SLURMEnvironment.detect()
    ):
        return
    first = os.getppid()

    def watch() -> None:
        while os.getppid() == first:
            time.sleep(SECONDS_BETWEEN_PARENT_CHECKS)
        os.write(2, b"error: The first process of this run is gone, so this one ends too.\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
