"""Loss and accuracy of a checkpoint.

    python -m cifar_transfer evaluate --ckpt FILE [--split val]

The scores are those of exactly the weights in the file, on the data of its run.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from lightning import LightningDataModule, Trainer
from lightning.pytorch import Callback
from torch.utils.tensorboard import SummaryWriter

from cifar_transfer.base import console
from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import CONFIG, user_path
from cifar_transfer.cli.parsers import Parser
from cifar_transfer.data import splits
from cifar_transfer.data.module import EarlierRun, ImageDataModule
from cifar_transfer.results.predictions import FIGURES_FOLDER, Predictions
from cifar_transfer.training.checkpoint_file import RECORDED_RUN_KEY, read_checkpoint
from cifar_transfer.training.collect_predictions import CollectPredictions
from cifar_transfer.training.evaluation import MirroredAccuracy, evaluate_checkpoint, load_data
from cifar_transfer.training.final_report import publish_predictions
from cifar_transfer.training.progress_bar import OneLineProgressBar

Split = Literal["test", "val"]


def evaluate(
    ckpt: str,
    split: Split = "test",
    root: str | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    precision: str = "32-true",
    mirrored: bool = False,
    leave_out: str | None = None,
    figures: bool = True,
) -> dict[str, float]:
    """Evaluate a checkpoint on the data it was trained with.

    Args:
        ckpt: The checkpoint.
        split: "test", or "val" for the very images that were held out in its training.
        root: Where the data are now, if they have moved.
        accelerator: As in Lightning's Trainer.
        devices: As in Lightning's Trainer.
        precision: As in Lightning's Trainer.
        mirrored: Also predict from each image and its mirror image together, for twice the time.
        leave_out: A file of images, as `fit --data.leave_out` takes it: score all images, and also
            all but these.
        figures: Draw confusion, reliability and mistakes into the folder `figures` of the
            checkpoint's run, and into the run's TensorBoard; for a checkpoint outside a run, beside
            it.

    Returns:
        `test/loss` and `test/acc`, or `val/loss` and `val/acc`. Where classes are unequal also
        `test/balanced_accuracy` and `test/macro_f1`, the mean recall and F1 of the classes that
        have images. With `mirrored` also `test/mirrored_acc`, and with `leave_out` also
        `test/acc_without`. All but the loss are shares of 1.
    """
    console.hush()
    ckpt = str(user_path(ckpt))
    checkpoint = read_checkpoint(ckpt)
    if leave_out:
        splits.read_image_list(leave_out)  # its mistakes, before the time that scoring takes
    data = _load_data(ckpt, checkpoint, split, root, leave_out)
    collect = CollectPredictions()
    callbacks: list[Callback] = []
    if figures or leave_out:
        callbacks.append(collect)
    if mirrored:
        callbacks.append(MirroredAccuracy(data.num_classes))
    trainer = _trainer(accelerator, devices, precision)
    scores = evaluate_checkpoint(trainer, ckpt, data, split, callbacks)
    predictions = collect.predictions  # of all processes, in the first one
    if predictions is not None and leave_out:
        rows = splits.rows_left(data.names, leave_out)[split]
        scores[f"{split}/acc_without"] = float(predictions.correct[rows].float().mean())
    if trainer.is_global_zero:
        _print_scores(scores)
    if predictions is not None and figures:
        _draw(ckpt, split, predictions, checkpoint["global_step"])
    return scores


def _load_data(
    ckpt: str,
    checkpoint: dict[str, Any],
    split: Split,
    root: str | None,
    leave_out: str | None,
) -> ImageDataModule:
    """Return the data of a checkpoint's run, split as in the run, with all images."""
    overrides: dict[str, Any] = {}
    if root:
        options = checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
        overrides["tables" if "tables" in options else "root"] = root
    else:
        _require_data(checkpoint)
    if leave_out:
        overrides["leave_out"] = None
    data = load_data(checkpoint, **overrides)
    record = splits.read(ckpt, checkpoint.get(RECORDED_RUN_KEY), is_needed=split == "val")
    data.continue_from(EarlierRun(record=record))
    return data


def _require_data(checkpoint: dict[str, Any]) -> None:
    """Raise a `UserError` if the folder of the run's data is not there: it would be made anew."""
    options = checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    root = options.get("root")
    if isinstance(root, str) and not Path(root).is_dir():
        place = "" if Path(root).is_absolute() else f", seen from {Path.cwd()}"
        raise UserError(
            f"The data of the run are not in {root}{place}: name their folder with --root=FOLDER."
        )


def _trainer(accelerator: str, devices: int, precision: str) -> Trainer:
    on_terminal = sys.stdout.isatty()
    options: dict[str, Any] = {  # which Lightning checks
        "accelerator": accelerator,
        "devices": devices,
        "precision": precision,
    }
    return Trainer(
        **options,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=on_terminal,
        callbacks=[OneLineProgressBar()] if on_terminal else [],
    )


def _print_scores(scores: dict[str, float]) -> None:
    for name, value in scores.items():
        if name.endswith("loss"):
            print(f"{name} {value:.4f}")
        else:
            print(f"{name}  {value:.2%}")


def _draw(ckpt: str, split: Split, predictions: Predictions, step: int) -> None:
    """Draw predictions into the folder of the checkpoint's run, or else beside the checkpoint."""
    folder = Path(ckpt).absolute().parent
    is_in_run = (folder.parent / CONFIG).is_file()
    if is_in_run:
        folder = folder.parent
    with SummaryWriter(str(folder)) if is_in_run else nullcontext() as board:
        publish_predictions(folder, split, predictions, board, step)
    print(f"figures  {os.path.relpath(folder)}/{FIGURES_FOLDER}/{split}-*.png")


def main(args: Sequence[str]) -> None:
    """Parse the options and evaluate."""
    auto_cli(evaluate, args=list(args), as_positional=False, parser_class=Parser)
