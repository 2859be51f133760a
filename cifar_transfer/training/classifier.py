"""The network with its new head, its loss, optimizer and schedule."""

from typing import Any, Literal

import torch.nn.functional as F
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from cifar_transfer import __version__
from cifar_transfer.base.errors import UserError, check
from cifar_transfer.data.classes import check_classes
from cifar_transfer.data.geometry import LARGEST_SIDE, pixels
from cifar_transfer.data.images import Batch
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.network.image_classifier import MOST_CLASSES
from cifar_transfer.network.stages import stages
from cifar_transfer.results.publish import STAGES
from cifar_transfer.training import optimizer, resume
from cifar_transfer.training.checkpoint_file import VERSION_KEY
from cifar_transfer.training.ema import AveragedModule
from cifar_transfer.training.optimizer import OptimizerName, OptimizerOptions, ScheduleName
from cifar_transfer.training.teacher import Teacher


class TransferClassifier(AveragedModule):
    """A pretrained network with a new head, fine-tuned with cross-entropy, Adam and `ReduceLROnPlateau` or others.

    `network` is the library's plain network; `heads` names its layers that tell the classes apart, mostly one; all the
    rest is the backbone; `changes` says what was adapted to small images, in sentences. Which part trains when is up to
    `BackboneFreeze`.

    Args:
        backbone: Name of a torchvision classification network, "timm/NAME" for one of timm's, or "lenet5". The list:
            `python -m cifar_transfer backbones`.
        weights: The library's name for the weights, "DEFAULT", "none", or a file: a state dict (.pth, .safetensors), a
            published checkpoint, or a checkpoint of this class.
        num_classes: Outputs of the head; None takes as many as there are `class_names`, or 10.
        class_names: What the outputs stand for; kept in checkpoints for prediction.
        image_size: Side in pixels of the square that the network takes. Larger images are decoded to it, smaller ones
            are enlarged on the device (bilinear), and of rectangles the centre square is taken. "native" is what the
            weights were trained with (a state dict does not say: then the library's default weights); None takes
            images as they are, and makes networks for one size (ViT) for 32.
        train_sizes: Sides that the images of training have in equal parts of the run, say [32, 48] for half of
            the steps each; None trains at `image_size` throughout.
        normalize: Channel statistics in [0, 1]: "cifar10", "imagenet", "weights" for those that the weights were
            trained with (found as for `image_size`), or [[mean, mean, mean], [deviation, ...]]. None takes "cifar10"
            for CIFAR-10 and drawn shapes, and for other images "weights", or "imagenet" where these say nothing.
        small_images: Adapt the network to small images, keeping its weights: a stem of stride 1, smaller patches and
            windows, no pooling that only repeats. `python -m cifar_transfer backbones --detail NAME` says what.
        patch_size: Side of a transformer's patches in pixels; None leaves it to the network and `small_images`.
        aux_weight: Weight of the auxiliary heads' losses in GoogLeNet (0.3 in its paper) and Inception v3 (0.4 in
            torchvision's tutorial); 0 drops these heads.
        label_smoothing: Share of each label that is spread over all classes while training, in [0, 1).
        teacher: A checkpoint of `fit` or `probe` whose network teaches this one (Hinton et al. 2015,
            https://arxiv.org/abs/1503.02531): the training loss becomes (1 - teacher_weight) times what it is
            without, plus teacher_weight * temperature² * KL(teacher || student). Only training needs the file.
        teacher_weight: In [0, 1]: 1 learns from the teacher alone.
        temperature: What the logits of both are divided by in that divergence (4 as in Tian et al. 2020,
            https://arxiv.org/abs/1910.10699).
        optimizer: "adam", "adamw" or "sgd" (with Nesterov's momentum).
        lr: Learning rate, until the unfreezing or the schedule changes it.
        head_lr: Learning rate of the heads, also after the unfreezing; None: they have the backbone's.
        layer_decay: Each stage of the backbone learns at this share of the rate of the stage above it (ELECTRA,
            https://arxiv.org/abs/2003.10555; the head at the whole rate); None: all at the same.
        weight_decay: Adam's L2 penalty, as SGD's; with "adamw" decoupled.
        momentum: Of "sgd".
        schedule: "plateau" lowers the rate when `val/loss` no longer falls; "linear" and "cosine" take it from step to
            step up to its value and down to zero at the end of the run.
        warmup_epochs: Epochs, also parts of one, on the way up; not for "plateau".
        lr_factor: What "plateau" multiplies the learning rate with.
        lr_patience: Epochs without a lower `val/loss` that "plateau" lets pass.
        ema: Decay of an exponential moving average of the weights, in [0, 1), say 0.999, warmed up as in timm. It is
            validated, tested and in checkpoints; training goes on from the raw weights. None: no average.
        compile: Run the network through `torch.compile` (inductor); the first steps take a minute longer. Checkpoints
            stay the same.

    Raises:
        UserError: Unknown names, unfit weights or contradicting class counts.

    Example::

        model = TransferClassifier("resnet18", num_classes=10)
        logits = model(torch.rand(8, 3, 32, 32))  # float32 [8, 10]
    """

    _class_weights: Tensor | None = None  # in the loss, float32 [num_classes]
    _teacher: Teacher | None = None

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
        aux_weight: float = 0.0,
        label_smoothing: float = 0.0,
        teacher: str | None = None,
        teacher_weight: float = 0.5,
        temperature: float = 4.0,
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
        num_classes = len(class_names or range(10)) if num_classes is None else num_classes
        check(
            "num_classes", num_classes, lambda n: 2 <= n <= MOST_CLASSES, f"2 to {MOST_CLASSES:,}"
        )
        super().__init__(num_classes)
        if class_names and len(class_names) != num_classes:
            raise UserError(
                f"num_classes is {num_classes}, but the data have {len(class_names)} classes "
                f"({', '.join(class_names[:4])}, ...): leave num_classes out."
            )
        self.save_hyperparameters()
        self.hparams["num_classes"] = num_classes
        self._check()
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
        self.build_network(self.hparams)
        self.stages = stages(self.network, self.heads)

    def _check(self) -> None:
        most = f"1 to {LARGEST_SIDE} pixels"
        for name, fits, wanted in (
            (
                "train_sizes",
                lambda ns: ns is None or (ns and 1 <= min(ns) <= max(ns) <= LARGEST_SIDE),
                most,
            ),
            ("label_smoothing", lambda x: 0 <= x < 1, "a share in [0, 1)"),
            ("teacher_weight", lambda x: 0 <= x <= 1, "a share in [0, 1]"),
            ("temperature", lambda x: 0.01 <= x <= 1000, "0.01 to 1000"),
            ("ema", lambda x: x is None or 0 <= x < 1, "a decay in [0, 1), or null"),
        ):
            check(name, self.hparams[name], fits, wanted)

    def setup(self, stage: str) -> None:
        """Check that data and network fit, before anything is trained, and say how the network was adapted."""
        if stage == "fit" and self.changes:
            rank_zero_info(f"{self.hparams['backbone']} adapted: {'; '.join(self.changes)}.")
        data = getattr(self.trainer, "datamodule", None)
        self.settle_statistics(data)
        if isinstance(data, ImageDataModule):
            self.unequal = stage != "fit" and data.unequal("val" if stage == "validate" else "test")
        if stage == "fit" and (path := self.hparams["teacher"]):
            names = self.hparams["class_names"] or getattr(data, "class_names", None)
            size = data.image_size if isinstance(data, ImageDataModule) else None
            self._teacher = Teacher(path, self.hparams["num_classes"], names, size)
        if data is None or not hasattr(data, "num_classes"):  # or it is of somebody else
            return
        if (names := self.hparams["class_names"]) and hasattr(data, "class_names"):
            check_classes(names, data.class_names)
        if data.num_classes != self.hparams["num_classes"]:
            raise UserError(
                f"The network has {self.hparams['num_classes']} outputs, but the data have {data.num_classes} classes: "
                f"make it with num_classes={data.num_classes}."
            )
        self.settle_size(data.image_size)
        if stage == "fit" and not self.trainer.ckpt_path:
            self.tell_unlike()
        if stage == "fit" and min(self.geometry.size) < (self.largest_side or 0):
            side = self.largest_side
            rank_zero_info(
                f"Images of {pixels(self.geometry.size)} are enlarged to {side} x {side} on the device."
            )
        self.try_sizes()

    def on_train_start(self) -> None:
        """Compile the network, now that its graph is drawn."""
        if self.hparams["compile"]:
            self.network.compile()  # in place, so that the names in its state dict stay
            if self._teacher:
                self._teacher.network.compile()

    def on_fit_start(self) -> None:
        """Take the weights of the classes in the loss, and have the teacher where the network is."""
        super().on_fit_start()
        if self._teacher:
            self._teacher.network.to(self.device, self.dtype)  # type: ignore[arg-type] # a dtype
        data = getattr(self.trainer, "datamodule", None)
        weights = data.loss_weights() if isinstance(data, ImageDataModule) else None
        self._class_weights = None if weights is None else weights.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of a batch, with that of the auxiliary heads if they train.

        Each image's, smoothed or not, counts with the weight of its class if the data module weighs classes. A teacher
        speaks of all images alike, and to the main head.
        """
        images, labels = batch
        if not self.sized:  # no data module has said it
            self.settle_size((images.shape[2], images.shape[3]))
        logits, *auxiliary = self.all_logits(images, self.train_side())
        loss = self._loss(logits, labels, self.hparams["label_smoothing"])
        for other in auxiliary:
            loss = loss + self.hparams["aux_weight"] * self._loss(other, labels)
        if self._teacher:
            told = self._teacher.loss(images, logits, self.hparams["temperature"])
            loss = loss.lerp(told, self.hparams["teacher_weight"])
        self.count(loss, logits, labels)
        return loss

    def _loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        if self._class_weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        # torch's own weights divide by their sum in the batch: means of processes would not be that of the joint batch.
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        return (losses * self._class_weights[labels]).mean()

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities of a batch, float [B, num_classes]."""
        return self(batch[0]).softmax(dim=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over all parameters, frozen or not: groups added later would break resuming."""
        return optimizer.configure(self.trainer, self.network, self.stages, self.optimizer_options)

    def rates(self) -> dict[str, float]:
        """The learning rate, and that of each stage: 0 while it is frozen."""
        stages = optimizer.stage_learning_rates(self.trainer.optimizers, self.network, self.stages)
        return super().rates() | {f"{STAGES}{stage}": rate for stage, rate in stages.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what prediction needs to know of the images, and whose options these are."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[VERSION_KEY] = __version__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse settings that the checkpoint's optimizer and schedule would silently undo."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is None:
            return
        saved = checkpoint.get("hyper_parameters", {})
        data = getattr(self.trainer, "datamodule", None)
        own = self.hparams["class_names"] or getattr(data, "class_names", None)
        if saved.get("class_names") and own:
            check_classes(saved["class_names"], own)
        options = checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY)
        if isinstance(data, ImageDataModule) and options and self.trainer.ckpt_path:
            data.continue_run(self.trainer.ckpt_path, options)
        if self._trainer.state.fn != TrainerFn.FITTING:
            return
        for change in resume.compare_checkpoint(self.trainer, self, data, checkpoint):
            rank_zero_info(change)
        if isinstance(
            data, ImageDataModule
        ):  # Lightning has no effect on a loader that its count of steps has made
            data.resumed = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        mine, given = self.state_dict(), checkpoint["state_dict"]
        if other := [key for key in mine if key in given and mine[key].shape != given[key].shape]:
            raise UserError(
                f"With image_size={self.hparams['image_size']} {self.hparams['backbone']} has another form than in the "
                f"checkpoint ({other[0]}): leave it out to continue that run, or begin a new one from its weights with "
                f"--model.weights=CHECKPOINT."
            )
        self.take_up_average(checkpoint)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **options: Any) -> "TransferClassifier":  # type: ignore[override]
        """As Lightning's, but never fetches pretrained weights: the checkpoint holds them all."""
        options.setdefault("weights", "none")
        options.setdefault("weights_only", True)
        return super().load_from_checkpoint(checkpoint_path, **options)
