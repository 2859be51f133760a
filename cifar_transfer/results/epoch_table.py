"""A run on the terminal: a table that grows by a line an epoch, and fits into 80 columns."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from cifar_transfer.base.console import duration, styled

BOLD = 1  # codes of ANSI
GREEN = 32
BEST_MARK = " *"
NO_MARK = "  "
ACCURACY_HEADING = "val acc"
MACRO_F1_HEADING = "val F1"
WIDTHS = (10, 9, 8, 9, 7, 6, 8)  # letters of these columns
MIN_LARGEST_EPOCH = 10  # the column of epochs has room for numbers up to this at least


@dataclass(frozen=True)
class EpochRow:
    """A line of the table."""

    epoch: int  # from 1
    train_loss: float | None  # None: there is no such score, also below
    train_accuracy: float | None  # share of 1, also below
    val_loss: float | None
    val_accuracy: float | None
    val_macro_f1: float | None  # in its place where the table shows it
    is_best: bool  # whether the best checkpoint so far is of this epoch
    learning_rate: float
    seconds: float  # time of the epoch with its validation
    time_left: str


class EpochTable:
    """Lines of a table of epochs.

    Args:
        max_epochs: Last epoch of the run, if it is known.
        shows_macro_f1: Whether macro F1 of the validation takes the place of its accuracy, because
            the best epoch is chosen by it. There is no room for both.
    """

    def __init__(self, max_epochs: int | None, shows_macro_f1: bool = False) -> None:
        self._shows_macro_f1 = shows_macro_f1
        self._max_epochs = None
        if max_epochs is not None and max_epochs > 0:
            self._max_epochs = max_epochs
        digits = len(str(max(self._max_epochs or 0, MIN_LARGEST_EPOCH)))
        self._epoch_width = 2 * digits + 1  # two numbers with a slash

    def heading(self) -> str:
        """Return the first line."""
        score = MACRO_F1_HEADING if self._shows_macro_f1 else ACCURACY_HEADING
        cells = self._align(
            [
                "epoch",
                "train loss",
                "train acc",
                "val loss",
                score + NO_MARK,
                "lr",
                "time",
                "left",
            ]
        )
        return styled("  ".join(cells), BOLD)

    def line(self, row: EpochRow) -> str:
        """Return the line of an epoch; that of a new best score has a star, and is green."""
        score = row.val_macro_f1 if self._shows_macro_f1 else row.val_accuracy
        mark = NO_MARK
        if row.is_best:
            mark = BEST_MARK
        cells = self._align(
            [
                self._epoch_text(row.epoch),
                _number(row.train_loss, ".3f"),
                _number(row.train_accuracy, ".2%"),
                _number(row.val_loss, ".3f"),
                _number(score, ".2%") + mark,
                f"{row.learning_rate:.2g}",
                _time(row.seconds),
                row.time_left,
            ]
        )
        if row.is_best:
            cells[4] = styled(cells[4], GREEN)
        return "  ".join(cells).rstrip()

    def _epoch_text(self, epoch: int) -> str:
        if self._max_epochs is None:
            return str(epoch)
        return f"{epoch}/{self._max_epochs}"

    def _align(self, cells: Sequence[str]) -> list[str]:
        widths = (self._epoch_width, *WIDTHS)
        return [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]


def _number(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return format(value, form)


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


def time_left(
    upcoming: Sequence[Hashable], seconds_of: Mapping[Hashable, float], seconds: float
) -> str:
    """Estimate how long the epochs to come will take, such as "12 min".

    Each is supposed to take as long as the last epoch of its kind. Where there was none, the
    estimate is a lower bound ("> 12 min"), because what comes later, such as an unfrozen backbone
    or larger images, takes longer.

    Args:
        upcoming: Kind of each epoch to come: what makes it take as long as another.
        seconds_of: Time of the last epoch of each kind, in seconds.
        seconds: Time of the last epoch.
    """
    if not upcoming:
        return ""
    total = 0.0
    bound = ""
    for kind in upcoming:
        if kind not in seconds_of:
            bound = "> "
        total += seconds_of.get(kind, seconds)
    return f"{bound}{duration(total)}"
