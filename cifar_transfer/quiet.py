"""What libraries say that nobody running a command can act on, and that is therefore not printed."""

import logging
import re
import threading
import warnings

WARNINGS = (
    ".*torch.jit.trace.*is deprecated",  # TensorBoard's graph is drawn with it
    ".*isinstance.treespec, LeafSpec.*",  # Lightning, of torch's own change
    ".*does not have many workers.*",  # cached images are read faster without
    ".*module.s. in eval mode at the start of training.*",  # the frozen backbone of a second fit
    ".*recommended to use a single device.*",  # of repeated images, which `WholeShard` does not have
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
