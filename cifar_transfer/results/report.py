"""What a run tells: a line an epoch, figures, the graph, comparable hyper-parameters, event files without overlaps."""

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from cifar_transfer.console import duration, say
from cifar_transfer.errors import first_line
from cifar_transfer.files import atomic_write
from cifar_transfer.results import publish
from cifar_transfer.results.predictions import CollectPredictions

RESULT = "result.json"  # in a finished run's folder
SLOW_GRAPH = 300  # modules, whose graph takes seconds to draw
# TensorBoard's tab of custom scalars.
LAYOUT = {
    "Training and validation": {
        "loss": ["Multiline", ["train/loss_epoch", "val/loss"]],
        "accuracy": ["Multiline", ["train/acc", "val/acc"]],
    },
    "Schedule": {
        "learning rate": ["Multiline", ["^lr$"]],
        "trainable parameters": ["Multiline", ["trainable_parameters"]],
    },
}


class Report(Callback):
    """What a run shows of itself: a line an epoch on the terminal, figures in its folder and in TensorBoard.

    Args:
        figures: Draw a grid of augmented images before training and, at the end, curves, confusion, reliability and
            mistakes, as PNG and in TensorBoard.
        projector: Also write the features of 1,000 test images with their thumbnails for TensorBoard's
            projector (6 MB for ResNet18).

    Attributes:
        seconds: Time of all epochs with their validation, also those before the run was resumed.
        images_per_second: Speed of training in the last epoch, over all devices; validation does not count.
    """

    def __init__(self, figures: bool = True, projector: bool = False) -> None:
        self.figures, self.projector = figures, projector
        self.seconds = self.images_per_second = 0.0
        self._began = self._training = 0.0
        self._images = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what can be shown before a run begins (one that continues has it already)."""
        folder = trainer.log_dir  # asked for by all ranks together
        if not trainer.is_global_zero or trainer.ckpt_path or trainer.logger is None or folder is None:
            return
        paths = []
        data = getattr(trainer, "datamodule", None)
        if self.figures and data is not None:
            sizes = pl_module.hparams.get("train_sizes") or [pl_module.hparams.get("image_size")]
            paths = publish.save({"augmented": publish.augmented(data, sizes[-1])}, Path(folder, publish.FOLDER))
            say(trainer, f"The augmented images: {os.path.relpath(paths[0])}")
        if isinstance(trainer.logger, TensorBoardLogger):
            board = trainer.logger.experiment
            board.add_custom_scalars(LAYOUT)
            publish.show(paths, board, 0)
            self._graph(trainer, pl_module)

    def _graph(self, trainer: Trainer, pl_module: LightningModule) -> None:
        size = getattr(pl_module, "input_size", None)
        if size is None:
            return
        if side := pl_module.hparams.get("image_size"):
            size = [side, side]
        network = pl_module.get_submodule("network")
        modes = {module: module.training for module in network.modules()}
        if len(modes) > SLOW_GRAPH:
            say(trainer, f"Drawing the graph of {len(modes)} modules for TensorBoard ...")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # sizes are constants in a picture of one size
            try:
                board = trainer.logger.experiment  # type: ignore[union-attr]
                board.add_graph(network.eval(), torch.zeros(1, 3, *size, device=pl_module.device))
            except Exception as error:  # of any kind, from tracing somebody's network: a picture must not cost the run
                say(trainer, f"TensorBoard will have no graph of this network ({first_line(error)}).")
        for module, training in modes.items():
            module.training = training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        self._began = time.monotonic()
        self._training, self._images = 0.0, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        """Count images, and the time until now, which leaves the validation out."""
        self._images += len(batch[1]) * trainer.world_size
        self._training = time.monotonic() - self._began

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's scores."""
        metrics = trainer.callback_metrics  # computed together by all ranks
        parts = [f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}"]
        for split, loss in (("train", "train/loss_epoch"), ("val", "val/loss")):
            if loss in metrics:
                parts.append(f"{split} loss {metrics[loss]:.3f} acc {metrics[f'{split}/acc']:6.2%}")
        parts.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:.2g}")
        if self._began:
            seconds = time.monotonic() - self._began
            self.seconds += seconds
            self.images_per_second = self._images / self._training
            parts.append(f"{seconds:.1f} s")
            if (left := (trainer.max_epochs or 0) - trainer.current_epoch - 1) > 0:
                parts.append(f"{duration(left * seconds)} left")
        say(trainer, "   ".join(parts))

    def state_dict(self) -> dict[str, float]:
        """The time so far and the last speed, for a run that is resumed, perhaps when only its test is missing."""
        return {"seconds": self.seconds, "images_per_second": self.images_per_second}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Take up the clock."""
        self.seconds, self.images_per_second = state_dict["seconds"], state_dict["images_per_second"]


def draw_final(trainer: Trainer, split: str, collected: CollectPredictions) -> None:
    """Draw a finished run, in its folder and in TensorBoard.

    Args:
        trainer: Of the finished run.
        split: Of the images that the best checkpoint was evaluated on.
        collected: Its predictions for them.
    """
    folder = trainer.log_dir  # asked for by all ranks together
    if folder is None or trainer.logger is None or not trainer.is_global_zero:
        return
    board = trainer.logger.experiment if isinstance(trainer.logger, TensorBoardLogger) else None
    paths = publish.save(publish.curves(Path(folder)), Path(folder, publish.FOLDER))
    if board is not None:
        publish.show(paths, board, trainer.global_step)
    publish.publish(Path(folder), split, collected, board, trainer.global_step)


def log_final(trainer: Trainer, hparams: dict[str, Any], scores: dict[str, float]) -> None:
    """Write the hyper-parameters with the run's final scores, so that TensorBoard compares runs by them.

    Args:
        trainer: Of the finished run.
        hparams: Options; whatever is not a number, a string or a flag is written as its text, in one column.
        scores: Say `{"best/val_acc": 0.9, "best/test_acc": 0.89}`.
    """
    if isinstance(trainer.logger, TensorBoardLogger):
        texts = {
            name: " ".join(f"{key}={part}" for key, part in value.items()) if isinstance(value, dict) else value
            for name, value in hparams.items()
        }
        trainer.logger.log_hyperparams(texts, scores)
        trainer.logger.save()


def write_result(trainer: Trainer, pl_module: LightningModule, scores: dict[str, float]) -> None:
    """Write what a finished run came to into its folder, as `result.json`.

    Args:
        trainer: Of the finished run.
        pl_module: What it trained.
        scores: Its accuracies, as for `log_final`; beside them are written the number of parameters, the seconds of
            training and the images trained with in a second.
    """
    folder = trainer.log_dir  # asked for by all ranks together
    if folder is None or not trainer.is_global_zero:
        return
    report = next(callback for callback in trainer.callbacks if isinstance(callback, Report))  # type: ignore[attr-defined]
    result = scores | {
        "parameters": sum(parameter.numel() for parameter in pl_module.parameters()),
        "epochs": trainer.current_epoch,
        "seconds": round(report.seconds, 1),
        "images_per_second": round(report.images_per_second, 1),
    }
    with atomic_write(Path(folder, RESULT)) as file:
        file.write(f"{json.dumps(result, indent=1)}\n".encode())
