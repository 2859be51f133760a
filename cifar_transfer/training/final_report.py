"""The end of a run: `result.json`, its scores in the loggers, and its figures."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from cifar_transfer.base.files import RESULT, write_json
from cifar_transfer.base.machine import device_name, versions
from cifar_transfer.data import splits
from cifar_transfer.results.predictions import (
    FIGURES_FOLDER,
    Predictions,
    predictions_path,
    scores_path,
)
from cifar_transfer.results.run_figures import (
    curve_figures,
    prediction_figures,
    save_figures,
)
from cifar_transfer.results.run_metrics import read_curves
from cifar_transfer.results.scores import score
from cifar_transfer.results.words import language, language_of
from cifar_transfer.training.board import add_pictures, board_of
from cifar_transfer.training.lightning_internals import callbacks_of
from cifar_transfer.training.logger import FINAL
from cifar_transfer.training.report import Report
from cifar_transfer.training.run import folder_of

# TensorBoard's table of hyper-parameters shows the first five. It sorts them by name, capital
# letters first.
FIRST_HYPERPARAMETERS = {
    "backbone": "Backbone",
    "batch_size": "Batch size",
    "lr": "Learning rate",
    "optimizer": "Optimizer",
    "weights": "Weights",
}


def log_final(
    trainer: Trainer,
    hparams: dict[str, Any],
    scores: dict[str, float],
    test_scores: dict[str, float],
) -> None:
    """Log the hyper-parameters and final scores of a run, by which TensorBoard compares runs.

    Args:
        trainer: Trainer of the run.
        hparams: Options of the run; a dictionary of options is written as one text.
        scores: Scores of the best checkpoint: `{"best/val_acc": 0.9, "best/test_acc": 0.89}`. In
            TensorBoard they are called "result/val_acc", ...
        test_scores: `test/loss` and `test/acc` of the best checkpoint, or nothing; logged at the
            run's last step.
    """
    if test_scores:
        for logger in trainer.loggers:
            logger.log_metrics(test_scores, step=trainer.global_step)
    if not isinstance(trainer.logger, TensorBoardLogger):
        return
    texts = {}
    for name, value in hparams.items():
        if isinstance(value, dict):
            value = " ".join(f"{option}={setting}" for option, setting in value.items())
        texts[FIRST_HYPERPARAMETERS.get(name, name)] = value
    results = {name.replace("best/", FINAL): score for name, score in scores.items()}
    trainer.logger.log_hyperparams(texts, results, trainer.global_step)
    trainer.logger.save()


def write_result(
    trainer: Trainer,
    pl_module: LightningModule,
    scores: dict[str, float],
    origin: dict[str, Any],
) -> dict[str, Any]:
    """Write `result.json` into the folder of a run, and return what is in it.

    Args:
        trainer: Trainer of the run, with a `Report` among its callbacks.
        pl_module: Module whose parameters are counted.
        scores: As of `log_final`.
        origin: What the run was made with: its seed and the command.
    """
    run = folder_of(trainer)
    report = next(callback for callback in callbacks_of(trainer) if isinstance(callback, Report))
    result = scores | {
        "parameters": sum(parameter.numel() for parameter in pl_module.parameters()),
        "epochs": trainer.current_epoch,
        "seconds": round(report.clock.seconds, 1),
        "images_per_second": round(report.clock.images_per_second, 1),
        **origin,
        "device": device_name(trainer.strategy.root_device),
        "devices": trainer.world_size,
        "threads": torch.get_num_threads(),
        "precision": trainer.precision,
        "versions": versions(),
    }
    if run is not None and trainer.is_global_zero:
        write_json(run / RESULT, result)
    return result


def draw_final(trainer: Trainer, split: str, predictions: Predictions | None) -> None:
    """Draw the curves of a finished run and the predictions of its best checkpoint.

    Args:
        trainer: Trainer of the run.
        split: "val" or "test".
        predictions: Predictions for the split; None on other processes than the first.
    """
    run = folder_of(trainer)
    if run is None or predictions is None:
        return
    board = board_of(trainer)
    with language(language_of(run)):
        paths = save_figures(draw_curves(run), run / FIGURES_FOLDER)
    if board is not None:
        add_pictures(board, paths, trainer.global_step)
    publish_predictions(run, split, predictions, board, trainer.global_step)


def draw_curves(run: Path) -> dict[str, Figure]:
    """Draw the curves of a run from its `metrics.csv`, in the language that is set."""
    recorded = splits.read_record(run)
    val_name = "validation"
    if recorded and recorded["val"][0].startswith("test/"):
        val_name = "test"
    return curve_figures(read_curves(run), val_name)


def publish_predictions(
    run: Path,
    split: str,
    predictions: Predictions,
    board: SummaryWriter | None,
    step: int,
) -> None:
    """Keep predictions and their scores in a run's folder, and draw them there and in TensorBoard.

    Args:
        run: Folder of the run.
        split: "val", "test" or another name, with which the names of the files begin.
        predictions: Predictions of a checkpoint.
        board: TensorBoard's writer into the folder of the run, or None.
        step: Step of the checkpoint.
    """
    path = predictions_path(run, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    predictions.save(path)
    # Drawn from the file, so that drawing it again later gives the same pixels.
    predictions = Predictions.load(path)
    write_json(scores_path(run, split), score(predictions).to_json())
    with language(language_of(run), predictions.names):
        paths = save_figures(prediction_figures(predictions, split), path.parent)
    if board is not None:
        add_pictures(board, paths, step)
