"""`Report`: what a run shows while it runs."""

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from cifar_transfer.base.console import counted, say
from cifar_transfer.base.errors import check
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.data.augment import step_seed
from cifar_transfer.data.geometry import resize
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.results.epoch_table import EpochRow, EpochTable, time_left
from cifar_transfer.results.predictions import FIGURES_FOLDER
from cifar_transfer.results.run_figures import augmented_figure, save_figures
from cifar_transfer.results.words import Language, language
from cifar_transfer.training.board import add_charts, add_graph, add_pictures, board_of
from cifar_transfer.training.classifier import TransferClassifier
from cifar_transfer.training.freeze import BackboneFreeze
from cifar_transfer.training.lightning_internals import (
    callbacks_of,
    data_of,
    log_interval,
    set_log_interval,
)
from cifar_transfer.training.mixing import BatchMixing
from cifar_transfer.training.run import folder_of
from cifar_transfer.training.run_checkpoints import (
    MODES,
    BestFigure,
    RunCheckpoint,
    best_checkpoint_of,
)
from cifar_transfer.training.run_clock import RunClock

LOG_INTERVAL = 10  # steps, unless the options say otherwise
MIN_CURVE_POINTS = 50  # of a run that has so many steps, and leaves `LOG_INTERVAL` as it is
MAX_AUGMENTED_IMAGES = 32  # shown before training
MIXED_GROUP = 8  # of these images, which are mixed with each other
MAX_QUICK_MODULES = 300  # the graph of a network with more modules takes seconds to draw


class Report(Callback):
    """Print a table of epochs, and draw augmented images and the network's graph before training.

    For modules other than `TransferClassifier` it only measures the time.

    Args:
        figures: Draw a grid of augmented images before training and, at the end, curves, confusion,
            reliability and mistakes, as PNG and in TensorBoard.
        language: Of the figures: "en", or "zh" for Chinese.
        best: Figure of the validation by which `fit` chooses the best checkpoint: the highest
            "val/acc", the lowest "val/loss", or the highest "val/macro_f1", the mean F1 of the
            classes. Of equal ones that with the lower `val/loss` is the best. In Python a
            `ModelCheckpoint` among the Trainer's callbacks chooses.

    Attributes:
        clock: Time of the run and its speed.

    Raises:
        UserError: `best` is no such figure.
    """

    def __init__(
        self, figures: bool = True, language: Language = "en", best: BestFigure = "val/acc"
    ) -> None:
        self.figures = figures
        self.language = language
        self.best: BestFigure = as_primitive("best", best)
        check("best", self.best, lambda figure: figure in MODES, ", ".join(MODES))
        self.clock = RunClock()
        self._table = EpochTable(max_epochs=None)
        self._best_score: float | None = None
        self._seconds_of: dict[Hashable, float] = {}  # time of the last epoch of each kind

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, draw what can be drawn before training, and begin the table."""
        self.clock.start()
        _log_short_runs_more_often(trainer)
        folder = folder_of(trainer)
        is_continued = bool(trainer.ckpt_path)
        draws = trainer.is_global_zero and not is_continued
        if folder is not None and draws and isinstance(pl_module, TransferClassifier):
            if self.figures:
                self._draw_augmented_images(trainer, pl_module, folder)
            _fill_board(trainer, pl_module)
        self._best_score = _best_saved_score(best_checkpoint_of(trainer))
        self._begin_table(trainer, is_continued)

    def _begin_table(self, trainer: Trainer, is_continued: bool) -> None:
        """Print the heading of the table, and by what the best epoch is chosen."""
        checkpoint = best_checkpoint_of(trainer)
        figure = None
        if checkpoint is not None:
            figure = checkpoint.monitor
        if is_continued and self._best_score is not None:
            score = f"{figure} so far: {self._best_score:.4f}"
            if figure == "val/acc":
                score = f"validation accuracy so far: {self._best_score:.2%}"
            say(trainer, f"The best {score}.")
        if figure in MODES and figure != "val/acc":
            extreme = "lowest" if MODES[figure] == "min" else "highest"
            say(trainer, f"A star marks the epoch with the {extreme} {figure} so far.")
        self._table = EpochTable(trainer.max_epochs, shows_macro_f1=figure == "val/macro_f1")
        say(trainer, self._table.heading())

    def _draw_augmented_images(
        self, trainer: Trainer, pl_module: TransferClassifier, run: Path
    ) -> None:
        data = data_of(trainer)
        if not isinstance(data, ImageDataModule):
            return
        side = pl_module.side_at(1, 1)  # at the end of the run
        mixing = pl_module.mixing
        if mixing is not None and not mixing.mixes_in(trainer.current_epoch):
            mixing = None
        images, shares = augmented_images(data, side, mixing)
        with language(self.language, data.class_names):
            figures = {"augmented": augmented_figure(images, shares, data.class_names)}
            paths = save_figures(figures, run / FIGURES_FOLDER)
        board = board_of(trainer)
        if board is not None:
            add_pictures(board, paths, 0)
        say(trainer, f"The augmented images: {os.path.relpath(paths[0])}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the epoch. Lightning does not call this for a resumed epoch."""
        self.clock.start_epoch()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count images, before another callback saves that they were seen."""
        self.clock.count_images(len(batch[1]) * trainer.world_size)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the time until now as time of training."""
        self.clock.end_training()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the time until now as time of the validation."""
        self.clock.end_validation()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the epoch."""
        self.clock.end_epoch()
        if not isinstance(pl_module, TransferClassifier):
            return
        scores = pl_module.epoch_scores()
        row = EpochRow(
            epoch=counted(trainer.current_epoch),
            train_loss=scores.get("train/loss_epoch"),
            train_accuracy=scores.get("train/acc"),
            val_loss=scores.get("val/loss"),
            val_accuracy=scores.get("val/acc"),
            val_macro_f1=scores.get("val/macro_f1"),
            is_best=self._is_best(trainer, scores),
            learning_rate=pl_module.learning_rate,
            seconds=self.clock.epoch_seconds,
            time_left=self._time_left(trainer, pl_module),
        )
        say(trainer, self._table.line(row))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why the run ends before its last epoch, if `EarlyStopping` has ended it."""
        for callback in callbacks_of(trainer):
            if not isinstance(callback, EarlyStopping):
                continue
            if trainer.should_stop and callback.wait_count >= callback.patience:
                say(
                    trainer,
                    f"Stopped early: {callback.monitor} has not improved for {callback.wait_count} "
                    f"validations (patience={callback.patience}).{_missed_phase(trainer)}",
                )

    def _is_best(self, trainer: Trainer, scores: Mapping[str, float]) -> bool:
        """Return whether the best checkpoint so far is of this epoch.

        The run's own callback has written it by now. Lightning's writes that of an epoch's last
        validation after this, those of earlier ones before, so that their scores are compared here.

        Args:
            trainer: Trainer of the run.
            scores: Scores of the epoch by their names.
        """
        checkpoint = best_checkpoint_of(trainer)
        if isinstance(checkpoint, RunCheckpoint):
            return checkpoint.best_epoch == trainer.current_epoch
        if checkpoint is None or checkpoint.monitor is None:
            return False
        previous = self._best_score
        for candidate in (_best_saved_score(checkpoint), scores.get(checkpoint.monitor)):
            if candidate is None:
                continue
            if self._best_score is None or _is_better(candidate, self._best_score, checkpoint.mode):
                self._best_score = candidate
        return self._best_score != previous

    def _time_left(self, trainer: Trainer, pl_module: TransferClassifier) -> str:
        """Estimate the time of the epochs to come, if the run ends with an epoch.

        Epochs of the same phase and the same size of images take as long as each other.
        """
        max_epochs = trainer.max_epochs
        if max_epochs is None or max_epochs < 0 or trainer.max_steps > 0:
            return ""
        current = trainer.current_epoch
        phases = _phases_from(trainer, current, max_epochs)
        # Amid the epoch, because the size may change at its beginning.
        sides = [
            pl_module.side_at(2 * epoch + 1, 2 * max_epochs) for epoch in range(current, max_epochs)
        ]
        kind, *upcoming = zip(phases, sides, strict=True)
        seconds = self.clock.epoch_seconds
        self._seconds_of[kind] = seconds
        return time_left(upcoming, self._seconds_of, seconds)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the clock, and the figure, which must stay."""
        return self.clock.state_dict() | {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the clock of a run that continues."""
        self.clock.load_state_dict(state_dict)


def augmented_images(
    data: ImageDataModule, side: int | None, mixing: BatchMixing | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return training images as the network will see them, before they are normalised.

    No random number of the training is drawn.

    Args:
        data: Data module that is set up.
        side: Pixels to which images are resized; None leaves them as they are.
        mixing: Mixes images, a few at a time, so that they show more than one batch would; None
            mixes none.

    Returns:
        uint8 [N, 3, H, W], RGB, N <= 32, and the share of each class in each image, float32 [N, C].
    """
    images = data.shard("train", training=True).images
    count = min(MAX_AUGMENTED_IMAGES, len(images))
    rows = np.linspace(0, len(images) - 1, count).astype(int)
    pixels, labels = images.__getitems__(rows.tolist())
    shares = F.one_hot(labels, data.num_classes).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(data.seed, epoch=0, step=0, rank=0))
        augmented = data.augmented(pixels)
        if mixing is not None:
            augmented, shares = _mixed_in_groups(augmented, labels, mixing)
        augmented = resize(augmented, side)
    augmented = (255 * augmented.clamp(0, 1)).round().byte()
    return augmented.numpy(), shares.numpy()


def _mixed_in_groups(images: Tensor, labels: Tensor, mixing: BatchMixing) -> tuple[Tensor, Tensor]:
    """Return images of several mixed batches of `MIXED_GROUP` images, and their shares."""
    image_groups = []
    share_groups = []
    for group, group_labels in zip(
        images.split(MIXED_GROUP), labels.split(MIXED_GROUP), strict=True
    ):
        mixed, shares = mixing(group, group_labels)
        image_groups.append(mixed)
        share_groups.append(shares)
    return torch.cat(image_groups), torch.cat(share_groups)


def _fill_board(trainer: Trainer, pl_module: TransferClassifier) -> None:
    """Add a page of charts and the graph of the network to TensorBoard, if the run has it."""
    board = board_of(trainer)
    if board is None:
        return
    add_charts(board)
    num_modules = len(list(pl_module.network.modules()))
    if num_modules > MAX_QUICK_MODULES:
        say(trainer, f"Drawing the graph of {num_modules} modules for TensorBoard ...")
    size = pl_module.classifier.geometry.input_size
    example = torch.zeros(1, 3, *size, device=pl_module.device, dtype=pl_module.dtype)  # type: ignore[arg-type]
    failure = add_graph(board, pl_module.network, example)
    if failure is not None:
        say(trainer, f"TensorBoard will have no graph of this network ({failure}).")


def _log_short_runs_more_often(trainer: Trainer) -> None:
    """Lower the default interval of the log, so that curves of short runs have 50 points."""
    if log_interval(trainer) != LOG_INTERVAL:
        return
    # Infinite for a run without an end.
    interval = trainer.estimated_stepping_batches / MIN_CURVE_POINTS
    set_log_interval(trainer, max(1, int(min(LOG_INTERVAL, interval))))


def _best_saved_score(checkpoint: ModelCheckpoint | None) -> float | None:
    """Return the score of the best checkpoint so far, or None if there is none."""
    if checkpoint is None or checkpoint.best_model_score is None:
        return None
    return float(checkpoint.best_model_score)


def _missed_phase(trainer: Trainer) -> str:
    """Return a sentence, after a space, on what was to train later in the run; "" if nothing."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, BackboneFreeze) and callback.later_phases:
            what = ", ".join(callback.later_phases[0].entries)
            return (
                f" The phase that trains {what} has not begun: raise the patience, or let it begin "
                f"earlier (--freeze.unfreeze_epoch)."
            )
    return ""


def _is_better(score: float, other: float, mode: str) -> bool:
    """Return whether a score is better; the lower is in mode "min", the higher in "max"."""
    if mode == "min":
        return score < other
    return score > other


def _phases_from(trainer: Trainer, epoch: int, max_epochs: int) -> list[int | None]:
    """Return the phase of this and each later epoch; None where that depends on a score."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, BackboneFreeze):
            later = range(epoch + 1, max_epochs)
            return [callback.phase, *(callback.phase_at(number) for number in later)]
    return [0] * (max_epochs - epoch)
