"""Accuracy and loss of a network: counted batch by batch, logged by epoch, and kept when an epoch is interrupted."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from cifar_transfer.base.console import counted
from cifar_transfer.data.images import Batch
from cifar_transfer.results.publish import STEPS

EPOCH_SCORES: tuple[str, ...] = ("train/acc", "train/loss_epoch", "val/acc", "val/loss")
EPOCH_KEY = "epoch_so_far"  # in checkpoints that are written before the epoch is over
COUNTED = ("train_acc", "train_loss")


class ByClass(Metric):
    """Mean recall (balanced accuracy) or F1 of the classes that have images, in [0, 1].

    torchmetrics' macro averages count a class without images as 0 once it is predicted.
    """

    def __init__(self, num_classes: int, f1: bool) -> None:
        super().__init__()
        self.f1 = f1
        self.counts: (
            Tensor  # of the images of each class, of those taken for it, and of those that are both
        )
        self.add_state(
            "counts", torch.zeros(3, num_classes, dtype=torch.long), dist_reduce_fx="sum"
        )

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count logits [B, num_classes] and labels [B]."""
        guesses = logits.argmax(1)
        for count, found in zip(
            self.counts, (labels, guesses, labels[guesses == labels]), strict=True
        ):
            count += torch.bincount(found, minlength=len(count))

    def compute(self) -> Tensor:
        """The mean."""
        true, said, both = self.counts
        return (2 * both / (true + said) if self.f1 else both / true)[true > 0].mean()


class ScoredModule(LightningModule):
    """A classifier that scores itself; a subclass gives logits when called, and has `count` see each step.

    Attributes:
        mirrored: Whether evaluation also gives the accuracy of an image and its mirror image together.
        unequal: Whether it also gives `balanced_accuracy` and `macro_f1`.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # Their checks would make every step wait for the device. Without them a mean ignores weights, so each image's
        # loss is given (torchmetrics 1.9, `_cast_and_nan_check_input`).
        self.train_loss, self.eval_loss = (MeanMetric(nan_strategy="disable") for _ in range(2))
        self.train_acc, self.val_acc, self.test_acc, self.mirrored_acc = (
            MulticlassAccuracy(num_classes, average="micro", validate_args=False) for _ in range(4)
        )
        self.by_class = nn.ModuleDict(
            {
                "balanced_accuracy": ByClass(num_classes, f1=False),
                "macro_f1": ByClass(num_classes, f1=True),
            }
        )
        self.mirrored = self.unequal = False
        self._val_scores: dict[str, float] = {}  # of the last validation of this epoch

    @property
    def learning_rate(self) -> float:
        """That of the first parameter group, without the share that `layer_decay` leaves it."""
        group = self.trainer.optimizers[0].param_groups[0]
        return float(group["lr"]) / group.get("lr_scale", 1.0)

    def rates(self) -> dict[str, float]:
        """The learning rate, and what else a subclass logs with it by epoch."""
        return {"lr": self.learning_rate}

    def epoch_scores(self) -> dict[str, float]:
        """Scores of the epoch that ends; all processes must call it together.

        Returns:
            `train/acc` (share of 1) and `train/loss_epoch` over all steps of the epoch, also those before the run was
            resumed; `val/acc` and `val/loss` of its last validation, only if it has validated.
        """
        metrics = {"train/acc": self.train_acc, "train/loss_epoch": self.train_loss}
        scores = {
            name: float(metric.compute())
            for name, metric in metrics.items()
            if metric.update_called
        }
        return scores | self._val_scores

    def count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a step of training: its mean loss, logits [B, num_classes] and labels [B]."""
        self.train_loss.update(loss.detach().expand(len(labels)))
        self.train_acc.update(logits.detach(), labels)
        if self._trainer is None:  # called by hand
            return
        # Each call costs Lightning up to a millisecond. What it is not told between two lines of the log is not lost,
        # because the metrics have counted it.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined] # set by one of its connectors
        if self.trainer.is_last_batch or (every and (self.trainer.global_step + 1) % every == 0):
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/acc_step", (logits.argmax(1) == labels).float().mean())
            self.log(
                "train/loss_epoch", self.train_loss, on_step=False, on_epoch=True, logger=False
            )
            self.log(
                "train/acc",
                self.train_acc,
                on_step=False,
                on_epoch=True,
                logger=False,
                prog_bar=True,
            )

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add a batch to `val/loss` and `val/acc`; its logits are for callbacks."""
        return self._evaluate(batch, "val", self.val_acc, logger=False)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add a batch to `test/loss` and `test/acc`; its logits are for callbacks."""
        return self._evaluate(batch, "test", self.test_acc, logger=True)

    def _evaluate(
        self, batch: Batch, split: str, accuracy: MulticlassAccuracy, logger: bool
    ) -> Tensor:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        # Not by Lightning's `sync_dist`, which divides by the processes' mean of images as a whole number.
        self.eval_loss.update(loss.expand(len(labels)))
        self.log(f"{split}/loss", self.eval_loss, prog_bar=True, logger=logger)
        self.log(f"{split}/acc", accuracy, prog_bar=True, logger=logger)
        for name, score in self.by_class.items() if self.unequal else ():
            score.update(logits, labels)  # type: ignore[operator] # a metric
            self.log(f"{split}/{name}", score, logger=logger)  # type: ignore[arg-type]
        if self.mirrored:
            self.mirrored_acc.update(logits.softmax(1) + self(images.flip(3)).softmax(1), labels)
            self.log(f"{split}/mirrored_acc", self.mirrored_acc, logger=logger)
        return logits

    def on_validation_epoch_end(self) -> None:
        """Keep the scores of a validation within the training, and log them against the step."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            metrics = self.trainer.callback_metrics
            self._val_scores = {name: float(metrics[name]) for name in ("val/acc", "val/loss")}
            by_step = {f"{name}_step": score for name, score in self._val_scores.items()}
            for logger in self.loggers:
                logger.log_metrics(
                    by_step | {"epoch": self.current_epoch}, step=self.global_step - 1
                )

    def on_train_epoch_end(self) -> None:
        """Log the epoch's scores against the epoch, and show the plateau schedule the validation loss."""
        scores = self.epoch_scores() | self.rates()
        scores["trainable_parameters"] = float(
            sum(p.numel() for p in self.parameters() if p.requires_grad)
        )
        scores[STEPS] = float(self.global_step)
        for logger in self.loggers:
            logger.log_metrics(scores, step=counted(self.current_epoch))
            logger.save()
        if (
            not self.trainer.is_last_batch
        ):  # max_steps or max_time ended the run here; resumed, it ends the epoch
            return
        scheduler = self.lr_schedulers()
        if self._val_scores and isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(self._val_scores["val/loss"])
        self._val_scores = {}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule of steps; the plateau steps in `on_train_epoch_end`.

        Lightning calls this for it after the checkpoint is written, which would then lack the step.
        """
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an epoch that is not over has counted, summed over all processes."""
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            return
        states: dict[str, dict[str, Tensor]] = {}
        for name in COUNTED if not self.trainer.is_last_batch else ():
            metric = getattr(self, name)
            with metric.sync_context():
                states[name] = {key: value.clone() for key, value in metric.metric_state.items()}
        if states or self._val_scores:
            checkpoint[EPOCH_KEY] = {"train": states, "val": self._val_scores}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the epoch where a fit that is resumed had stopped."""
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        saved = checkpoint.get(EPOCH_KEY, {"train": {}, "val": {}})
        self._val_scores = saved["val"]
        for name in (
            saved["train"] if self.trainer.is_global_zero else ()
        ):  # it has the sum over all processes
            metric = getattr(self, name)
            for key in metric.metric_state:
                setattr(metric, key, saved["train"][name][key].to(metric.device))
