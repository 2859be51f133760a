"""Train, validate, test and report.

    python -m cifar_transfer fit [--config FILE] [options]

Without options it is the whole recipe: ResNet18 with ImageNet weights on CIFAR-10, 5 epochs with a
frozen backbone and 35 without, then the test with the best checkpoint. What people change first:

  --config=fast                a recipe: fast, cpu (minutes), accurate (one
                               GPU), scratch (no pretraining); or a file
  --data=ImageFolderDataModule your own images, photos/train/<class>/*,
  --data.root=photos           and where they are
  --data.batch_size=128        images a step and process (64)
  --model.backbone=resnet50    another network, see the command backbones
  --model.weights=FILE         its weights: a file, a name, or none
  --model.image_size=64        pixels that images are resized to
  --model.lr=3e-4              learning rate (1e-3) until the unfreezing
  --freeze.unfreeze_epoch=3    epochs with a frozen backbone (5); 0: none
  --trainer.max_epochs=10      epochs (40)
  --run=NAME                   folder of the run in lightning_logs/ (version_N)
  --resume=RUN                 continue a run that was stopped, by its folder
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cifar_transfer.base.console import counted, duration, say, styled
from cifar_transfer.base.errors import UserError, disk_fault, is_from_own_code
from cifar_transfer.base.files import LOGS
from cifar_transfer.base.text import program, without_password
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.cli.recipes import with_recipe_names
from cifar_transfer.data.broken_files import BrokenFiles
from cifar_transfer.data.splits import Split
from cifar_transfer.results.calibration import Calibration
from cifar_transfer.results.predictions import FIGURES_FOLDER, Predictions
from cifar_transfer.results.run_metrics import METRICS
from cifar_transfer.training.calibrate_checkpoint import calibrate_checkpoint
from cifar_transfer.training.checkpoint_file import newest_checkpoint
from cifar_transfer.training.collect_predictions import CollectPredictions
from cifar_transfer.training.evaluation import evaluate_checkpoint
from cifar_transfer.training.final_report import draw_final, log_final, write_result
from cifar_transfer.training.lightning_internals import is_lost_process
from cifar_transfer.training.run_checkpoints import BestFigure

GREEN = 32  # ANSI's number
SCORE_NAMES = {
    "acc": "accuracy",
    "loss": "loss",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
}


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
        scores: Scores of the best checkpoint, in [0, 1]: `best/val_acc`; with test images also
            `best/test_acc`; with classes of unequal sizes also `best/val_macro_f1` and others; and
            the figure that it was chosen by, which may also be `best/val_loss`.
        best: The best checkpoint, by the figure of `report.best`.
    """

    scores: dict[str, float]
    best: Path


class Evaluation(NamedTuple):
    """What the best checkpoint came to on a split.

    Attributes:
        scores: Figures by their names, such as "val/acc".
        predictions: Predictions; None on other processes than the first, and without figures.
    """

    scores: dict[str, float]
    predictions: Predictions | None


def fit(args: Sequence[str]) -> Outcome | None:
    """Train, evaluate and report the run that options describe.

    Args:
        args: Options as on the command line.

    Returns:
        The outcome; None if the run keeps no checkpoints, as after `fast_dev_run`.

    Raises:
        UserError: A mistake in the options, the data or the checkpoint; or a disk is full.
    """
    cli = FitCLI(args)
    try:
        return _fit(cli)
    except UserError as error:
        raise cli.named_as_options(error) from error
    except (OSError, ValueError) as error:  # Lightning's for a figure that cannot be written
        fault = disk_fault(error)
        if fault is None or is_from_own_code(error):
            raise
        raise UserError(f"{fault} {_how_to_continue(cli)}") from error
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise UserError(
            f"Another process of this run is gone; if it said nothing above, it was killed. "
            f"{_how_to_continue(cli)}"
        ) from error
    finally:
        cli.folder.release()
        # A thread of gloo that frees a tensor while the interpreter ends would abort the process.
        # This waits for it.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _fit(cli: FitCLI) -> Outcome | None:
    train(cli)
    best = best_checkpoint(cli)
    if best is None:
        return None
    evaluations, calibration = evaluate(cli, best)
    scores = scores_of_best(evaluations, cli.config.report.best)
    result = publish(cli, evaluations, scores)
    checkpoint = _relative(best)
    lines = closing_lines(
        scores,
        result,
        backbone=cli.model.classifier.backbone,
        best_epoch=min(_epoch_of(best), int(result["epochs"])),
        best_figure=cli.config.report.best,
        run=_relative(cli.folder.path),
        curves=_curves_of(cli),
        checkpoint=checkpoint,
        is_newest=_is_newest(best),
        left_out=_left_out(cli.datamodule),
        calibration=calibration,
    )
    say(cli.trainer, lines)
    return Outcome(scores, checkpoint)


def train(cli: FitCLI) -> None:
    """Train, until the end or until the run is told to stop.

    Raises:
        SystemExit: The run was told to stop. It is saved.
    """
    trainer = cli.trainer
    try:
        trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.ckpt_path)
    except SystemExit:  # Lightning's for the KeyboardInterrupt of `Interrupt`
        if cli.interrupt.received is None:
            raise
    if cli.interrupt.received is not None:
        say(trainer, f"Stopped. {_how_to_continue(cli)}")
        # The other processes seem to have failed if they end with a status of their own.
        raise SystemExit(cli.interrupt.exit_status if trainer.is_global_zero else 0) from None
    if trainer.received_sigterm:  # after the last step
        raise SIGTERMException


def best_checkpoint(cli: FitCLI) -> Path | None:
    """Return the best checkpoint of the run; None if it keeps none or has not trained.

    Without a validation, which alone tells which weights are best, the last weights become it.
    """
    if cli.best is None or cli.trainer.global_step == 0:
        return None
    path = cli.best.path
    is_there = cli.trainer.strategy.broadcast(path.is_file())
    was_validated = bool(cli.best.best_model_path)  # perhaps that of the run it continues from
    if not (is_there and was_validated):
        say(
            cli.trainer,
            f"No validation took place while training: {path.name} keeps the last weights.",
        )
        cli.trainer.save_checkpoint(path)
    return path


def evaluate(cli: FitCLI, checkpoint: Path) -> tuple[dict[Split, Evaluation], Calibration | None]:
    """Evaluate a checkpoint on the validation images and, if there are any, on the test images.

    In between it gets its temperature.

    Returns:
        What it came to on each split, and what its temperature does; None for the latter on other
        processes than the first.
    """
    trainer = cli.trainer
    data = cli.datamodule
    evaluations: dict[Split, Evaluation] = {}
    collect = CollectPredictions()
    scores_classes = cli.config.report.best == "val/macro_f1"
    scores = evaluate_checkpoint(
        trainer, checkpoint, data, "val", [collect], scores_classes=scores_classes
    )
    predictions = collect.predictions
    calibration = calibrate_checkpoint(
        trainer, checkpoint, predictions, data.validates_on_test_images
    )
    if predictions is not None and calibration is not None:
        predictions = predictions.at_temperature(calibration.temperature)
    evaluations["val"] = Evaluation(scores, predictions)
    if "test" in data.images and trainer.limit_test_batches != 0:
        collect = CollectPredictions()
        callbacks: list[Callback] = [collect] if cli.config.report.figures else []
        scores = evaluate_checkpoint(
            trainer, checkpoint, data, "test", callbacks, scores_classes=scores_classes
        )
        evaluations["test"] = Evaluation(scores, collect.predictions)
    return evaluations, calibration


def scores_of_best(
    evaluations: Mapping[Split, Evaluation], best_figure: BestFigure
) -> dict[str, float]:
    """Return the scores of `Outcome`: "val/acc" becomes "best/val_acc".

    Losses are left out, unless the checkpoint was chosen by that one.
    """
    scores = {}
    for evaluation in evaluations.values():
        for name, value in evaluation.scores.items():
            if not name.endswith("loss") or name == best_figure:
                scores[f"best/{name.replace('/', '_')}"] = value
    return scores


def publish(
    cli: FitCLI, evaluations: Mapping[Split, Evaluation], scores: dict[str, float]
) -> dict[str, Any]:
    """Log the scores, write `result.json` and draw the figures; return what is in `result.json`."""
    hparams = {**cli.datamodule.hparams, **cli.model.hparams}
    test_scores = evaluations["test"].scores if "test" in evaluations else {}
    log_final(cli.trainer, hparams, scores, test_scores)
    arguments = with_recipe_names(cli.arguments)
    command = f"{program('fit')} {shlex.join(arguments)}".rstrip()
    origin = {"seed": cli.config.seed_everything, "command": without_password(command)}
    result = write_result(cli.trainer, cli.model, scores, origin)
    if cli.config.report.figures:
        last_split = list(evaluations)[-1]
        draw_final(cli.trainer, last_split, evaluations[last_split].predictions)
    return result


def closing_lines(
    scores: Mapping[str, float],
    result: Mapping[str, Any],
    *,
    backbone: str,
    best_epoch: int,
    best_figure: BestFigure,
    run: Path,
    curves: str,
    checkpoint: Path,
    is_newest: bool,
    left_out: str | None,
    calibration: Calibration | None,
) -> str:
    """Return what the terminal shows at the end of a run.

    Args:
        scores: Scores of the best checkpoint, as in `Outcome`.
        result: Content of `result.json`.
        backbone: Name of the network.
        best_epoch: Epoch of the best checkpoint, from 1.
        best_figure: Figure that it was chosen by.
        run: Folder of the run.
        curves: What shows its curves: a command or a file.
        checkpoint: The best checkpoint.
        is_newest: Whether the command `predict` takes this checkpoint by itself.
        left_out: How many images were left out because they cannot be read; None if none was.
        calibration: What the temperature of this checkpoint does.
    """
    lines = {}
    for name, value in scores.items():
        split, _, score = name.removeprefix("best/").partition("_")
        shown_value = f"{value:.4f}" if score == "loss" else f"{value:.2%}"
        lines[f"{split} {SCORE_NAMES[score]}"] = styled(shown_value, GREEN)
    if calibration is not None:
        lines["temperature"] = str(calibration)
    choice_of_best = "the best"
    if best_figure != "val/acc":
        choice_of_best = f"the best by {best_figure}"
    lines["checkpoint"] = f"{choice_of_best}, of epoch {best_epoch}"
    epochs = int(result["epochs"])
    plural = "" if epochs == 1 else "s"
    speed = f"{result['images_per_second']:.0f} images/s"
    lines["training"] = f"{epochs} epoch{plural} in {duration(result['seconds'])}, {speed}"
    lines["network"] = f"{backbone}, {result['parameters']:,} parameters"
    if left_out is not None:
        lines["left out"] = left_out
    lines["run"] = str(run)
    lines["look at it"] = curves
    choice = "" if is_newest else f" --ckpt {checkpoint}"
    lines["predict"] = f"{program('predict')} IMAGE{choice}"
    lines["and more"] = program("").rstrip(" .")
    width = max(len(name) for name in lines)
    text = [f"{name:<{width}}  {value}" for name, value in lines.items()]
    return "\n".join(["", *text])


def _curves_of(cli: FitCLI) -> str:
    """Return what shows the curves of a run: a command where event files are, else a path."""
    for logger in cli.trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            folder = logger.root_dir
            if "://" not in folder:
                folder = str(_relative(Path(folder)))
            return f"tensorboard --logdir {folder}"
    run = _relative(cli.folder.path)
    if cli.config.report.figures:
        return str(run / FIGURES_FOLDER)
    return str(run / METRICS)


def _left_out(data: Any) -> str | None:
    """Return how many images the data leave out because they cannot be read; None if none."""
    broken = getattr(data, "broken", None)
    if not isinstance(broken, BrokenFiles) or not broken:
        return None
    return broken.summary()


def _epoch_of(checkpoint: Path) -> int:
    """Return the epoch of a checkpoint, from 1; after the last epoch it is one more."""
    return counted(torch.load(checkpoint, "cpu", weights_only=True, mmap=True)["epoch"])


def _is_newest(checkpoint: Path) -> bool:
    """Return whether a checkpoint is the one that commands take which are given none."""
    checkpoint = checkpoint.resolve()
    is_among_runs = checkpoint.parents[2] == Path(LOGS).resolve()
    return is_among_runs and newest_checkpoint().resolve() == checkpoint


def _how_to_continue(cli: FitCLI) -> str:
    if not cli.folder.started:
        return "It had not begun to train: start it again."
    return f"Continue with: {program('fit')} --resume {_relative(cli.folder.path)}"


def _relative(path: Path) -> Path:
    return Path(os.path.relpath(path))


def main(args: Sequence[str]) -> None:
    """Run the command."""
    fit(args)
