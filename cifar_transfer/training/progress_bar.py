"""A progress bar in one line of the terminal."""

import shutil
import sys
import time
from importlib.util import find_spec
from typing import Any

from lightning.pytorch import LightningModule, Trainer, callbacks
from tqdm import tqdm

from cifar_transfer.base.console import epoch_of, is_notebook, shows_colours

MAX_COLUMNS = 80
MIN_COLUMNS_FOR_TIME = 60  # narrower terminals do not show the time left
SECONDS_BETWEEN_DRAWINGS = 0.1


class OneLineProgressBar(callbacks.ProgressBar):
    """One line below what is printed, never wider than the terminal.

    It disappears when an epoch or a validation is over. Of Lightning's bars, that of tqdm is cut
    off at 80 columns and needs a second line, that of rich needs a line for each figure.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar = tqdm(disable=True)
        self._last_drawing = 0.0
        self._images = 0  # since the bar was opened, over all devices

    def enable(self) -> None:
        """Show the bar."""
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
        """Draw the progress before this batch, at most ten times a second."""
        stage = trainer.state.stage
        if not self._enabled or trainer.sanity_checking or stage is None:
            return
        if not self._is_open:
            self._last_drawing = 0.0
            self._images = 0
        now = time.monotonic()
        if now - self._last_drawing > SECONDS_BETWEEN_DRAWINGS:
            self._draw(trainer, str(stage.dataloader_prefix), batch_idx)
            self._last_drawing = now
        self._images += len(batch[1]) * trainer.world_size

    on_validation_batch_start = on_train_batch_start
    on_test_batch_start = on_train_batch_start
    on_predict_batch_start = on_train_batch_start

    def on_train_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException | None = None
    ) -> None:
        """Remove the bar."""
        self._bar.close()

    on_validation_start = on_train_epoch_end  # comes before the end of the epoch, or within it
    on_validation_end = on_train_epoch_end
    on_test_end = on_train_epoch_end
    on_predict_end = on_train_epoch_end
    on_exception = on_train_epoch_end

    @property
    def _is_open(self) -> bool:
        return not self._bar.disable

    def _draw(self, trainer: Trainer, stage: str, batches: int) -> None:
        columns = min(MAX_COLUMNS, shutil.get_terminal_size().columns) - 1
        text = self._format(trainer, stage, batches, columns)
        if not self._is_open:
            self._bar = tqdm(
                file=sys.stdout,
                leave=False,
                colour="green" if shows_colours() else None,
                bar_format=text,
                ncols=columns,
                total=_number_of_batches(trainer, stage),
                initial=batches,
            )
        self._bar.bar_format = text
        self._bar.ncols = columns
        self._bar.n = batches
        self._bar.refresh()

    def _format(self, trainer: Trainer, stage: str, batches: int, columns: int) -> str:
        """Return the line in tqdm's format."""
        is_wide = columns >= MIN_COLUMNS_FOR_TIME
        parts = []
        if trainer.state.fn == "fit":
            epoch = epoch_of(trainer)
            parts.append(f"epoch {epoch}" if is_wide else epoch)
        if stage != "train":
            parts.append(stage)
        parts.append("{bar} {percentage:3.0f}%")
        loss = trainer.progress_bar_metrics.get("train/loss")
        if stage == "train" and loss is not None:
            parts.append(f" loss {loss:.3f}")
        if self._images:
            rate = self._images / self._bar.format_dict["elapsed"]
            parts.append(f" {rate:.0f} images/s")
        if is_wide and self._is_open and batches > self._bar.initial:
            parts.append(" {remaining} left")
        return " ".join(parts)


def plain_progress_bar(trainer: Trainer) -> OneLineProgressBar | None:
    """Return a bar in the place of one that a notebook cannot show, or None if there is none.

    Lightning's bar of rich needs `ipywidgets` in a notebook, and without it shows nothing.
    """
    bar = trainer.progress_bar_callback
    if not isinstance(bar, callbacks.RichProgressBar) or not is_notebook():
        return None
    if find_spec("ipywidgets") is not None:
        return None
    bar.disable()
    return OneLineProgressBar()


def _number_of_batches(trainer: Trainer, stage: str) -> int | None:
    """Return the number of batches of a stage, or None if nobody knows it."""
    if stage == "train":
        number = trainer.num_training_batches
    elif stage == "val":
        number = trainer.num_val_batches[0]
    elif stage == "test":
        number = trainer.num_test_batches[0]
    else:
        number = trainer.num_predict_batches[0]
    if number == float("inf"):
        return None
    return int(number)
