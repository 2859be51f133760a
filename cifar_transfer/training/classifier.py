"""`TransferClassifier`: what happens in a step, at the end of a validation, and of an epoch."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores

from cifar_transfer import __version__
from cifar_transfer.base.console import counted
from cifar_transfer.base.errors import UserError, check, first_line
from cifar_transfer.base.primitives import StoredOptions, as_primitive
from cifar_transfer.data import splits
from cifar_transfer.data.classes import check_classes, mean_of_classes
from cifar_transfer.data.geometry import LARGEST_SIDE, Fit, GreyRange, Size, pixels, statistics
from cifar_transfer.data.loading import ends_in_one_image
from cifar_transfer.data.module import EarlierRun, ImageDataModule
from cifar_transfer.data.splits import Split
from cifar_transfer.network import build
from cifar_transfer.network.image_classifier import (
    NETWORK_KEY,
    ImageClassifier,
    NetworkDescription,
    NetworkOptions,
    built_from,
)
from cifar_transfer.network.stages import find_stages
from cifar_transfer.network.temperature import NO_TEMPERATURE
from cifar_transfer.results.run_metrics import (
    LEARNING_RATE_FIGURE,
    STAGE_RATE_PREFIX,
    STEPS_FIGURE,
    TRAINABLE_FIGURE,
)
from cifar_transfer.training import optimizer, resume
from cifar_transfer.training.batches import BatchReader
from cifar_transfer.training.checkpoint_file import (
    RECORDED_RUN_KEY,
    VERSION_KEY,
    read_checkpoint,
)
from cifar_transfer.training.ema import ExponentialMovingAverage
from cifar_transfer.training.image_sizes import ImageSizes
from cifar_transfer.training.lightning_internals import (
    callbacks_of,
    data_of,
    is_fitting,
    is_temporary,
    log_interval,
    trainer_of,
)
from cifar_transfer.training.loss import LossOptions, Teacher, TrainingLoss
from cifar_transfer.training.metrics_logger import MetricsLogger
from cifar_transfer.training.mixing import BatchMixing, MixingOptions
from cifar_transfer.training.optimizer import OptimizerName, OptimizerOptions, ScheduleName
from cifar_transfer.training.progress_bar import plain_progress_bar

TEACHER_KEY = "teacher_sha256"  # in checkpoints of a run that has a teacher

# Figures that weigh all classes alike. A fit logs them if a callback waits for one of them.
CLASS_FIGURES = ("val/balanced_accuracy", "val/macro_f1")
# What `EarlyStopping` and `ModelCheckpoint` may wait for.
MONITORS = (
    "val/loss",
    "val/acc",
    *CLASS_FIGURES,
    "train/loss_epoch",
    "train/acc",
    "train/loss",
    "train/acc_step",
)

EPOCH_KEY = "epoch_so_far"  # in checkpoints that are written before their epoch is over


class TransferClassifier(LightningModule):
    """A pretrained network with a new head, fine-tuned with cross-entropy.

    Which part of the network trains when is up to `BackboneFreeze`.

    What happens in a fit, in this order::

        setup                         check that data and network fit each other
        on_load_checkpoint            if a run continues: refuse changed options
        configure_optimizers          one optimizer over all parameters
        on_fit_start                  loss with class weights and teacher
        on_train_start                compile the network, if that is asked for
        for each epoch:
            training_step             mix its images, if that is asked for; loss of the batch;
                                      count it and its accuracy
            (the optimizer steps; with `ema` the average of the weights follows)
            lr_scheduler_step         step "linear" or "cosine"
            (with `ema` the average takes the place of the weights)
            validation_step           add a batch to val/loss and val/acc
            (the weights are back)
            on_validation_epoch_end   keep val/loss and val/acc, log them by step
            (best.ckpt is written)
            on_train_epoch_end        log the epoch's figures; step ReduceLROnPlateau with val/loss
            (last.ckpt is written)
        on_save_checkpoint            with each checkpoint: add the network's description, and put
                                      the average of the weights in their place

    Args:
        backbone: Name of a torchvision classification network, "timm/NAME" for one of timm's, or
            "lenet5". The list: `python -m cifar_transfer backbones`.
        weights: The library's name for the weights, "DEFAULT", "none", or a file: a state dict
            (.pth, .safetensors), a published checkpoint, or a checkpoint of this class.
        num_classes: Outputs of the head; None takes as many as there are `class_names`, or 10.
        class_names: What the outputs stand for; kept in checkpoints for prediction. None takes
            those of the data module in a fit, if it has some.
        image_size: Side in pixels of the square that the network takes. Larger images are decoded
            to it, smaller ones are enlarged on the device (bilinear), and of rectangles the centre
            square is taken. "native" is what the weights were trained with (a state dict does not
            say: then the library's default weights); None takes images as they are, and makes
            networks for one size (ViT) for 32.
        train_sizes: Sides that the images of training have in equal parts of the run, say [32, 48]
            for half of the steps each. Without `image_size` the last one is also the side for
            validation, test, prediction and exports. None trains at `image_size` throughout.
        normalize: Channel statistics in [0, 1]: "cifar10", "imagenet", "weights" for those that the
            weights were trained with (found as for `image_size`), or [[mean, mean, mean],
            [deviation, ...]]. None takes "cifar10" for CIFAR-10 and drawn shapes, and for other
            images "weights", or "imagenet" where these say nothing.
        small_images: Adapt the network to small images, keeping its weights: a stem of stride 1,
            smaller patches and windows, no pooling that only repeats.
            `python -m cifar_transfer backbones --detail NAME` says what.
        patch_size: Side of a transformer's patches in pixels; None leaves it to the network and
            `small_images`.
        label_smoothing: Share of each label that is spread over all classes while training, in
            [0, 1).
        teacher: A checkpoint of `fit` or `probe` whose network teaches this one (Hinton et al.
            2015, https://arxiv.org/abs/1503.02531): the training loss becomes (1 - teacher_weight)
            times what it is without, plus teacher_weight * temperature² * KL(teacher || student).
            Only training needs the file.
        teacher_weight: Weight of the teacher in the loss, in [0, 1]; 1 learns from it alone.
        temperature: Divides the logits of both in that divergence (4 as in Tian et al. 2020,
            https://arxiv.org/abs/1910.10699).
        mixup_alpha: Mixup (https://arxiv.org/abs/1710.09412): each training image becomes a
            weighted mean with another one of its batch, and so does its label. The weight is drawn
            for each batch from Beta(alpha, alpha): torchvision's `MixUp`. 0: off.
        cutmix_alpha: CutMix (https://arxiv.org/abs/1905.04899): a rectangle of each training image
            comes from another one of its batch, and that share of the label too; its area is drawn
            in the same way: torchvision's `CutMix`. 0: off. With both, either is drawn for each
            batch.
        mix_off_epochs: Last epochs of the run, whose images are not mixed.
        optimizer: "adam", "adamw" or "sgd" (with Nesterov's momentum).
        lr: Learning rate, until the unfreezing or the schedule changes it.
        head_lr: Learning rate of the heads, also after the unfreezing; None: that of the backbone.
        layer_decay: Each stage of the backbone learns at this share of the rate of the stage above
            it (ELECTRA, https://arxiv.org/abs/2003.10555; the head at the whole rate); None: all
            learn at the same rate.
        weight_decay: L2 penalty of "adam" and "sgd"; with "adamw" decoupled.
        momentum: Momentum of "sgd".
        schedule: "plateau" lowers the rate when `val/loss` no longer falls; "linear" and "cosine"
            take it from step to step up to its value and down to zero at the end of the run.
        warmup_epochs: Epochs, also parts of one, on the way up; not for "plateau".
        lr_factor: Factor by which "plateau" multiplies the learning rate.
        lr_patience: Epochs without a lower `val/loss` that "plateau" lets pass.
        ema: Decay of an exponential moving average of the weights, in [0, 1), say 0.999, warmed up
            as in timm. The average is validated, tested and saved in checkpoints; training goes on
            from the raw weights. None: no average.
        compile: Run the network through `torch.compile` (inductor); the first steps take a minute
            longer. Checkpoints stay the same.

    Attributes:
        classifier: The network with its preprocessing.
        heads: Names of the layers of `network` that tell the classes apart.
        stages: Names of the network's parameters and buffers by stage, from stem to head.
        image_sizes: The callback that chooses the side of training images, or None.
        mixing: The callback that mixes training images and their labels, or None.
        weight_average: The callback that averages the weights, or None.

    Raises:
        UserError: Unknown names, unfit weights, contradicting class counts, or an option that is
            out of its range or that a checkpoint cannot store.

    Example::

        model = TransferClassifier("resnet18", num_classes=10)
        logits = model(torch.rand(8, 3, 32, 32))  # float32 [8, 10]
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        weights: str = "DEFAULT",
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        image_size: int | Literal["native"] | None = None,
        train_sizes: list[int] | None = None,
        normalize: str | list[list[float]] | None = None,
        small_images: bool = False,
        patch_size: int | None = None,
        label_smoothing: float = 0.0,
        teacher: str | None = None,
        teacher_weight: float = 0.5,
        temperature: float = 4.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mix_off_epochs: int = 0,
        optimizer: OptimizerName = "adam",
        lr: float = 1e-3,
        head_lr: float | None = None,
        layer_decay: float | None = None,
        weight_decay: float = 1e-4,
        momentum: float = 0.9,
        schedule: ScheduleName = "plateau",
        warmup_epochs: float = 0.0,
        lr_factor: float = 0.5,
        lr_patience: int = 2,
        ema: float | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        network_options = NetworkOptions(
            backbone=backbone,
            weights=weights,
            num_classes=num_classes,
            class_names=class_names,
            image_size=image_size,
            normalize=normalize,
            small_images=small_images,
            patch_size=patch_size,
        )
        self.loss_options = LossOptions(
            label_smoothing=label_smoothing,
            teacher=teacher,
            teacher_weight=teacher_weight,
            temperature=temperature,
        )
        mixing_options = MixingOptions(
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            mix_off_epochs=mix_off_epochs,
        )
        self.optimizer_options = OptimizerOptions(
            optimizer=optimizer,
            lr=lr,
            head_lr=head_lr,
            layer_decay=layer_decay,
            weight_decay=weight_decay,
            momentum=momentum,
            schedule=schedule,
            warmup_epochs=warmup_epochs,
            lr_factor=lr_factor,
            lr_patience=lr_patience,
        )
        train_sizes = as_primitive("train_sizes", train_sizes)
        ema = as_primitive("ema", ema)
        self.compile_network = as_primitive("compile", compile)
        if train_sizes is not None:
            check("train_sizes", train_sizes, _are_sides, f"1 to {LARGEST_SIDE} pixels")
        if ema is not None:
            check("ema", ema, lambda x: 0 <= x < 1, "a decay in [0, 1), or null")
        stored = StoredOptions(
            {
                **asdict(network_options),
                **asdict(self.loss_options),
                **asdict(mixing_options),
                **asdict(self.optimizer_options),
                "train_sizes": train_sizes,
                "ema": ema,
                "compile": self.compile_network,
            }
        )
        self.save_hyperparameters(stored)

        if train_sizes is not None and network_options.image_size is None:
            network_options = replace(network_options, image_size=train_sizes[-1])
        self.classifier = ImageClassifier(network_options)
        self.heads = self.classifier.heads
        self.stages = find_stages(self.network, self.heads)
        self.loss = TrainingLoss(self.loss_options)
        self.image_sizes = None if train_sizes is None else ImageSizes(train_sizes)
        self.mixing: BatchMixing | None = None
        if mixing_options.is_on:
            self.mixing = BatchMixing(mixing_options, self.classifier.num_classes)
        self.weight_average = None if ema is None else ExponentialMovingAverage(ema)
        self._statistics_are_chosen = normalize is not None
        self._size_is_known = False
        self._always_scores_classes = False
        self._counts_classes = False  # for the scores that weigh all classes alike
        self._batches = BatchReader(self.classifier.num_classes)
        self._last_batch_is_checked = False
        self._validation_scores: dict[str, float] = {}  # of this epoch's last validation

        # The checks of torchmetrics would make every step wait for the device. Without them a mean
        # ignores weights, so the loss of each image is counted (torchmetrics 1.9,
        # `_cast_and_nan_check_input`).
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.test_loss = MeanMetric(nan_strategy="disable")
        classes = self.classifier.num_classes
        self.train_acc = MulticlassAccuracy(classes, average="micro", validate_args=False)
        self.val_acc = MulticlassAccuracy(classes, average="micro", validate_args=False)
        self.test_acc = MulticlassAccuracy(classes, average="micro", validate_args=False)
        self.class_counts = MulticlassStatScores(classes, average=None, validate_args=False)

    @property
    def network(self) -> nn.Module:
        """The library's plain network, with the new head."""
        return self.classifier.network

    @property
    def largest_side(self) -> int | None:
        """Side in pixels of the largest square that the network is given.

        None if it takes images as they are. Data modules decode images to no more than this.
        """
        side = self.classifier.geometry.input_side
        if side is None or self.image_sizes is None:
            return side
        return max(side, *self.image_sizes.sides)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float [B, C], of images, [B, 3, H, W], RGB.

        Args:
            images: Floats in [0, 1]; integers, from 0 to 255, are divided by 255.
        """
        return self.classifier(images)

    def configure_callbacks(self) -> Sequence[Callback]:
        """Return the callbacks that options ask for: of `train_sizes`, mixing and `ema`.

        In a notebook that cannot show Lightning's progress bar, ours takes its place.
        """
        callbacks = (
            self.image_sizes,
            self.mixing,
            self.weight_average,
            plain_progress_bar(self.trainer),
        )
        return [callback for callback in callbacks if callback is not None]

    def setup(self, stage: str) -> None:
        """Check that data and network fit each other, before anything is trained.

        Data modules of others need no more than loaders. What they say of classes is checked.
        """
        if stage == "fit" and self.classifier.changes:
            changes = "; ".join(self.classifier.changes)
            rank_zero_info(f"{self.classifier.backbone} adapted: {changes}.")
        if stage == "fit":
            self._check_monitors()
            self.classifier.set_temperature(NO_TEMPERATURE)  # it was that of other weights
        data = self._data_module()
        self._choose_statistics(data)
        self._counts_classes = self._needs_class_scores(data, stage)
        self.loss = TrainingLoss(self.loss_options)
        self._batches.begin()
        self._last_batch_is_checked = False
        self._reset_metrics()
        if stage == "fit" and self.loss_options.teacher is not None:
            self.loss.teacher = self._load_teacher(self.loss_options.teacher, data)
        if data is None or not hasattr(data, "num_classes"):
            return
        self._check_classes(data, stage)
        self._settle_size(
            data.image_size, getattr(data, "fit", "crop"), getattr(data, "grey_range", None)
        )
        if stage == "fit":
            self._tell_of_sizes()
        sides = [self.classifier.geometry.input_side]
        if self.image_sizes is not None:
            sides += self.image_sizes.sides
        self.classifier.check_sides(sides)

    def _needs_class_scores(self, data: Any, stage: str) -> bool:
        """Return whether the scores that weigh all classes alike are logged in a stage.

        In a fit they are if a callback waits for them, otherwise if the classes are unequal.
        """
        if stage == "fit":
            monitors = [
                getattr(callback, "monitor", None) for callback in callbacks_of(self.trainer)
            ]
            return any(figure in monitors for figure in CLASS_FIGURES)
        if self._always_scores_classes:
            return True
        if not isinstance(data, ImageDataModule):
            return False
        split: Split = "val" if stage == "validate" else "test"
        return data.has_unequal_classes(split)

    def score_classes(self) -> None:
        """Log balanced accuracy and macro F1 in evaluations also where classes are equal."""
        self._always_scores_classes = True

    def _reset_metrics(self) -> None:
        """Forget what an earlier fit or evaluation has counted.

        `Trainer.validate` leaves tensors of inference mode behind, which a fit cannot add to.
        """
        self._validation_scores = {}
        for module in self.children():
            if isinstance(module, Metric):
                module.reset()

    def _check_monitors(self) -> None:
        """Refuse callbacks of Lightning that wait for a figure that nobody logs.

        A callback or a subclass of the user's own may log any.
        """
        callbacks = callbacks_of(self.trainer)
        modules = [type(part).__module__ for part in (self, *callbacks)]
        if not all(module.startswith(("lightning.", "cifar_transfer.")) for module in modules):
            return
        for callback in callbacks:
            if not isinstance(callback, EarlyStopping | ModelCheckpoint):
                continue
            monitor = callback.monitor
            if monitor is None or monitor in MONITORS or monitor.startswith("lr"):
                continue
            raise UserError(
                f"{type(callback).__name__} monitors {monitor}, and there is no such figure: take "
                f"one of {', '.join(MONITORS)}."
            )

    def _data_module(self) -> Any:
        trainer = trainer_of(self)
        if trainer is None:
            return None
        return data_of(trainer)

    def _choose_statistics(self, data: Any) -> None:
        """Take the channel statistics of the data, unless the options name others."""
        name = getattr(data, "statistics", None)
        if self._statistics_are_chosen or name is None:
            return
        mean, std = statistics(name)
        geometry = self.classifier.geometry
        self.classifier.set_geometry(replace(geometry, mean=tuple(mean), std=tuple(std)))
        self._statistics_are_chosen = True

    def _load_teacher(self, path: str, data: Any) -> Teacher:
        class_names = self.hparams["class_names"] or getattr(data, "class_names", None)
        size = data.image_size if isinstance(data, ImageDataModule) else None
        return Teacher(path, self.classifier.num_classes, class_names, size)

    def _check_classes(self, data: Any, stage: str) -> None:
        """Refuse data of other classes; a fit without `class_names` takes those of the data."""
        takes_names = stage == "fit" and self.hparams["class_names"] is None
        if self.classifier.has_class_names and hasattr(data, "class_names") and not takes_names:
            check_classes(self.classifier.class_names, data.class_names)
        if data.num_classes != self.classifier.num_classes:
            raise UserError(
                f"The network has {self.classifier.num_classes} outputs, but the data have "
                f"{data.num_classes} classes: make it with num_classes={data.num_classes}."
            )
        if takes_names and hasattr(data, "class_names"):
            self.classifier.set_class_names(data.class_names)

    def _settle_size(
        self, size: Size, fit: Fit = "crop", grey_range: GreyRange | None = None
    ) -> None:
        """Record height and width in pixels to which images are decoded, and how."""
        height, width = size
        geometry = replace(
            self.classifier.geometry, size=(height, width), fit=fit, grey_range=grey_range
        )
        self.classifier.set_geometry(geometry)
        self._size_is_known = True

    def _tell_of_sizes(self) -> None:
        """Say what is done to the size of images, and where it differs from the weights'."""
        geometry = self.classifier.geometry
        if not self.trainer.ckpt_path:
            self._tell_of_other_images()
        side = self.largest_side or 0
        if min(geometry.size) < side:
            rank_zero_info(
                f"Images of {pixels(geometry.size)} are enlarged to {side} x {side} on the device."
            )

    def _tell_of_other_images(self) -> None:
        """Say how the images differ from those that the weights and the adaptation are for."""
        geometry = self.classifier.geometry
        if self.classifier.pretraining is not None:
            before = self.classifier.pretraining.geometry
            if before.input_size != geometry.input_size:
                rank_zero_info(
                    f"The weights come from images of {pixels(before.input_size)} pixels, and the "
                    f"network now sees {pixels(geometry.input_size)}: set --model.image_size if it "
                    f"should not."
                )
            if before.mean != geometry.mean or before.std != geometry.std:
                rank_zero_info(
                    "The weights come from images of other statistics: see --model.normalize."
                )
        is_assumed = geometry.input_side is None and max(geometry.size) != build.ASSUMED_SIDE
        assumption = f"{build.ASSUMED_SIDE} pixels"
        if is_assumed and any(assumption in change for change in self.classifier.changes):
            rank_zero_warn(
                f"The network was adapted to images of {assumption}, and these have "
                f"{pixels(geometry.size)}: set --model.image_size."
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what a checkpoint says of the images, and refuse changed options in a resume.

        Raises:
            UserError: A run that continues has other options or images than before; or the data to
                be evaluated are decoded to another size than those trained on.
        """
        description = NetworkDescription.from_checkpoint(checkpoint)
        if trainer_of(self) is None:
            self._take_description(description)
            return
        if is_temporary(self.trainer.ckpt_path):
            return  # the same network before the Tuner has tried options
        data = self._data_module()
        class_names = self.hparams["class_names"] or getattr(data, "class_names", None)
        if description.class_names and class_names:
            check_classes(description.class_names, class_names)
        if isinstance(data, ImageDataModule) and self.trainer.ckpt_path:
            record = splits.read(
                self.trainer.ckpt_path,
                checkpoint.get(RECORDED_RUN_KEY),
                is_needed=not (self.trainer.testing or self.trainer.predicting),
            )
            grey_range = description.geometry.grey_range
            data.continue_from(EarlierRun(record=record, grey_range=grey_range))
        if is_fitting(self):
            resume.check_checkpoint(self.trainer, self, data, checkpoint)
            self._check_teacher(checkpoint)
            self._resume_epoch(checkpoint)
        self._check_size(description)
        self._take_description(description)

    def _take_description(self, description: NetworkDescription) -> None:
        self.classifier.set_geometry(description.geometry)
        self._statistics_are_chosen = True
        self._size_is_known = True
        if not is_fitting(self):
            self.classifier.set_temperature(description.temperature)

    def _check_size(self, description: NetworkDescription) -> None:
        size = self.classifier.geometry.size
        if self._size_is_known and description.geometry.size != size:
            raise UserError(
                f"The checkpoint was trained on images decoded to "
                f"{pixels(description.geometry.size)} pixels, and the data give {pixels(size)}: "
                f"give the data the same decode_size."
            )

    def _check_teacher(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another file under the path of the teacher."""
        digest = checkpoint.get(TEACHER_KEY)
        if self.loss.teacher is None or digest is None or digest == self.loss.teacher.digest:
            return
        raise UserError(
            f"teacher={self.loss_options.teacher} is another file than the one with which the run "
            f"began: put that back to continue the run, or begin a new one from its weights with "
            f"--model.weights=CHECKPOINT."
        )

    def _resume_epoch(self, checkpoint: dict[str, Any]) -> None:
        """Take up the scores of an epoch that had not ended when the checkpoint was written."""
        epoch = checkpoint.get(EPOCH_KEY)
        if epoch is None:
            return
        self._validation_scores = epoch["val"]
        if not self.trainer.is_global_zero:
            return  # the first process counts for all
        for name, state in epoch["train"].items():
            metric = getattr(self, name)
            for key, value in state.items():
                setattr(metric, key, value.to(metric.device))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make one optimizer over all parameters, frozen or not.

        Groups that are added later would break resuming. The rates are those of the
        hyper-parameters, because Lightning's Tuner changes them there.
        """
        options = replace(
            self.optimizer_options, lr=self.hparams["lr"], head_lr=self.hparams["head_lr"]
        )
        return optimizer.configure(self.trainer, self.network, self.stages, options)

    def on_fit_start(self) -> None:
        """Bring the parts of the loss to the device."""
        data = self._data_module()
        if isinstance(data, ImageDataModule):
            self.loss.class_weights = data.loss_weights()
        self.loss.to(self.device, self.dtype)

    def on_train_start(self) -> None:
        """Compile the network, after `Report` has drawn its graph."""
        if not self.compile_network:
            return
        self.network.compile()  # in place, so that the names in its state dict stay
        if self.loss.teacher is not None:
            self.loss.teacher.classifier.network.compile()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch, and count it and its accuracy.

        The accuracy of mixed images is that of the label with the larger share.

        Args:
            batch: Images, float [B, 3, H, W] in [0, 1] or integers from 0 to 255, RGB, and labels,
                integers [B]; see `BatchReader`.
            batch_idx: Number of the batch in its epoch.

        Raises:
            UserError: Images or labels are others.
        """
        images, labels = self._batches.images_and_labels(batch, "training")
        if not self._size_is_known:
            self._settle_size((images.shape[2], images.shape[3]))
        self._check_last_batch()
        side = self.classifier.geometry.input_side
        if self.image_sizes is not None:
            side = self.image_sizes.side
        targets = labels
        if self.mixing is not None and self.mixing.is_active:
            images, targets = self.mixing(images, labels)
            labels = targets.argmax(1)  # of the larger share
        logits = self.classifier.logits_at(images, side)
        loss = self.loss(images, logits, targets)

        self.train_loss.update(loss.detach().expand(len(labels)))
        self.train_acc.update(logits.detach(), labels)
        if self._is_logging_step():
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/acc_step", (logits.argmax(1) == labels).float().mean())
            # For the progress bar and for callbacks; `on_train_epoch_end` logs them by epoch.
            self.log(
                "train/loss_epoch", self.train_loss, on_step=False, on_epoch=True, logger=False
            )
            self.log(
                "train/acc",
                self.train_acc,
                on_step=False,
                on_epoch=True,
                prog_bar=True,
                logger=False,
            )
        return loss

    def _check_last_batch(self) -> None:
        """Refuse a loader that ends in one image if batch-norm cannot train on it; once a fit.

        Loaders of this package leave such a batch out.
        """
        trainer = trainer_of(self)
        if self._last_batch_is_checked or trainer is None:
            return
        self._last_batch_is_checked = True
        if not ends_in_one_image(trainer.train_dataloader, trainer.num_training_batches):
            return
        side = self.classifier.geometry.input_side
        if self.image_sizes is not None:
            side = min(self.image_sizes.sides)
        if self.classifier.needs_several_images(side):
            raise UserError(
                "The last batch of the training loader has one image, on which batch-norm cannot "
                "train: give the DataLoader drop_last=True, or another batch_size."
            )

    def _is_logging_step(self) -> bool:
        """Return whether this step is logged.

        Each call of `log` takes up to a millisecond. The metrics count the steps in between. The
        last step of an epoch is always logged, so that each epoch has its figures.
        """
        trainer = trainer_of(self)
        if trainer is None:
            return False
        if trainer.is_last_batch:
            return True
        interval = log_interval(trainer)
        return bool(interval) and (trainer.global_step + 1) % interval == 0

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Add a batch to `val/loss` and `val/acc`; return its logits, float [B, C]."""
        images, labels = self._batches.images_and_labels(batch, "validation")
        logits = self(images)
        # The loss of each image, because Lightning's `sync_dist` weighs all processes alike.
        self.val_loss.update(F.cross_entropy(logits, labels).expand(len(labels)))
        self.val_acc.update(logits, labels)
        # In a fit, `on_train_epoch_end` logs them by epoch.
        by_itself = not is_fitting(self)
        self.log("val/loss", self.val_loss, prog_bar=True, logger=by_itself)
        self.log("val/acc", self.val_acc, prog_bar=True, logger=by_itself)
        if self._counts_classes:
            self.class_counts.update(logits, labels)
        return logits

    def on_validation_epoch_end(self) -> None:
        """Keep the scores of a validation during a fit, and log them by step."""
        self._log_class_scores("val")
        if not is_fitting(self) or self.trainer.sanity_checking:
            return
        metrics = self.trainer.callback_metrics
        self._validation_scores = {
            "val/acc": float(metrics["val/acc"]),
            "val/loss": float(metrics["val/loss"]),
        }
        if self._counts_classes:
            for name in CLASS_FIGURES:
                self._validation_scores[name] = float(metrics[name])
        by_step = {
            "val/acc_step": self._validation_scores["val/acc"],
            "val/loss_step": self._validation_scores["val/loss"],
            "epoch": self.current_epoch,
        }
        last_step = max(self.global_step - 1, 0)  # from 0; a validation may precede the first one
        self._log_scores(by_step, chart_step=last_step)

    def _log_scores(self, figures: dict[str, float], chart_step: int) -> None:
        """Log figures, at `chart_step` where each figure may have a count of steps of its own.

        All others have one count of steps, which never falls: that of Lightning, `global_step`.
        """
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger | MetricsLogger):
                logger.log_metrics(figures, step=chart_step)
            else:
                logger.log_metrics({**figures, "epoch": self.current_epoch}, step=self.global_step)

    def _log_class_scores(self, split: str) -> None:
        """Log the scores that weigh all classes alike, if they are needed, see `setup`."""
        if not self._counts_classes:
            return
        by_itself = not is_fitting(self)  # in a fit, `on_train_epoch_end` logs them by epoch
        scores = class_scores(self.class_counts.compute())
        self.class_counts.reset()
        for name, score in scores.items():
            # All processes have the same score; `sync_dist` keeps Lightning from asking for it.
            self.log(f"{split}/{name}", score, logger=by_itself, sync_dist=True)

    def epoch_scores(self) -> dict[str, float]:
        """Return the scores of the epoch that ends; all processes must call it together.

        Returns:
            `train/acc` (share of 1) and `train/loss_epoch` over all steps of the epoch, also those
            before the run was resumed; `val/acc` and `val/loss` of its last validation, if any,
            and `CLASS_FIGURES` where a callback waits for one.
        """
        scores = {}
        if self.train_acc.update_called:
            scores["train/acc"] = float(self.train_acc.compute())
        if self.train_loss.update_called:
            scores["train/loss_epoch"] = float(self.train_loss.compute())
        return scores | self._validation_scores

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first parameter group, without the factor of `layer_decay`."""
        group = self.trainer.optimizers[0].param_groups[0]
        return float(group["lr"]) / group.get("lr_scale", 1.0)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's figures by epoch, then step `ReduceLROnPlateau` with `val/loss`."""
        figures = self.epoch_scores()
        figures[LEARNING_RATE_FIGURE] = self.learning_rate
        rates = optimizer.stage_learning_rates(self.trainer.optimizers, self.network, self.stages)
        for stage, rate in rates.items():
            figures[f"{STAGE_RATE_PREFIX}{stage}"] = rate
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        figures[TRAINABLE_FIGURE] = float(trainable)
        figures[STEPS_FIGURE] = float(self.global_step)
        self._log_scores(figures, chart_step=counted(self.current_epoch))
        for logger in self.loggers:
            logger.save()
        if not self.trainer.is_last_batch:
            return  # `max_steps` or `max_time` ended the run within the epoch; a resume ends it
        scheduler = self.lr_schedulers()
        if self._validation_scores and isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(self._validation_scores["val/loss"])
        self._validation_scores = {}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedules "linear" and "cosine", once for each optimizer step.

        Lightning would step a plateau after `last.ckpt` is written, and a resumed run would miss
        that step. So `ReduceLROnPlateau` is stepped in `on_train_epoch_end`.
        """
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what prediction needs to know of the network, and what a resume needs."""
        checkpoint[VERSION_KEY] = __version__
        checkpoint[NETWORK_KEY] = self.classifier.description.to_primitives()
        recorded_run = getattr(self._data_module(), "recorded_run", None)
        if recorded_run is not None:
            checkpoint[RECORDED_RUN_KEY] = recorded_run
        if self.weight_average is not None:
            self.weight_average.add_to_checkpoint(checkpoint)
        if not is_fitting(self):
            return
        if self.loss.teacher is not None:
            checkpoint[TEACHER_KEY] = self.loss.teacher.digest
        train_states = {}
        if not self.trainer.is_last_batch:
            train_states["train_acc"] = _state_over_processes(self.train_acc)
            train_states["train_loss"] = _state_over_processes(self.train_loss)
        if train_states or self._validation_scores:
            checkpoint[EPOCH_KEY] = {"train": train_states, "val": self._validation_scores}

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Add a batch to `test/loss` and `test/acc`; return its logits, float [B, C]."""
        images, labels = self._batches.images_and_labels(batch, "test")
        logits = self(images)
        self.test_loss.update(F.cross_entropy(logits, labels).expand(len(labels)))
        self.test_acc.update(logits, labels)
        self.log("test/loss", self.test_loss, prog_bar=True)
        self.log("test/acc", self.test_acc, prog_bar=True)
        if self._counts_classes:
            self.class_counts.update(logits, labels)
        return logits

    def on_test_epoch_end(self) -> None:
        """Log the scores that weigh all classes alike, if the classes are unequal."""
        self._log_class_scores("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return probabilities of a batch, float [B, C]; it needs no labels."""
        images = self._batches.images(batch, "prediction")
        return (self(images) / self.classifier.temperature).softmax(dim=1)

    def side_at(self, done: int, total: int) -> int | None:
        """Return the side in pixels of training images after `done` of `total` parts of the run."""
        if self.image_sizes is None:
            return self.classifier.geometry.input_side
        return self.image_sizes.side_at(done, total)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Any, **options: Any
    ) -> "TransferClassifier":
        """Load a checkpoint like Lightning does, but fetch no pretrained weights.

        The checkpoint holds all weights.

        Raises:
            UserError: The checkpoint is missing, damaged, or not one of this class, or its weights
                are not those of the described network.
        """
        description = NetworkDescription.from_checkpoint(read_checkpoint(checkpoint_path))
        try:
            with built_from(description):
                return super().load_from_checkpoint(checkpoint_path, weights_only=True, **options)
        except RuntimeError as error:  # of `load_state_dict`
            raise UserError(
                f"{checkpoint_path} does not hold the network that it says it does "
                f"({first_line(error)})."
            ) from error


def class_scores(counts: Tensor) -> dict[str, Tensor]:
    """Return mean recall and mean F1 of the classes that have images.

    The macro averages of torchmetrics count a class without images as 0 once it is predicted.

    Args:
        counts: True positives, false positives, true negatives, false negatives and images of each
            class, int64 [C, 5].

    Returns:
        `balanced_accuracy` and `macro_f1`, scalars in [0, 1].
    """
    true_positives, false_positives, _, _, images = counts.T
    recall = true_positives / images
    f1 = 2 * true_positives / (images + true_positives + false_positives)
    return {
        "balanced_accuracy": mean_of_classes(recall, images),
        "macro_f1": mean_of_classes(f1, images),
    }


def _are_sides(sides: Any) -> bool:
    return len(sides) > 0 and min(sides) >= 1 and max(sides) <= LARGEST_SIDE


def _state_over_processes(metric: Any) -> dict[str, Tensor]:
    """Return what a metric has counted so far, summed over all processes."""
    with metric.sync_context():
        return {key: value.clone() for key, value in metric.metric_state.items()}
