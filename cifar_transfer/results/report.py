"""What a run tells: its epochs, figures, the graph, comparable hyper-parameters."""

import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from cifar_transfer.base.console import say
from cifar_transfer.base.errors import UserError, first_line
from cifar_transfer.base.files import RESULT, write_json
from cifar_transfer.results import publish
from cifar_transfer.results.collect import CollectPredictions
from cifar_transfer.results.terminal import Table
from cifar_transfer.results.words import Language, language, language_of

LOG_EVERY = 10  # steps, unless the options say otherwise
POINTS = 50  # of a curve by step
SLOW_GRAPH = 300  # modules, whose graph takes seconds to draw
# TensorBoard's tab of custom scalars.
CHARTS = {what: [f"^{what}/train$", f"^{what}/val$"] for what in ("accuracy", "loss")}
# Capital letters come first in its table of hyper-parameters, which shows five.
FIRST = {
    "backbone": "Backbone",
    "batch_size": "Batch size",
    "lr": "Learning rate",
    "optimizer": "Optimizer",
}
FIRST |= {"weights": "Weights"}
SCHEDULE = {"learning rate": ["^lr$"], "rate by stage": [publish.STAGES]}
SCHEDULE |= {"trainable parameters": ["trainable_parameters"]}
LAYOUT = {
    group: {title: ["Multiline", tags] for title, tags in charts.items()}
    for group, charts in (("Training and validation", CHARTS), ("Schedule", SCHEDULE))
}


class Report(Callback):
    """What a run shows of itself: a table of its epochs on the terminal, figures in its folder and in TensorBoard.

    Args:
        figures: Draw a grid of augmented images before training and, at the end, curves, confusion, reliability and
            mistakes, as PNG and in TensorBoard.
        language: Of the figures: "en", or "zh" for Chinese.
        projector: Also write the features of 1,000 test images with their thumbnails for TensorBoard's
            projector (6 MB for ResNet18).
    """

    def __init__(
        self, figures: bool = True, projector: bool = False, language: Language = "en"
    ) -> None:
        if projector and not figures:
            raise UserError("projector=true comes with the figures: leave out figures=false.")
        self.figures, self.projector, self.language = figures, projector, language
        self.images_per_second = (
            0.0  # of training in the last epoch, over all devices; validation does not count
        )
        self._earlier = 0.0  # seconds of the epochs before this one
        self._epoch = {
            "seconds": 0.0,
            "validation": 0.0,
            "images": 0.0,
        }  # until the clock was last read
        self._read: float | None = None  # when that was; None between two epochs
        self._table = Table()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, show what can be shown before a run begins, and begin the table."""
        self._read = time.monotonic()
        # A short run is logged more often, for curves of 50 points, unless its options say how often. Without an end
        # the number of steps is infinite.
        if trainer.log_every_n_steps == LOG_EVERY:  # type: ignore[attr-defined]
            steps = trainer.estimated_stepping_batches
            trainer.log_every_n_steps = max(1, int(min(LOG_EVERY, steps / POINTS)))  # type: ignore[attr-defined]
        self._show_beginning(trainer, pl_module)
        self._table.begin(trainer)

    def _show_beginning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir  # asked for by all ranks together
        if (
            not trainer.is_global_zero
            or trainer.ckpt_path
            or trainer.logger is None
            or folder is None
        ):
            return  # a run that continues has it already
        board, data = _board(trainer), getattr(trainer, "datamodule", None)
        if self.figures and data is not None:
            model: Any = pl_module
            side = model.side_at(1, 1) if hasattr(model, "side_at") else None
            with language(self.language, data.class_names):
                drawn = {"augmented": publish.augmented(data, side)}
                (path,) = publish.save(drawn, Path(folder, publish.FOLDER), board)
            say(trainer, f"The augmented images: {os.path.relpath(path)}")
        if board is not None:
            board.add_custom_scalars(LAYOUT)
            if hasattr(pl_module, "classifier"):
                _add_graph(trainer, pl_module, board)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock; not called for an epoch that is resumed."""
        self._earlier = self.seconds
        self._epoch = dict.fromkeys(self._epoch, 0.0)
        self._read = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time of all epochs with their validation, also before the run was resumed."""
        return self._earlier + self._epoch["seconds"]

    def _tick(self, *parts: str) -> None:
        """Read the clock, and add the time since it was last read to these parts of the epoch."""
        if self._read is not None:
            now = time.monotonic()
            for part in parts:
                self._epoch[part] += now - self._read
            self._read = now

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count images, before another callback saves that they were seen."""
        self._epoch["images"] += len(batch[1]) * trainer.world_size

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The time until here was training."""
        self._tick("seconds")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the time until here out of the speed of training."""
        self._tick("seconds", "validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch to the table."""
        self._tick("seconds")
        self._read = None
        seconds, training = (
            self._epoch["seconds"],
            self._epoch["seconds"] - self._epoch["validation"],
        )
        if self._epoch["images"]:
            self.images_per_second = self._epoch["images"] / training
        self._table.add(trainer, pl_module, seconds)

    def state_dict(self) -> dict[str, Any]:
        """The time so far, that of this epoch, and the last speed, for a run that is resumed."""
        self._tick("seconds")
        return {
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "epoch": dict(self._epoch),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the clock."""
        self._epoch |= state_dict.get("epoch", {})
        self._earlier = state_dict["seconds"] - self._epoch["seconds"]
        self.images_per_second = state_dict["images_per_second"]


def _board(trainer: Trainer) -> SummaryWriter | None:
    return trainer.logger.experiment if isinstance(trainer.logger, TensorBoardLogger) else None


def _add_graph(trainer: Trainer, pl_module: Any, board: SummaryWriter) -> None:
    network = pl_module.classifier.network
    modes = {module: module.training for module in network.modules()}
    if len(modes) > SLOW_GRAPH:
        say(trainer, f"Drawing the graph of {len(modes)} modules for TensorBoard ...")
    example = torch.zeros(
        1,
        3,
        *pl_module.classifier.geometry.input_size,
        device=pl_module.device,
        dtype=pl_module.dtype,
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", torch.jit.TracerWarning
        )  # sizes are constants in a picture of one size
        try:
            board.add_graph(network.eval(), example)
        except (
            Exception
        ) as error:  # of any kind, from tracing somebody's network: a picture must not cost the run
            say(trainer, f"TensorBoard will have no graph of this network ({first_line(error)}).")
    for module, training in modes.items():
        module.training = training


def draw_final(trainer: Trainer, split: str, collected: CollectPredictions) -> None:
    """Draw a finished run and its best checkpoint's predictions for a split, in its folder and in TensorBoard."""
    folder = trainer.log_dir  # asked for by all ranks together
    if folder is None or trainer.logger is None or not trainer.is_global_zero:
        return
    run, board = Path(folder), _board(trainer)
    with language(language_of(run)):
        publish.save(publish.curves(run), run / publish.FOLDER, board, trainer.global_step)
    publish.publish(run, split, collected, board, trainer.global_step)


def log_final(
    trainer: Trainer, hparams: dict[str, Any], scores: dict[str, float], test: dict[str, float]
) -> None:
    """Write the hyper-parameters with the run's final scores, so that TensorBoard compares runs by them.

    Args:
        trainer: Of the run.
        hparams: Options; a group of options is written as one text.
        scores: Say `{"best/val_acc": 0.9, "best/test_acc": 0.89}`; in TensorBoard "result/val_acc", ...
        test: `test/loss` and `test/acc` of the best checkpoint, logged at the run's last step, or nothing.
    """
    if test:
        for logger in trainer.loggers:
            logger.log_metrics(test, step=trainer.global_step)
    if isinstance(trainer.logger, TensorBoardLogger):
        texts = {
            FIRST.get(name, name): " ".join(f"{k}={v}" for k, v in value.items())
            if isinstance(value, dict)
            else value
            for name, value in hparams.items()
        }
        results = {name.replace("best/", publish.FINAL): score for name, score in scores.items()}
        trainer.logger.log_hyperparams(texts, results, trainer.global_step)
        trainer.logger.save()


def write_result(
    trainer: Trainer, pl_module: LightningModule, scores: dict[str, float]
) -> dict[str, float]:
    """Write what a run came to into its folder, as `result.json`: scores as for `log_final`, size and speed."""
    folder = trainer.log_dir  # asked for by all ranks together
    report = next(callback for callback in trainer.callbacks if isinstance(callback, Report))  # type: ignore[attr-defined]
    result = scores | {
        "parameters": sum(parameter.numel() for parameter in pl_module.parameters()),
        "epochs": trainer.current_epoch,
        "seconds": round(report.seconds, 1),
        "images_per_second": round(report.images_per_second, 1),
    }
    if folder is not None and trainer.is_global_zero:
        write_json(Path(folder, RESULT), result)
    return result
