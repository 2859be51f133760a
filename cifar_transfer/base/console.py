"""How a line is printed, and what libraries say that nobody running a command can act on, which is not printed."""

import logging
import os
import re
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer, callbacks
from tqdm import tqdm

WARNINGS = (
    ".*torch.jit.trace.*is deprecated",  # TensorBoard's graph is drawn with it
    ".*isinstance.treespec, LeafSpec.*",  # Lightning, of torch's own change
    ".*does not have many workers.*",  # cached images are read faster without
    ".*module.s. in eval mode at the start of training.*",  # the frozen backbone of a second fit
    ".*recommended to use a single device.*",  # of repeated images, which the samplers here do not give
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    ".*but have no logger configured.*",  # evaluation prints its figures
    ".*Total length of `DataLoader` across ranks is zero.*",  # of features that are there
    ".*is smaller than the logging interval.*",  # the figures of epochs are logged all the same
)
LINES = (
    "Tip:",  # advertisements for other products
    "TPU available",  # beside the line on GPUs
    "^Loading `train_dataloader`",  # to count the steps of a schedule
    "Detected KeyboardInterrupt",  # `Interrupt` has its own words
    "^Restoring states|^Loaded model weights",  # of the test, which says itself that it is of the best checkpoint
)
OURS = str(Path(__file__).parent)
_PATTERN = re.compile("|".join(LINES))


def _worth_printing(record: logging.LogRecord) -> bool:
    return not _PATTERN.search(record.getMessage())


def _unless_told_again(failed: threading.ExceptHookArgs) -> None:
    # TensorBoard's thread cannot write, which the main thread hears from it at the next line of the log.
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def _plainly(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    if filename.startswith(OURS):
        return f"warning: {message}\n"  # which line of ours says so is nothing to a reader
    return _FORMAT(message, category, filename, lineno, line)


_FORMAT = warnings.formatwarning  # Lightning's


def hush() -> None:
    """Filter these, by name; everything else is printed, and what this project warns of without its place in it."""
    warnings.formatwarning = _plainly
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_worth_printing)
    threading.excepthook = _unless_told_again


def duration(seconds: float) -> str:
    """In the unit that people use: 40 s, 12 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def counted(epoch: int) -> int:
    """An epoch as people count it, from 1; the Trainer counts from 0."""
    return epoch + 1


def epoch_of(trainer: Trainer) -> str:
    """The current epoch as people count it, and how many there are if that is known: 3/40."""
    last = trainer.max_epochs or 0
    return (
        f"{counted(trainer.current_epoch)}/{last}"
        if last > 0
        else f"{counted(trainer.current_epoch)}"
    )


def styled(text: str, style: int) -> str:
    """A text in a style of ANSI's (1 bold, 32 green, 36 cyan) on a terminal that shows colours, elsewhere as it is."""
    return f"\x1b[{style}m{text}\x1b[0m" if _coloured() else text


def _coloured() -> bool:
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


class ProgressBar(callbacks.ProgressBar):
    """One line below what is printed, never wider than the terminal; gone when an epoch or a validation is over.

    Lightning's own: that of tqdm is cut off at 80 columns and needs a second line, that of rich a line for each figure.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar = tqdm(disable=True)  # as one is that is closed
        self._drawn, self._images = 0.0, 0  # when, and the images until now, over all devices

    def enable(self) -> None:
        """Show it."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw what was done before this batch, ten times a second."""
        if not self._enabled or trainer.sanity_checking or trainer.state.stage is None:
            return
        now = time.monotonic()
        if self._bar.disable:
            self._drawn, self._images = 0.0, 0
        if now - self._drawn > 0.1:
            self._draw(trainer, trainer.state.stage.dataloader_prefix, batch_idx)
            self._drawn = now
        self._images += len(batch[1]) * trainer.world_size

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def _draw(self, trainer: Trainer, stage: str | None, done: int) -> None:
        columns = min(80, shutil.get_terminal_size().columns) - 1
        wide, training, loss = (
            columns >= 60,
            stage == "train",
            trainer.progress_bar_metrics.get("train/loss"),
        )
        parts = [f"{'epoch ' * wide}{epoch_of(trainer)}"] if trainer.state.fn == "fit" else []
        parts += [] if training else [str(stage)]
        parts += ["{bar} {percentage:3.0f}%"]
        parts += [f" loss {loss:.3f}"] if training and loss is not None else []
        parts += (
            [f" {self._images / self._bar.format_dict['elapsed']:.0f} images/s"]
            if self._images
            else []
        )
        known = (
            wide and not self._bar.disable and done > self._bar.initial
        )  # how long a batch takes
        form = " ".join([*parts, " {remaining} left"] if known else parts)
        if self._bar.disable:
            total = (
                trainer.num_training_batches
                if training
                else getattr(trainer, f"num_{stage}_batches")[0]
            )
            own: dict[str, Any] = {
                "colour": "green" if _coloured() else None,
                "bar_format": form,
                "ncols": columns,
            }
            own |= {"total": None if total == float("inf") else int(total), "initial": done}
            self._bar = tqdm(file=sys.stdout, leave=False, **own)
        self._bar.bar_format, self._bar.ncols, self._bar.n = form, columns, done
        self._bar.refresh()

    def on_train_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException | None = None
    ) -> None:
        """Take it away."""
        self._bar.close()

    on_validation_end = on_test_end = on_predict_end = on_exception = on_train_epoch_end


def say(trainer: Trainer, line: str) -> None:
    """Print a line on the first rank, above the progress bar if there is one."""
    if trainer.is_global_zero:
        tqdm.write(line, file=sys.stdout)  # any bar steps aside
        sys.stdout.flush()
