"""Scores of a checkpoint: accuracy with its interval, by class, and how honest it is.

    python -m cifar_transfer evaluate --ckpt FILE [--split val] [--root NEW]

The scores are those of exactly the weights in the file, on the data of its run, or on new images in
folders of the same classes.
"""

import json
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
from cifar_transfer.data.folder import ImageFolderDataModule
from cifar_transfer.data.labelled_folder import LabelledFolder, find_test_images
from cifar_transfer.data.leave_out import read_image_list
from cifar_transfer.data.module import EarlierRun, ImageDataModule
from cifar_transfer.network.description import NetworkDescription
from cifar_transfer.results import plots, score_table
from cifar_transfer.results.predictions import FIGURES_FOLDER, Predictions
from cifar_transfer.results.run_figures import save_figures
from cifar_transfer.results.scores import Scores, score
from cifar_transfer.results.words import language, language_of
from cifar_transfer.training.checkpoint_file import RECORDED_RUN_KEY, read_checkpoint
from cifar_transfer.training.collect_predictions import CollectPredictions
from cifar_transfer.training.evaluation import MirroredAccuracy, evaluate_checkpoint, load_data
from cifar_transfer.training.final_report import publish_predictions
from cifar_transfer.training.progress_bar import OneLineProgressBar

Split = Literal["test", "val"]
Format = Literal["table", "json"]


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
    coverage: bool = False,
    format: Format = "table",
) -> dict[str, float]:
    """Evaluate a checkpoint on the data it was trained with.

    Args:
        ckpt: The checkpoint.
        split: "test", or "val" for the very images that were held out in its training.
        root: Where the data are now, if they have moved; or a folder of new images, in test/CLASS/
            or CLASS/, of some or all of the checkpoint's classes.
        accelerator: As in Lightning's Trainer.
        devices: As in Lightning's Trainer.
        precision: As in Lightning's Trainer.
        mirrored: Also predict from each image and its mirror image together, for twice the time.
        leave_out: A file of images, as `fit --data.leave_out` takes it: score all images, and also
            all but these.
        figures: Draw confusion, reliability and mistakes into the folder `figures` of the
            checkpoint's run, and into the run's TensorBoard; for a checkpoint outside a run, beside
            it. The scores are kept there too, as JSON. Files of new images begin with the name of
            their folder.
        coverage: Also show accuracy against the share of images that is answered, as a figure and a
            table, see `predict --threshold`.
        format: Of what is printed: "table", or "json" for programs.

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
        read_image_list(leave_out)  # its mistakes, before the time that scoring takes
    data = _load_data(ckpt, checkpoint, split, root, leave_out)
    collect = CollectPredictions()
    callbacks: list[Callback] = [collect]
    if mirrored:
        callbacks.append(MirroredAccuracy(data.num_classes))
    trainer = _trainer(accelerator, devices, precision, show_progress=format == "table")
    scores = evaluate_checkpoint(trainer, ckpt, data, split, callbacks)
    predictions = collect.predictions  # of all processes, in the first one
    if predictions is not None and leave_out:
        rows = splits.rows_left(data.names, leave_out)[split]
        scores[f"{split}/acc_without"] = float(predictions.correct[rows].float().mean())
    if predictions is not None:
        _print(scores, score(predictions), coverage, format)
    if predictions is not None and figures:
        name: str = split
        if isinstance(data, LabelledFolder):
            name = f"{user_path(str(root)).resolve().name}-{split}"
        pattern = _draw(ckpt, name, predictions, checkpoint["global_step"], coverage)
        print(f"figures  {pattern}", file=sys.stdout if format == "table" else sys.stderr)
    return scores


def _load_data(
    ckpt: str,
    checkpoint: dict[str, Any],
    split: Split,
    root: str | None,
    leave_out: str | None,
) -> ImageDataModule:
    """Return new images, or all data of a checkpoint's run, split as in the run."""
    if root and not user_path(root).exists():
        raise UserError(f"There is no folder {root}: name that of the data with --root=FOLDER.")
    if root and split == "test":
        new_images = _find_new_images(ckpt, checkpoint, user_path(root))
        if new_images is not None:
            return new_images
    overrides: dict[str, Any] = {}
    if root:
        options = checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
        overrides["tables" if "tables" in options else "root"] = root
    else:
        _require_data(checkpoint)
    if leave_out:
        overrides["leave_out"] = None
    data = load_data(checkpoint, **overrides)
    if root and not data.is_downloaded():
        raise UserError(
            f"{root} has neither the images of the run nor new ones in test/CLASS/: name another "
            f"folder with --root=FOLDER."
        )
    record = splits.read(ckpt, checkpoint.get(RECORDED_RUN_KEY), is_needed=split == "val")
    data.continue_from(EarlierRun(record=record))
    return data


def _find_new_images(ckpt: str, checkpoint: dict[str, Any], root: Path) -> LabelledFolder | None:
    """Return the images in a folder of test images alone; None if it is another one.

    A folder of classes that has most of the images of the run is its data in a new place: not all
    of them are test images.
    """
    network = NetworkDescription.from_checkpoint(checkpoint)
    folder = find_test_images(root, network.names_of_classes)
    if folder is None or (folder == root and _has_images_of_run(ckpt, checkpoint, root)):
        return None
    return LabelledFolder(folder, network.names_of_classes, network.geometry)


def _has_images_of_run(ckpt: str, checkpoint: dict[str, Any], folder: Path) -> bool:
    """Return whether a folder of classes has most of the images of a checkpoint's run.

    It may have them where the run had folders of images, but its record is not there.
    """
    record = splits.read(ckpt, checkpoint.get(RECORDED_RUN_KEY), is_needed=False)
    if record is None:
        options = checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
        return options.get("data") == ImageFolderDataModule.__name__
    count = 0
    present = 0
    for names in record.values():
        for name in names:
            _, _, path = name.partition("/")  # without the split
            count += 1
            present += (folder / path).is_file()
    return 2 * present > count


def _require_data(checkpoint: dict[str, Any]) -> None:
    """Raise a `UserError` if the folder of the run's data is not there: it would be made anew."""
    options = checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    root = options.get("root")
    if isinstance(root, str) and not Path(root).is_dir():
        place = "" if Path(root).is_absolute() else f", seen from {Path.cwd()}"
        raise UserError(
            f"The data of the run are not in {root}{place}: name their folder with --root=FOLDER."
        )


def _trainer(accelerator: str, devices: int, precision: str, show_progress: bool) -> Trainer:
    on_terminal = show_progress and sys.stdout.isatty()
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


def _print(logged_scores: dict[str, float], scores: Scores, coverage: bool, format: Format) -> None:
    """Print the scores that Lightning has logged, and those of the predictions."""
    if format == "json":
        content = {"scores": logged_scores, **scores.to_json()}
        print(json.dumps(content, indent=1))
        return
    _print_logged(logged_scores)
    print(f"\n{score_table.score_lines(scores)}")
    print(score_table.bin_table(scores))
    if coverage:
        print(score_table.coverage_table(scores))
    print(score_table.class_table(scores))


def _print_logged(scores: dict[str, float]) -> None:
    for name, value in scores.items():
        if name.endswith("loss"):
            print(f"{name} {value:.4f}")
        else:
            print(f"{name}  {value:.2%}")


def _draw(ckpt: str, name: str, predictions: Predictions, step: int, with_coverage: bool) -> str:
    """Draw predictions into the folder of the checkpoint's run, or else beside the checkpoint.

    Returns:
        A pattern of the figures' files, which begin with `name`.
    """
    folder = Path(ckpt).absolute().parent
    is_in_run = (folder.parent / CONFIG).is_file()
    if is_in_run:
        folder = folder.parent
    with SummaryWriter(str(folder)) if is_in_run else nullcontext() as board:
        publish_predictions(folder, name, predictions, board, step)
    if with_coverage:
        with language(language_of(folder)):
            figure = plots.coverage(predictions)
            save_figures({f"{name}-coverage": figure}, folder / FIGURES_FOLDER)
    return f"{os.path.relpath(folder)}/{FIGURES_FOLDER}/{name}-*.png"


def main(args: Sequence[str]) -> None:
    """Parse the options and evaluate."""
    auto_cli(evaluate, args=list(args), as_positional=False, parser_class=Parser)
