"""The scores of a checkpoint: those of exactly the weights in its file, on data as in its run."""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics.classification import MulticlassAccuracy

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.augment_options import Augment
from cifar_transfer.data.cifar import CIFAR10DataModule
from cifar_transfer.data.folder import ImageFolderDataModule
from cifar_transfer.data.images import Batch
from cifar_transfer.data.library import TorchvisionDataModule
from cifar_transfer.data.module import EarlierRun, ImageDataModule
from cifar_transfer.data.shapes import ShapesDataModule
from cifar_transfer.data.splits import Split
from cifar_transfer.data.table import TableDataModule
from cifar_transfer.network.description import NetworkDescription
from cifar_transfer.training.classifier import TransferClassifier
from cifar_transfer.training.lightning_internals import callbacks_of, without_requeued_state

DATA_MODULES: dict[str, type[ImageDataModule]] = {
    "CIFAR10DataModule": CIFAR10DataModule,
    "ImageFolderDataModule": ImageFolderDataModule,
    "ShapesDataModule": ShapesDataModule,
    "TableDataModule": TableDataModule,
    "TorchvisionDataModule": TorchvisionDataModule,
}


class MirroredAccuracy(Callback):
    """Logs `test/mirrored_acc`: accuracy of an image and its mirror image together, in [0, 1].

    The probabilities of both are added. Works in tests and in validations outside of a fit.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        classes = self._num_classes
        accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False)
        self._accuracy = accuracy.to(pl_module.device)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch, whose logits are the outputs."""
        images, labels = batch
        with trainer.precision_plugin.forward_context():
            mirrored_logits = pl_module(images.flip(3))
        shares = outputs.softmax(1) + mirrored_logits.softmax(1)
        self._accuracy.update(shares, labels)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy over all processes."""
        split = "test" if trainer.testing else "val"
        pl_module.log(f"{split}/mirrored_acc", self._accuracy.compute())

    on_validation_start = on_test_start
    on_validation_batch_end = on_test_batch_end
    on_validation_epoch_end = on_test_epoch_end


def load_data(checkpoint: dict[str, Any], **overrides: str | int | None) -> ImageDataModule:
    """Return the data module of a checkpoint's run, which decodes images to the same size.

    Args:
        checkpoint: As loaded. Only the data modules of this package are made from it.
        overrides: Options to change, such as `root` on another machine.

    Raises:
        UserError: The checkpoint has no data module of this package, or one with other options.
    """
    options = dict(checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    name = options.pop("data", None)
    if name not in DATA_MODULES:
        raise UserError(
            "The checkpoint does not say which data it was trained on: it has no data module of "
            "this package's."
        )
    try:
        options["augment"] = Augment(**options["augment"])
        images_left_out = options.pop("left_out")
        options.pop("transforms")  # of training, as texts
        data = DATA_MODULES[name](**options | overrides)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"The checkpoint's options for its data are not those of this version ({error})."
        ) from None
    network = NetworkDescription.from_checkpoint(checkpoint)
    geometry = network.geometry
    data.continue_from(
        EarlierRun(
            size=geometry.size, grey_range=geometry.grey_range, class_names=network.class_names
        )
    )
    if images_left_out and "leave_out" not in overrides:
        _tell_of_other_list(data, images_left_out)
    return data


def _tell_of_other_list(data: ImageDataModule, images_left_out: str) -> None:
    """Warn if the list of images that are left out has changed since the training."""
    now = data.hparams["left_out"]
    if now != images_left_out:
        rank_zero_warn(
            f"{data.leave_out}, the list of images that are left out, has changed: now {now}, "
            f"in training {images_left_out}."
        )


def evaluate_checkpoint(
    trainer: Trainer,
    ckpt: str | Path,
    data: LightningDataModule,
    split: Split,
    callbacks: list[Callback] | None = None,
    scores_classes: bool = False,
) -> dict[str, float]:
    """Score a checkpoint on all images of a split.

    The network is made anew from the file. The trainer gives devices, precision and progress bar.
    Its other callbacks are left out, because they may exchange the weights, as those that average
    them do. Its limits of batches are left out, because they would score only the first images.

    Args:
        trainer: May have trained before; it is left as it was.
        ckpt: The checkpoint, which every process reads.
        data: Data module with the images.
        split: "val" or "test".
        callbacks: Take part in the evaluation.
        scores_classes: Whether balanced accuracy and macro F1 are given also where classes are
            equal.

    Returns:
        `SPLIT/loss` and `SPLIT/acc`, where classes are unequal also `SPLIT/balanced_accuracy` and
        `SPLIT/macro_f1`, and what the callbacks log; scores are shares of 1.

    Raises:
        UserError: The checkpoint cannot be read or is unfit for the data.
    """
    model = TransferClassifier.load_from_checkpoint(ckpt, map_location=torch.device("cpu"))
    if scores_classes:
        model.score_classes()
    bars = [callback for callback in callbacks_of(trainer) if isinstance(callback, ProgressBar)]
    settings = {
        "callbacks": [*bars, *(callbacks or [])],
        "loggers": [],
        "limit_val_batches": 1.0,
        "limit_test_batches": 1.0,
    }
    previous = {name: getattr(trainer, name) for name in settings}
    evaluate = trainer.test if split == "test" else trainer.validate
    try:
        for name, value in settings.items():
            setattr(trainer, name, value)
        with without_requeued_state(trainer):
            evaluate(model, data, verbose=False)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}
    finally:
        for name, value in previous.items():
            setattr(trainer, name, value)
