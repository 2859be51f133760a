"""A checkpoint's network, its data, and its scores: those of exactly the weights in its file."""

from pathlib import Path

from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_warn

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.augment import Augment
from cifar_transfer.data.cifar import CIFAR10DataModule
from cifar_transfer.data.folder import ImageFolderDataModule
from cifar_transfer.data.geometry import Geometry
from cifar_transfer.data.module import PERMUTATION, ImageDataModule, Split
from cifar_transfer.data.shapes import ShapesDataModule
from cifar_transfer.results.collect import CollectPredictions
from cifar_transfer.training.checkpoint_file import load
from cifar_transfer.training.classifier import TransferClassifier

DATA_MODULES: dict[str, type[ImageDataModule]] = {
    module.__name__: module
    for module in (CIFAR10DataModule, ImageFolderDataModule, ShapesDataModule)
}


def load_model(path: str | Path) -> TransferClassifier:
    """As `checkpoint.load`, for Lightning's Trainer."""
    return load(path, lambda options: TransferClassifier(**options))


def load_data(checkpoint: dict, **overrides: str | int | None) -> ImageDataModule:
    """The data module a checkpoint was trained with, whose images have the size that they had then.

    Args:
        checkpoint: As loaded; only the modules of this package are made from it.
        overrides: Options to change, say `root` on another machine.

    Raises:
        UserError: The checkpoint has no data module of this package's.
    """
    options = dict(checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    name = options.pop("data", None)
    if name not in DATA_MODULES:
        raise UserError(
            "The checkpoint does not say which data it was trained on: it has no data module of this package's."
        )
    try:
        options["augment"] = Augment(**options["augment"])
        choice = options.pop("held_out_by", PERMUTATION)
        left_out = options.pop("left_out", None)  # None also of a checkpoint that does not say
        data = DATA_MODULES[name](**options | overrides)
        if checkpoint.get("input_size"):
            data.fixed_size = Geometry.of(checkpoint).size
    except (KeyError, TypeError) as error:
        raise UserError(
            f"The checkpoint's options for its data are not those of this version ({error})."
        ) from None
    data.hparams["held_out_by"] = choice
    if left_out and "leave_out" not in overrides and data.hparams["left_out"] != left_out:
        listed = f"now {data.hparams['left_out']}, in training {left_out}"
        rank_zero_warn(
            f"{data.leave_out}, the list of images that are left out, has changed: {listed}."
        )
    return data


def evaluate_checkpoint(
    trainer: Trainer,
    ckpt: str | Path,
    data: LightningDataModule,
    split: Split,
    collect: CollectPredictions | None = None,
    mirrored: bool = False,
) -> dict[str, float]:
    """Score a checkpoint on all images of a split.

    The network is made anew from the file. The trainer gives devices, precision and progress bar; its other callbacks,
    loggers and limits of batches are left out, because callbacks may exchange the weights (as those that average them
    do), and a limit would score only the first images.

    Args:
        trainer: May have trained before; it is left as it was.
        ckpt: The checkpoint, which every process reads.
        data: Has the images of `split`, "val" or "test".
        collect: Keeps the predictions.
        mirrored: Also score each image and its mirror image together.

    Returns:
        `SPLIT/loss` and `SPLIT/acc`, where classes are unequal also `SPLIT/balanced_accuracy` and `SPLIT/macro_f1`, and
        with `mirrored` also `SPLIT/mirrored_acc`; all but the loss as shares of 1.

    Raises:
        UserError: The checkpoint cannot be read or is unfit for the data.
    """
    model = load_model(ckpt)
    model.mirrored = mirrored
    bars = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]  # type: ignore[attr-defined]
    bare = {"callbacks": [*bars, collect] if collect else bars, "loggers": []}
    bare |= {"limit_val_batches": 1.0, "limit_test_batches": 1.0}  # type: ignore[dict-item]
    before = {name: getattr(trainer, name) for name in bare}
    run = trainer.test if split == "test" else trainer.validate
    try:
        for name, value in bare.items():
            setattr(trainer, name, value)
        run(model, data, verbose=False)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)
