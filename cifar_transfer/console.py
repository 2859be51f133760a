"""How a line is printed, and what libraries say that nobody running a command can act on, which is not printed."""

import logging
import re
import sys
import threading
import warnings
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm import tqdm

WARNINGS = (
    ".*torch.jit.trace.*is deprecated",  # TensorBoard's graph is drawn with it
    ".*isinstance.treespec, LeafSpec.*",  # Lightning, of torch's own change
    ".*does not have many workers.*",  # cached images are read faster without
    ".*module.s. in eval mode at the start of training.*",  # the frozen backbone of a second fit
    ".*recommended to use a single device.*",  # of repeated images, which the samplers here do not give
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    ".*but have no logger configured.*",  # evaluation prints its figures
    ".*is smaller than the logging interval.*",  # the figures of epochs are logged all the same
)
LINES = (
    "Tip:",  # advertisements for other products
    "TPU available",  # beside the line on GPUs
    "^Loading `train_dataloader`",  # to count the steps of a schedule
    "Detected KeyboardInterrupt",  # `Interrupt` has its own words
    "^Restoring states|^Loaded model weights",  # of the test, which says itself that it is of the best checkpoint
)
_PATTERN = re.compile("|".join(LINES))


def _worth_printing(record: logging.LogRecord) -> bool:
    return not _PATTERN.search(record.getMessage())


def _unless_told_again(failed: threading.ExceptHookArgs) -> None:
    # TensorBoard's thread cannot write, which the main thread hears from it at the next line of the log.
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def hush() -> None:
    """Filter these, by name; everything else is printed."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_worth_printing)
    threading.excepthook = _unless_told_again


def duration(seconds: float) -> str:
    """In the two largest units that people use: 1 h 05 min, 12 min, 40 s."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def counted(epoch: int) -> int:
    """An epoch as people count it, from 1; the Trainer counts from 0."""
    return epoch + 1


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, which counts epochs from 1 and leaves nothing behind."""

    def __init__(self) -> None:
        super().__init__(leave=False)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Name the epoch."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(f"Epoch {counted(trainer.current_epoch)}")


def say(trainer: Trainer, line: str) -> None:
    """Print a line on the first rank, above the progress bar if there is one."""
    if trainer.is_global_zero:
        tqdm.write(line, file=sys.stdout)  # any bar steps aside
        sys.stdout.flush()
