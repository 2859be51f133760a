"""Loss and accuracy of a checkpoint: `python -m cifar_transfer evaluate --ckpt FILE [--split val]`."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from lightning import Trainer
from lightning.pytorch import Callback
from torch.utils.tensorboard import SummaryWriter

from cifar_transfer.base import console
from cifar_transfer.base.files import CONFIG
from cifar_transfer.cli.parsers import Parser
from cifar_transfer.data import splits
from cifar_transfer.data.module import EarlierRun
from cifar_transfer.results.predictions import FIGURES_FOLDER
from cifar_transfer.training.checkpoint_file import read_checkpoint
from cifar_transfer.training.collect_predictions import CollectPredictions
from cifar_transfer.training.evaluation import MirroredAccuracy, evaluate_checkpoint, load_data
from cifar_transfer.training.final_report import publish_predictions
from cifar_transfer.training.progress_bar import OneLineProgressBar


def evaluate(
    ckpt: str,
    split: Literal["test", "val"] = "test",
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
        leave_out: A file of images, as `fit --data.leave_out` takes it: score all images, and also all but these.
        figures: Draw confusion, reliability and mistakes into the folder `figures` of the checkpoint's run, and into
            the run's TensorBoard; for a checkpoint outside a run, beside it.

    Returns:
        `test/loss` and `test/acc`, or `val/loss` and `val/acc`. Where classes are unequal also `test/balanced_accuracy`
        and `test/macro_f1`, the mean recall and F1 of the classes that have images. With `mirrored` also
        `test/mirrored_acc`, and with `leave_out` also `test/acc_without`. All but the loss are shares of 1.
    """
    console.hush()
    checkpoint = read_checkpoint(ckpt)
    overrides = {"root": root} if root else {}
    data = load_data(checkpoint, **overrides | ({"leave_out": None} if leave_out else {}))
    data.continue_from(EarlierRun(record=splits.read(ckpt)))
    collected = CollectPredictions() if figures or leave_out else None
    given: Any = {
        "accelerator": accelerator,
        "devices": devices,
        "precision": precision,
    }  # Lightning checks them
    given |= {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": (terminal := sys.stdout.isatty()),
    }
    trainer = Trainer(**given, callbacks=[OneLineProgressBar()] if terminal else [])
    callbacks: list[Callback] = [collected] if collected else []
    if mirrored:
        callbacks.append(MirroredAccuracy(data.num_classes))
    results = evaluate_checkpoint(trainer, ckpt, data, split, callbacks)
    if leave_out and collected and collected.predictions:  # of the first process
        said, rows = collected.predictions, splits.rows_left(data.names, leave_out)[split]
        results[f"{split}/acc_without"] = float(
            (said.predicted == said.labels)[rows].float().mean()
        )
    if trainer.is_global_zero:
        for name, value in results.items():
            print(f"{name} {value:.4f}" if name.endswith("loss") else f"{name}  {value:.2%}")
        if collected and collected.predictions and figures:
            folder = Path(ckpt).absolute().parent
            run = folder.parent if (folder.parent / CONFIG).is_file() else None
            with SummaryWriter(str(run)) if run else nullcontext() as board:
                publish_predictions(
                    run or folder, split, collected.predictions, board, checkpoint["global_step"]
                )
            print(f"figures  {os.path.relpath(run or folder)}/{FIGURES_FOLDER}/{split}-*.png")
    return results


def main(args: Sequence[str]) -> None:
    """Parse the options and evaluate."""
    auto_cli(evaluate, args=[*args], as_positional=False, parser_class=Parser)
