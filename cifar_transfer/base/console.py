"""Lines for the terminal: how they are printed, and which lines of libraries are left out."""

import logging
import os
import re
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from cifar_transfer.base.text import wrapped

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# Warnings of libraries about which nobody who runs a command can do anything.
IGNORED_WARNINGS = (
    ".*torch.jit.trace.*is deprecated",  # TensorBoard's graph is drawn with it
    ".*isinstance.treespec, LeafSpec.*",  # Lightning, because of a change in torch
    ".*does not have many workers.*",  # cached images are read faster without workers
    ".*module.s. in eval mode at the start of training.*",  # the frozen backbone of a second fit
    ".*recommended to use a single device.*",  # because samplers repeat images; ours do not
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    ".*but have no logger configured.*",  # evaluation prints its figures
    ".*Total length of `DataLoader` across ranks is zero.*",  # of features that are there
    "Glyph .* missing from (current )?font",  # `language` has said what to install
    ".*is smaller than the logging interval.*",  # the figures of epochs are logged all the same
)
IGNORED_LINES = re.compile(
    "Tip:"  # advertisements for other products
    "|TPU available"  # beside the line on GPUs
    "|^GPU available: False"  # where there is none, nobody expects one
    "|Seed set to"  # the option is in the configuration
    "|^`Trainer.fit` stopped: `max_epochs="  # the table of epochs shows it
    "|^Loading `train_dataloader`"  # to count the steps of a schedule
    "|Detected KeyboardInterrupt"  # `Interrupt` has its own words
    "|^Restoring states|^Loaded model weights"  # of the test, which names the best checkpoint
)
LIGHTNING_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)
PACKAGE = str(Path(__file__).parents[1])


def hush() -> None:
    """Leave out the lines named above, and print this package's warnings without their place."""
    warnings.formatwarning = _format_warning
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in LIGHTNING_LOGGERS:
        logging.getLogger(name).addFilter(_is_worth_printing)
    threading.excepthook = _report_thread_error


_library_format = warnings.formatwarning  # Lightning's


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    if filename.startswith(PACKAGE):
        return wrapped(f"warning: {message}", sys.stderr) + "\n"
    return _library_format(message, category, filename, lineno, line)


def _is_worth_printing(record: logging.LogRecord) -> bool:
    """Return whether a line is worth printing, and break it between words."""
    line = record.getMessage()
    record.msg = wrapped(line, sys.stderr)
    record.args = ()
    return not IGNORED_LINES.search(line)


def _report_thread_error(error: threading.ExceptHookArgs) -> None:
    # If TensorBoard's thread cannot write, the main thread hears of it at its next line.
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def say(trainer: "Trainer", line: str) -> None:
    """Print a line on the first rank, above the progress bar if there is one."""
    if trainer.is_global_zero:
        tqdm.write(wrapped(line, sys.stdout), file=sys.stdout)
        sys.stdout.flush()


def is_notebook() -> bool:
    """Return whether this process shows what it prints in a notebook."""
    ipython = sys.modules.get("IPython")
    if ipython is None:
        return False
    return type(ipython.get_ipython()).__name__ == "ZMQInteractiveShell"


def inform(line: str) -> None:
    """Log a line on the first rank, where there is no trainer."""
    # Imported late because prediction, which has nothing to say, need not wait for Lightning.
    from lightning.pytorch.utilities import rank_zero_info

    rank_zero_info(line)


def styled(text: str, style: int) -> str:
    """Return a text in an ANSI style (1 bold, 32 green, 36 cyan) if the terminal shows colours."""
    if not shows_colours():
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def shows_colours() -> bool:
    """Return whether standard output is a terminal on which colours are welcome."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return sys.stdout.isatty()


def duration(seconds: float) -> str:
    """Return a duration in the unit that people use: 40 s, 12 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def counted(epoch: int) -> int:
    """Return the number of an epoch as people count, from 1; the Trainer counts from 0."""
    return epoch + 1


def epoch_of(trainer: "Trainer") -> str:
    """Return the current epoch, counted from 1, and the number of epochs if it is known: 3/40."""
    epoch = counted(trainer.current_epoch)
    if trainer.max_epochs is None or trainer.max_epochs <= 0:
        return f"{epoch}"
    return f"{epoch}/{trainer.max_epochs}"
