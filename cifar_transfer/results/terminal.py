"""A run on the terminal: a table that grows by a line an epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from cifar_transfer.base.console import duration, epoch_of, say, styled

HEADINGS = ("epoch", "train loss", "train acc", "val loss", "val acc  ", "lr", "time", "left")
WIDTHS = (
    10,
    9,
    8,
    9,
    7,
    6,
    8,
)  # of all but the first, in letters: up to 999 epochs take fewer than 80 columns
SCORES = {"train/loss_epoch": ".3f", "train/acc": ".2%", "val/loss": ".3f", "val/acc": ".2%"}


class Table:
    """The epochs of a run, with a star where the best checkpoint so far was written."""

    def __init__(self) -> None:
        self._best: float | None = None
        self._seconds: dict[
            tuple[int | None, int | None], float
        ] = {}  # of the last epoch by phase and size of images

    def begin(self, trainer: Trainer) -> None:
        """Print what a run that continues has reached, and the heading."""
        self._best = _best(trainer)
        if trainer.ckpt_path and self._best is not None:
            say(trainer, f"The best validation accuracy so far: {self._best:.2%}.")
        say(trainer, styled("  ".join(_aligned(trainer, HEADINGS)), 1))

    def add(self, trainer: Trainer, module: LightningModule, seconds: float) -> None:
        """Print the epoch that ends; all processes must call it together.

        Args:
            trainer: Of the run.
            module: One of ours, which has the scores.
            seconds: Time of the epoch, with its validation.
        """
        scores = module.epoch_scores()  # type: ignore[operator]
        before, self._best = self._best, _best(trainer, scores)
        mark = " *" if self._best != before else "  "
        time = f"{seconds:.1f} s" if seconds < 100 else f"{seconds // 60:.0f}:{seconds % 60:02.0f}"
        shown = [
            format(scores[name], form) if name in scores else "" for name, form in SCORES.items()
        ]
        shown[-1] += mark
        left = self._left(trainer, module, seconds)
        cells = _aligned(
            trainer, [epoch_of(trainer), *shown, f"{module.learning_rate:.2g}", time, left]
        )
        say(
            trainer,
            "  ".join(styled(cell, 32) if cell.endswith("*") else cell for cell in cells).rstrip(),
        )

    def _left(self, trainer: Trainer, module: Any, seconds: float) -> str:
        """Each epoch to come takes as long as the last one of its kind, or longer if there was none."""
        last, epoch = trainer.max_epochs or 0, trainer.current_epoch
        if last <= epoch + 1 or trainer.max_steps > 0:
            return ""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        phased = next(
            (each for each in callbacks if hasattr(each, "phase_at")), None
        )  # `BackboneFreeze`
        phases = [phased.phase_at(number) if phased else 0 for number in range(epoch + 1, last)]
        now, *sides = [
            module.side_at(2 * number + 1, 2 * last) for number in range(epoch, last)
        ]  # amid the epoch
        self._seconds[phased.phase if phased else 0, now] = seconds
        kinds = list(zip(phases, sides, strict=True))
        least = sum(self._seconds.get(kind, seconds) for kind in kinds)
        return f"{'' if all(kind in self._seconds for kind in kinds) else '> '}{duration(least)}"


def _aligned(trainer: Trainer, cells: Sequence[str]) -> list[str]:
    first = 2 * len(str(max(trainer.max_epochs or 0, 10))) + 1
    return [f"{cell:>{width}}" for cell, width in zip(cells, (first, *WIDTHS), strict=True)]


def _best(trainer: Trainer, scores: Mapping[str, float] | None = None) -> float | None:
    """The score of the best checkpoint so far, which Lightning's own callback writes after the epoch with `scores`."""
    kept = [
        each for each in trainer.checkpoint_callbacks if getattr(each, "monitor", None) == "val/acc"
    ]
    found = (
        [getattr(kept[0], "best_model_score", None), (scores or {}).get("val/acc")] if kept else []
    )
    return max((float(score) for score in found if score is not None), default=None)
