"""`BackboneFreeze`: what trains when, and at which rate.

Why not Lightning's `BaseFinetuning`. It thaws parameters that `DistributedDataParallel` was not told of when it wrapped
the model, so their gradients are never averaged and the ranks drift apart without a word (pytorch-lightning #20340); it
stays frozen when resumed after the unfreezing (#21901); and frozen batch-norm keeps learning (#21531). Here

* the optimizer is made while everything is trainable, so that it has all parameters; then only `requires_grad` changes;
* under DDP the model is wrapped anew when a phase begins, so that each sends gradients of what trains, in plain DDP
  without `find_unused_parameters` and its search of the graph in every step;
* the phase is in the checkpoint, and one idempotent function puts the model into it.
"""

import math
import os
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from cifar_transfer.base.console import say, styled
from cifar_transfer.base.errors import UserError, check
from cifar_transfer.features import heads
from cifar_transfer.training import lightning_internals, resume, schedule
from cifar_transfer.training import phases as plans
from cifar_transfer.training.phases import Phase


class BackboneFreeze(Callback):
    """Keep parameters frozen for the first epochs, then unfreeze them at another learning rate, in two or more phases.

    Parameters that the module itself has fixed stay fixed, and after the fit the others train as before it.

    Args:
        unfreeze_epoch: How many epochs the parameters stay frozen. 0 never freezes and leaves the learning rate
            alone; with all epochs of the run only the head is ever trained (a linear probe).
        unfrozen_lr: Learning rate from then on of all parameter groups but one named "head"; None leaves it as it is. A
            `ReduceLROnPlateau` starts afresh, because losses of the frozen phase do not compare with later ones; a
            schedule of steps keeps its curve, which now leads up to this rate.
        frozen: Regular expressions; parameters whose name one of them matches from the start are frozen, for example
            `network\\.(conv1|bn1|layer[12])\\.`. None freezes all but the heads, which the module names in
            `heads` (submodules of its `network`, or its own).
        batch_norm: "eval" keeps frozen modules in eval mode, so that batch-norm uses and keeps the pretrained
            statistics and dropout is off; "train" lets the statistics follow the new data.
        phases: In place of `unfreeze_epoch` and `frozen`, a list of phases; or "gradual", which unfreezes a stage an
            epoch, from the head down, at `unfrozen_lr` (ULMFiT, https://arxiv.org/abs/1801.06146). What is in no phase
            stays frozen.
        probe: In place of the frozen epochs, begin with the head that logistic regression on the backbone's features
            gives (Kumar et al. 2022, https://arxiv.org/abs/2202.10054), and with all unfrozen at `unfrozen_lr`, or if
            `unfreeze_epoch` is 0 at the rate as it is; for a `TransferClassifier` and data modules of this package.
        monitor: The figure that a phase's `patience` looks at, logged in validation.
        mode: Whether its best is the lowest or the highest.

    Raises:
        UserError: A pattern that matches nothing, a strategy that shards parameters, a schedule that would undo a rate,
            or options that a resumed checkpoint would silently undo.

    Example::

        class Mine(LightningModule):
            def __init__(self):
                super().__init__()
                self.backbone = models.resnet18(num_classes=64)  # with weights="DEFAULT" and without its own head
                self.head = nn.Linear(64, 10)

            def training_step(self, batch, batch_idx):
                images, labels = batch
                return F.cross_entropy(self.head(self.backbone(images)), labels)

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), lr=1e-3)

        freeze = BackboneFreeze(unfreeze_epoch=1, unfrozen_lr=1e-4, frozen=["backbone"])
        Trainer(max_epochs=2, callbacks=[freeze]).fit(Mine(), ShapesDataModule(train_images=100))
    """

    def __init__(
        self,
        unfreeze_epoch: int = 5,
        unfrozen_lr: float | None = 1e-4,
        frozen: list[str] | None = None,
        batch_norm: Literal["eval", "train"] = "eval",
        phases: list[Phase] | Literal["gradual"] | None = None,
        probe: bool = False,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        check(
            "unfreeze_epoch", unfreeze_epoch, lambda n: n >= 0, "0 (never frozen) or a later epoch"
        )
        check(
            "unfrozen_lr",
            unfrozen_lr,
            lambda x: x is None or 0 < x <= schedule.MAX_LEARNING_RATE,
            plans.RATE,
        )
        plans.check_patterns("frozen", frozen or ())
        if frozen == []:
            raise UserError(
                "frozen is []: name what is to be frozen, or freeze nothing with unfreeze_epoch=0."
            )
        if phases is not None and (frozen or not phases):
            raise UserError(
                "phases name what trains: give one or more, and no frozen; or leave phases out."
            )
        if isinstance(phases, list):
            plans.check_begins(phases)
        self.unfreeze_epoch, self.unfrozen_lr = unfreeze_epoch, unfrozen_lr
        self.frozen, self.batch_norm = frozen, batch_norm
        if probe and (phases or frozen):
            raise UserError(
                "probe=true is in place of the frozen epochs: leave out phases and frozen."
            )
        self.phases, self.probe, self.monitor, self.mode = phases, probe, monitor, mode
        self._forget()

    def _forget(self) -> None:
        self.phase = 0  # its number
        self.plan: list[Phase] = []  # known when a fit starts, as it depends on the network
        self._untold: list[Phase] = []  # that have begun
        self._begins: dict[
            str, int
        ] = {}  # in which phase parameters and buffers begin to train, by name
        self._held: list[
            tuple[nn.Parameter, int]
        ] = []  # the same of the parameters that the module has not fixed
        self._resting: set[nn.Module] = (
            set()
        )  # modules that are in eval mode because of this callback
        self._best, self._bad = math.inf, 0  # the figure in this phase, and the epochs since then
        self._figure: float | None = None  # of this epoch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew, for the same object may serve several fits; refuse a strategy before it shards the parameters."""
        if stage != "fit":
            return
        self._forget()
        if sum(isinstance(callback, BackboneFreeze) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise UserError(
                "The Trainer has several BackboneFreeze callbacks: give one of them phases."
            )
        if self.freezes and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UserError(
                f"BackboneFreeze works on one device and under DDP, not under {type(trainer.strategy).__name__}, which "
                f"shards parameters when it wraps the model and cannot unfreeze some later: use strategy=ddp."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze, now that the optimizer has everything that trains at some time."""
        stages = plans.own_stages(pl_module)
        self.plan = plans.planned(
            pl_module, stages, self.phases or self.frozen, self.unfreeze_epoch, self.unfrozen_lr
        )
        if self.probe:
            self.plan[1:] = [replace(phase, epoch=0) for phase in self.plan[1:]]
            if not (trainer.ckpt_path or trainer.fast_dev_run):  # type: ignore[attr-defined]
                heads.begin_with_logistic(trainer, pl_module)
        self._begins = plans.begins(pl_module, [phase.train for phase in self.plan], stages)
        first: dict[nn.Parameter, int] = {}
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                first[parameter] = self._begins[name]
        if 0 not in first.values():
            raise UserError(
                f"{f'frozen={self.frozen}' if self.frozen else 'The first phase'} freezes every parameter, also the "
                f"head's, so nothing would train: name fewer."
            )
        self._held = list(first.items())
        plans.check_order(self.plan)
        if len(self.plan) > 1:
            schedule.check_optimizers(trainer)
        for phase in self.plan:
            if phase.lr is not None:
                schedule.check_learning_rate(trainer, phase.lr)
        if any(phase.from_best for phase in self.plan) and not _best_kept(trainer):
            raise UserError(
                "from_best needs a ModelCheckpoint that monitors a figure among the Trainer's callbacks."
            )
        self._require_grad(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the state, which may come from a checkpoint: a run resumed within an epoch skips its start."""
        self._apply(trainer, pl_module)
        self._untold = self._untold or [self.plan[self.phase]]
        optimized = [
            p for each in trainer.optimizers for group in each.param_groups for p in group["params"]
        ]
        ours = [parameter for parameter, _ in self._held]
        for said in plans.never_train(pl_module, self._begins, len(self.plan), ours, optimized):
            rank_zero_info(said)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a phase when its epoch has come."""
        self._apply(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Name the phase that has begun; now, so that it stands in the table of epochs."""
        if begun := self._untold:
            epochs = plans.span(
                self.plan[self.phase + 1 :], trainer.current_epoch, trainer.max_epochs
            )
            what = plans.named(begun, begun[0] is self.plan[0])
            count = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            say(trainer, styled(f"{epochs}: {what}, {count:,} parameters train.", 36))
            self._untold = []

    def phase_at(self, epoch: int, max_epochs: int) -> int | None:
        """The phase of an epoch to come, counted from 0; None if that depends on a figure."""
        for number, later in enumerate(self.plan[self.phase + 1 :], self.phase):
            begin = later.epoch
            if begin is None or epoch < begin:
                return begin and number
        return len(self.plan) - 1

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.phase
        for number, phase in enumerate(self.plan[before + 1 :], before + 1):
            epoch = phase.epoch
            waited = number == before + 1 and self._bad >= (phase.patience or math.inf)
            if waited if epoch is None else trainer.current_epoch >= epoch:
                self.phase = number
        self._require_grad(trainer, pl_module)
        self._set_modes(pl_module)
        if begun := self.plan[before + 1 : self.phase + 1]:
            self._best, self._bad = math.inf, 0
            schedule.start_afresh(trainer)
            for phase in begun:
                if phase.lr is not None:
                    schedule.set_learning_rate(trainer, phase.lr)
            self._untold = begun
            if any(phase.from_best for phase in begun):
                _load_best(trainer, pl_module)

    def _require_grad(self, trainer: Trainer, pl_module: LightningModule) -> None:
        changed = False
        for parameter, first in self._held:
            trains = first <= self.phase
            changed |= parameter.requires_grad != trains
            parameter.requires_grad_(trains)
        if changed:
            lightning_internals.wrap_again(trainer, pl_module)

    def _set_modes(self, pl_module: LightningModule) -> None:
        if self.batch_norm == "train":
            return
        frozen = plans.resting(pl_module, self._begins, self.phase)
        self._resting |= {
            module for module in frozen if module.training
        }  # and not those that their author has in eval
        for module in self._resting:
            module.training = module not in frozen
        self._resting &= frozen

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the figure that phases wait for; all processes take that of the first."""
        if trainer.sanity_checking or not any(phase.patience for phase in self.plan):
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(trainer.callback_metrics)
            raise UserError(
                f"monitor={self.monitor} is not logged in validation, which a phase waits for: {logged}."
            )
        self._figure = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the epochs without a better figure."""
        if self._figure is not None:
            figure = self._figure if self.mode == "min" else -self._figure
            self._best, self._bad = (
                (figure, 0) if figure < self._best else (self._best, self._bad + 1)
            )
            self._figure = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module back as it was."""
        for parameter, _ in self._held:
            parameter.requires_grad_(True)
        for module in self._resting:
            module.training = True
        self._held, self._resting = [], set()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """As `teardown`, which Lightning then leaves out."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The phase, what the next one waits for, and how it was told to."""
        begun = {"phase": self.phase, "unfrozen": self.phase > 0 or len(self.plan) == 1}
        return (
            begun
            | {"best": self._best, "bad": self._bad, "figure": self._figure}
            | self._settings()
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue in the checkpoint's phase; a `UserError` if it is a later one that began under other settings."""
        saved, asked = resume.flat(freeze=state_dict), resume.flat(freeze=self._settings())
        for change in resume.compare(
            saved, asked, within_epoch=False, unfrozen=state_dict["unfrozen"]
        ):
            rank_zero_info(change)
        self.phase = state_dict.get("phase", int(state_dict["unfrozen"] and self.freezes))
        self._best, self._bad = state_dict.get("best", math.inf), state_dict.get("bad", 0)
        self._figure = state_dict.get("figure")

    @property
    def freezes(self) -> bool:
        """Whether anything is frozen at first."""
        return bool(self.phases or self.unfreeze_epoch)

    def _settings(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in resume.FREEZE}
        if isinstance(self.phases, list):
            settings["phases"] = [asdict(phase) for phase in self.phases]
        return settings


def _best_kept(trainer: Trainer) -> list[ModelCheckpoint]:
    return [
        each
        for each in trainer.checkpoint_callbacks
        if isinstance(each, ModelCheckpoint) and each.monitor
    ]


def _load_best(trainer: Trainer, pl_module: LightningModule) -> None:
    path = _best_kept(trainer)[0].best_model_path
    best = (
        torch.load(path, "cpu", weights_only=True)["state_dict"]
        if path and trainer.is_global_zero
        else None
    )
    best = trainer.strategy.broadcast(best)  # of the first process, as others may see other files
    if best is not None:
        pl_module.load_state_dict(best)
        rank_zero_info(f"This phase begins with the weights of {os.path.relpath(path)}.")
