r"""`BackboneFreeze`: what trains in which epoch, and at which learning rate.

A run is a list of phases, its plan. Each phase says what begins to train with it, when it begins
and at which learning rate; what trains already goes on training. Epochs are counted from 0::

    BackboneFreeze(unfreeze_epoch=5, unfrozen_lr=1e-4)
        [Phase(["head"]), Phase(["all"], epoch=5, lr=1e-4)]
    BackboneFreeze(unfreeze_epoch=0)                         # nothing is ever frozen
        [Phase(["all"])]
    BackboneFreeze(unfreeze_epoch=5, unfrozen_lr=1e-4, frozen=[r"network\.layer1\."])
        [Phase(["all but frozen"]), Phase(["all"], epoch=5, lr=1e-4)]
    BackboneFreeze(phases="gradual", unfrozen_lr=1e-4)       # in ResNet18
        [Phase(["head"]), Phase(["layer4"], epoch=1, lr=1e-4), Phase(["layer3"], epoch=2),
         Phase(["layer2"], epoch=3), Phase(["layer1"], epoch=4), Phase(["all"], epoch=5)]
    BackboneFreeze(probe=True, unfrozen_lr=1e-4)             # with a head that is fitted already
        [Phase(["head"]), Phase(["all"], epoch=0, lr=1e-4)]

So with the first of these, epochs 0 to 4 train the head, and epoch 5 is the first that trains
everything. What happens when, in `Trainer.fit`::

    setup                       # forget an earlier fit, refuse strategies that shard parameters
    load_state_dict             # if the run is resumed: take up the phase of the checkpoint
    <the optimizer is made>     # everything still requires a gradient, so that it has everything
    on_fit_start                # make the plan, fit the head if probe=True, freeze what the phase
                                # does not train
    on_train_start              # begin due phases here, too: a run that is resumed within an epoch
                                # skips on_train_epoch_start
    for epoch in epochs:
        on_train_epoch_start        # begin each phase that is due:
                                    #     require gradients of what it trains, and under DDP wrap
                                    #     the module anew; put frozen modules in eval mode; reset
                                    #     plateau schedules; set the rate; with from_best load
                                    #     the best weights
        for batch in batches:
            on_train_batch_start        # in the first step of a phase: print what trains
            <step>
        <validation>
            on_validation_end           # note the value that later phases wait for
        on_train_epoch_end          # count the epochs without a better value
    state_dict                  # with each checkpoint, also with the best one, which is written
                                # before on_train_epoch_end: the phase, the count, the value that is
                                # not yet counted, the options
    teardown                    # give the module back as it was, also on_exception

Why not Lightning's `BaseFinetuning`: it unfreezes parameters that `DistributedDataParallel` was not
told of when it wrapped the model, so that their gradients are never averaged and the ranks drift
apart without a word (pytorch-lightning #20340); it stays frozen when resumed after the unfreezing
(#21901); and its frozen batch-norm keeps learning (#21531). Here the optimizer has all parameters
from the start, DDP wraps the module anew when a phase begins (plain DDP, without the search of
`find_unused_parameters` in every step), and the phase is in the checkpoint.
"""

import math
import os
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.parameter import UninitializedParameter

from cifar_transfer.base.console import counted, say, styled
from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.features.new_head import begin_with_logistic
from cifar_transfer.network.image_classifier import ImageClassifier
from cifar_transfer.network.stages import HEAD
from cifar_transfer.training import lightning_internals, schedule
from cifar_transfer.training.ema import ExponentialMovingAverage
from cifar_transfer.training.phases import (
    ALL_BUT_FROZEN,
    EVERYTHING,
    RATE,
    Phase,
    as_list,
    check_patterns,
    check_phases,
    describe_epochs,
    describe_training,
    explain_never_trained,
    first_phases,
    frozen_modules,
    names_but_frozen,
    names_to_train,
    stages_of,
)
from cifar_transfer.training.resume import refuse_changes
from cifar_transfer.training.run_checkpoints import best_checkpoint_of

GRADUAL = "gradual"
OPTIONS = (
    "unfreeze_epoch",
    "unfrozen_lr",
    "frozen",
    "batch_norm",
    "phases",
    "probe",
    "monitor",
    "mode",
)
CYAN = 36  # ANSI's number
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class BackboneFreeze(Callback):
    r"""Freeze parameters at first, and unfreeze them at another learning rate, in phases.

    Parameters that have `requires_grad=False` before the fit keep it. After the fit, all others
    require gradients again.

    Args:
        unfreeze_epoch: How many epochs the parameters stay frozen. 0 never freezes and leaves the
            learning rate alone; with all epochs of the run only the head is ever trained (a linear
            probe).
        unfrozen_lr: Learning rate after the unfreezing, also of the head unless it has a parameter
            group of its own, named "head" (`head_lr`); None leaves the rate as it is. A
            `ReduceLROnPlateau` starts afresh, because losses of the frozen phase do not compare
            with later ones; a schedule of steps keeps its curve, which then leads up to this rate.
        frozen: Regular expressions, or a single one. A parameter is frozen if one of them matches
            the beginning of its name, or of any of its names if it is tied, for example
            `network\.(conv1|bn1|layer[12])\.`, where "network." stands for the module's
            `network`, whatever it is registered as. None freezes all but the heads, which the
            module names in `heads` (submodules of its `network`, or its own).
        batch_norm: "eval" keeps frozen modules in eval mode, so that batch-norm uses and keeps the
            pretrained statistics, and a dropout is off inside of a frozen module or, in an
            `nn.Sequential`, before one; other dropouts stay on. "train" lets the statistics follow
            the new data. "fixed" is "eval", and all batch-norm keeps its statistics to the end of
            the run: the head that `probe` begins with was fitted on features with these.
        phases: In place of `unfreeze_epoch` and `frozen`, a list of phases; or "gradual", which
            unfreezes a stage an epoch, from the head down, at `unfrozen_lr` (ULMFiT,
            https://arxiv.org/abs/1801.06146). What is in no phase stays frozen.
        probe: In place of the frozen epochs, begin with the head that logistic regression on the
            backbone's features gives (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).
            Everything trains at `unfrozen_lr`, or if `unfreeze_epoch` is 0 at the optimizer's rate.
            Needs a `TransferClassifier` and a data module of this package.
        monitor: Name of the value, logged in validation, that a phase's `patience` looks at.
        mode: Whether the lowest ("min") or the highest ("max") value is the best.

    Attributes:
        plan: The phases of the run; empty until the fit starts, because stages are those of the
            network.
        phase: Number of the current phase in the plan.

    Raises:
        UserError: A pattern matches nothing, a strategy shards parameters, a schedule would undo a
            rate, or an option differs from that of the checkpoint that is resumed.

    Example::

        class Mine(LightningModule):
            def __init__(self):
                super().__init__()
                self.backbone = models.resnet18(num_classes=64)  # or weights="DEFAULT", without fc
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
        frozen: list[str] | str | None = None,
        batch_norm: Literal["eval", "train", "fixed"] = "eval",
        phases: list[Phase] | Literal["gradual"] | None = None,
        probe: bool = False,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        super().__init__()
        self.unfreeze_epoch: int = as_primitive("unfreeze_epoch", unfreeze_epoch)
        self.unfrozen_lr: float | None = as_primitive("unfrozen_lr", unfrozen_lr)
        self.frozen: list[str] | None = as_list(as_primitive("frozen", frozen))
        self.batch_norm: str = as_primitive("batch_norm", batch_norm)
        self.phases: list[Phase] | str | None = phases
        if isinstance(phases, Phase):
            self.phases = [phases]
        elif phases is not None and not isinstance(phases, str):
            self.phases = list(phases)
        self.probe: bool = as_primitive("probe", probe)
        self.monitor: str = as_primitive("monitor", monitor)
        self.mode: str = as_primitive("mode", mode)
        self._check_options()
        self._forget_fit()

    def _check_options(self) -> None:
        check("unfreeze_epoch", self.unfreeze_epoch, lambda n: n >= 0, "0 (never frozen) or more")
        if self.unfrozen_lr is not None:
            highest = schedule.MAX_LEARNING_RATE
            check("unfrozen_lr", self.unfrozen_lr, lambda x: 0 < x <= highest, RATE)
        check(
            "batch_norm",
            self.batch_norm,
            lambda x: x in ("eval", "train", "fixed"),
            '"eval", "train" or "fixed"',
        )
        check("mode", self.mode, lambda x: x in ("min", "max"), '"min" or "max"')
        if self.frozen == []:
            raise UserError(
                "frozen is []: name what is to be frozen, or freeze nothing with unfreeze_epoch=0."
            )
        if self.frozen is not None:
            check_patterns("frozen", self.frozen)
        if self.phases is not None and (self.frozen or not self.phases):
            raise UserError(
                "phases name what trains: give one or more, and no frozen; or leave phases out."
            )
        if isinstance(self.phases, str):
            check("phases", self.phases, lambda x: x == GRADUAL, '"gradual", or a list of phases')
        elif self.phases is not None:
            check_phases(self.phases)
        if self.probe and (self.phases or self.frozen):
            raise UserError(
                "probe=true is in place of the frozen epochs: leave out phases and frozen."
            )

    @property
    def later_phases(self) -> list[Phase]:
        """Phases of the plan that have not begun."""
        return self.plan[self.phase + 1 :]

    def _forget_fit(self) -> None:
        """Set the state of a fit to its beginning."""
        self.plan: list[Phase] = []
        self.phase = 0
        self._forget_values()
        # Monitored value of this epoch, once it is validated.
        self._epoch_score: float | None = None
        # Number of the phase in which each parameter and buffer begins to train, by name; and the
        # same of the parameters that require a gradient outside of this callback.
        self._first_phases: dict[str, int] = {}
        self._trainable: dict[nn.Parameter, int] = {}
        # Modules that are in eval mode because of this callback.
        self._modules_in_eval: set[nn.Module] = set()
        # Phases that have begun and are not printed yet.
        self._phases_to_print: list[Phase] = []

    def _forget_values(self) -> None:
        """Forget the monitored values: those of one phase do not compare with those of another."""
        self._best_score = math.inf
        if self.mode == "max":
            self._best_score = -math.inf
        self._wait_count = 0  # epochs since the best value

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit, and refuse a strategy before it shards the parameters."""
        if stage != "fit":
            return
        self._forget_fit()
        callbacks = lightning_internals.callbacks_of(trainer)
        if sum(isinstance(callback, BackboneFreeze) for callback in callbacks) > 1:
            raise UserError(
                "The Trainer has several BackboneFreeze callbacks: give one of them phases."
            )
        never_freezes = self.phases is None and self.unfreeze_epoch == 0
        if never_freezes or isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            return
        raise UserError(
            f"BackboneFreeze works on one device and under DDP, not under "
            f"{type(trainer.strategy).__name__}, which shards parameters when it wraps the model "
            f"and cannot unfreeze some later: use strategy=ddp."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the phase of a checkpoint.

        Raises:
            UserError: An option differs from that of the run that wrote the checkpoint.
        """
        self._refuse_changes(state_dict["options"])
        self.phase = state_dict["phase"]
        self._best_score = state_dict["best_score"]
        self._wait_count = state_dict["wait_count"]
        self._epoch_score = state_dict["epoch_score"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the plan, and freeze, now that the optimizer has everything that will ever train."""
        _check_parameters(pl_module)
        stages = stages_of(pl_module)
        self.plan = self._make_plan(pl_module, stages)
        self._check_plan(trainer)
        is_resumed = trainer.ckpt_path is not None
        if self.probe and not is_resumed and not lightning_internals.is_trial(trainer):
            _begin_with_logistic(trainer, pl_module)
        names_by_phase = []
        for phase in self.plan:
            names_by_phase.append(self._names_to_train(pl_module, phase, stages))
        self._first_phases = first_phases(pl_module, names_by_phase)
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                self._trainable[parameter] = self._first_phases[name]
        if 0 not in self._trainable.values():
            what = "The first phase"
            if self.frozen is not None:
                what = f"frozen={self.frozen}"
            raise UserError(
                f"{what} freezes every parameter, also the head's, so nothing would train: name "
                f"fewer."
            )
        self._require_gradients(trainer, pl_module)
        self._warn_of_untrained_backbone(trainer, pl_module)
        self._warn_of_missed_phases(trainer)

    def _warn_of_untrained_backbone(self, trainer: Trainer, module: LightningModule) -> None:
        """Warn if a head would learn from the features of a network that has learned nothing."""
        classifier = getattr(module, "classifier", None)
        is_frozen = any(first_phase > 0 for first_phase in self._trainable.values())
        if not is_frozen or trainer.ckpt_path is not None:
            return
        if isinstance(classifier, ImageClassifier) and not classifier.has_learned:
            rank_zero_warn(
                "The backbone has learned nothing (weights=none), and it is frozen at first, so "
                "that the head learns from random features: set --freeze.unfreeze_epoch=0."
            )

    def _warn_of_missed_phases(self, trainer: Trainer) -> None:
        """Warn if the run ends before a phase begins."""
        epochs = trainer.max_epochs
        if epochs is None or epochs < 0 or lightning_internals.is_trial(trainer):
            return
        for phase in self.plan:
            if phase.epoch is not None and phase.epoch >= epochs:
                what = ", ".join(phase.entries)
                rank_zero_warn(
                    f"The run ends with epoch {epochs}, and {what} would begin to train with epoch "
                    f"{counted(phase.epoch)}: let it begin earlier (--freeze.unfreeze_epoch), or "
                    f"train longer (--trainer.max_epochs)."
                )
                return

    def _make_plan(self, module: LightningModule, stages: dict[str, list[str]]) -> list[Phase]:
        """Return the phases of a run from the options; see the top of this file.

        Args:
            module: Module that is trained.
            stages: Names of its parameters and buffers by stage, from stem to head.

        Raises:
            UserError: The options say nothing of what to freeze, and the module names no head.
        """
        if isinstance(self.phases, list):
            return list(self.phases)
        if self.phases is None and self.unfreeze_epoch == 0:
            return [Phase([EVERYTHING])]
        everything = Phase([EVERYTHING], epoch=self.unfreeze_epoch, lr=self.unfrozen_lr)
        if self.frozen is not None:
            return [Phase([ALL_BUT_FROZEN]), everything]
        if HEAD not in stages:
            raise UserError(
                f"{type(module).__name__} names no head, so all of it would be frozen: give "
                f"BackboneFreeze the names of what to freeze, frozen=[...], or the module an "
                f"attribute `heads`, the names of its layers."
            )
        if self.phases == GRADUAL:
            return self._gradual_plan(list(stages))
        if self.probe:
            return [Phase([HEAD]), Phase([EVERYTHING], epoch=0, lr=self.unfrozen_lr)]
        return [Phase([HEAD]), everything]

    def _gradual_plan(self, stages: list[str]) -> list[Phase]:
        """Return a phase for each stage, of an epoch each, from the head down to the stem."""
        backbone = stages[:-1]
        if not backbone:
            return [Phase([EVERYTHING])]
        # With the stem begins also what is in no stage, in a module around the network.
        names = [*reversed(backbone[1:]), EVERYTHING]
        plan = [Phase([HEAD]), Phase(names[:1], epoch=1, lr=self.unfrozen_lr)]
        for epoch, name in enumerate(names[1:], start=2):
            plan.append(Phase([name], epoch=epoch))  # at the rate of the phase before
        return plan

    def _check_plan(self, trainer: Trainer) -> None:
        if len(self.plan) > 1:
            schedule.check_optimizers(trainer)
        for phase in self.plan:
            if phase.lr is not None:
                schedule.check_learning_rate(trainer, phase.lr)
            if phase.from_best and best_checkpoint_of(trainer) is None:
                raise UserError(
                    "from_best needs a ModelCheckpoint that monitors a figure among the Trainer's "
                    "callbacks."
                )

    def _names_to_train(
        self, module: LightningModule, phase: Phase, stages: dict[str, list[str]]
    ) -> set[str]:
        """Return the names of the parameters and buffers that begin to train with a phase."""
        if phase.train != [ALL_BUT_FROZEN]:
            return names_to_train(module, phase.entries, stages)
        return names_but_frozen(module, self.frozen or [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the phases that are due, and tell which parameters never train.

        A run that is resumed within an epoch skips `on_train_epoch_start`.
        """
        self._begin_due_phases(trainer, pl_module)
        if not self._phases_to_print:
            self._phases_to_print = [self.plan[self.phase]]
        optimized = set()
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                optimized.update(group["params"])
        sentences = explain_never_trained(
            pl_module, self._first_phases, len(self.plan), self._trainable.keys(), optimized
        )
        for sentence in sentences:
            rank_zero_info(sentence)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the phases that are due."""
        self._begin_due_phases(trainer, pl_module)

    def _begin_due_phases(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin each phase that is due, and put the module into the state of the current phase.

        Hooks may call this at any time: what is already in force is left alone.
        """
        begun = self._advance_phase(trainer.current_epoch)
        self._require_gradients(trainer, module)
        self._set_modes(module)
        if not begun:
            return
        schedule.prepare_for_new_parameters(trainer)
        for phase in begun:
            if phase.lr is not None:
                schedule.set_learning_rate(trainer, phase.lr)
        if any(phase.from_best for phase in begun):
            _load_best_weights(trainer, module)
        self._phases_to_print = begun

    def _advance_phase(self, epoch: int) -> list[Phase]:
        """Make the last phase that is due in an epoch the current one; return those that begin.

        A phase with an `epoch` is due from that epoch on, even if it overtakes one with `patience`.
        A phase with `patience` is due if the phase before it is the current one, and has had so
        many epochs without a better value.
        """
        current = self.phase
        for number in range(current + 1, len(self.plan)):
            phase = self.plan[number]
            if phase.epoch is not None:
                is_due = epoch >= phase.epoch
            elif phase.patience is not None and number == current + 1:
                is_due = self._wait_count >= phase.patience
            else:
                is_due = False
            if is_due:
                self.phase = number
        begun = self.plan[current + 1 : self.phase + 1]
        if begun:
            self._forget_values()
        return begun

    def _require_gradients(self, trainer: Trainer, module: LightningModule) -> None:
        """Have parameters require a gradient if they train in the current phase."""
        changed = False
        for parameter, first_phase in self._trainable.items():
            trains = first_phase <= self.phase
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)
                changed = True
        if changed:
            lightning_internals.wrap_again(trainer, module)

    def _set_modes(self, module: LightningModule) -> None:
        """Put frozen modules in eval mode, and modules that are no longer frozen in train mode.

        Modules that their author keeps in eval mode stay in it. With `batch_norm="fixed"`, all of
        batch-norm counts as frozen.
        """
        if self.batch_norm == "train":
            return
        frozen = frozen_modules(module, self._first_phases, self.phase)
        if self.batch_norm == "fixed":
            for submodule in module.modules():
                if isinstance(submodule, BATCH_NORM):
                    frozen.add(submodule)
        for submodule in frozen:
            if submodule.training:
                submodule.training = False
                self._modules_in_eval.add(submodule)
        for submodule in self._modules_in_eval - frozen:
            submodule.training = True
        self._modules_in_eval &= frozen

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Print the phases that have begun; here, so that it comes after the table's heading."""
        if not self._phases_to_print:
            return
        next_phase = None
        if not self.everything_trains:
            next_phase = self.plan[self.phase + 1]
        epochs = describe_epochs(trainer.current_epoch, next_phase, trainer.max_epochs)
        is_first = self._phases_to_print[0] is self.plan[0]
        training = describe_training(self._phases_to_print, is_first)
        count = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        say(trainer, styled(f"{epochs}: {training}, {count:,} parameters train.", CYAN))
        self._phases_to_print = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the value that phases wait for; all processes take that of the first."""
        if trainer.sanity_checking or not any(phase.patience for phase in self.plan):
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(trainer.callback_metrics)
            raise UserError(
                f"monitor={self.monitor} is not logged in validation, which a phase waits for: "
                f"{logged}."
            )
        score = float(trainer.callback_metrics[self.monitor])
        self._epoch_score = trainer.strategy.broadcast(score)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the epochs without a better value."""
        if self._epoch_score is None:
            return
        if self.mode == "min":
            is_better = self._epoch_score < self._best_score
        else:
            is_better = self._epoch_score > self._best_score
        if is_better:
            self._best_score = self._epoch_score
            self._wait_count = 0
        else:
            self._wait_count += 1
        self._epoch_score = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module back as it was."""
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        for submodule in self._modules_in_eval:
            submodule.training = True
        self._trainable = {}
        self._modules_in_eval = set()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the module back as it was, because Lightning does not call `teardown` then."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Return the phase, what the next one waits for, and the options."""
        return {
            "phase": self.phase,
            "best_score": self._best_score,
            "wait_count": self._wait_count,
            "epoch_score": self._epoch_score,
            "options": self._options(),
        }

    @property
    def everything_trains(self) -> bool:
        """True once the last phase has begun, so that everything trains that ever will."""
        return self.phase == len(self.plan) - 1

    def phase_at(self, epoch: int) -> int | None:
        """Return the number of the phase in a later epoch; None if that depends on a value."""
        for number in range(self.phase + 1, len(self.plan)):
            begin = self.plan[number].epoch
            if begin is None:
                return None
            if epoch < begin:
                return number - 1
        return len(self.plan) - 1

    def _options(self) -> dict[str, Any]:
        return {name: as_primitive(name, getattr(self, name)) for name in OPTIONS}

    def _refuse_changes(self, saved_options: dict[str, Any]) -> None:
        """Refuse options that differ from those with which a run began."""
        before = {f"freeze.{name}": value for name, value in saved_options.items()}
        now = {f"freeze.{name}": value for name, value in self._options().items()}
        refuse_changes(before, now, may_change=frozenset())


def _check_parameters(module: LightningModule) -> None:
    """Refuse parameters that have no values yet, because nothing can be said about them."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise UserError(
                f"{name} is of a lazy layer, which has no weights before its first batch: pass a "
                f"batch through the module before the fit."
            )


def _begin_with_logistic(trainer: Trainer, module: LightningModule) -> None:
    """Give the network of a module the best logistic regression on its backbone's features.

    Raises:
        UserError: The backbone has learned nothing, or module or data are not of this package.
    """
    data = lightning_internals.data_of(trainer)
    classifier = getattr(module, "classifier", None)
    if not isinstance(data, ImageDataModule) or not isinstance(classifier, ImageClassifier):
        raise UserError(
            "probe=true needs a TransferClassifier and a data module of this package: leave it out."
        )
    # In eval mode an untrained backbone does not even give what it gives in training.
    if not classifier.has_learned:
        raise UserError(
            "probe=true needs a backbone that has learned something, not weights=none: leave it "
            "out."
        )
    begin_with_logistic(trainer, classifier, data)


def _load_best_weights(trainer: Trainer, module: LightningModule) -> None:
    """Load the weights of the best checkpoint so far; warn if there is none.

    An average of the weights begins anew with them, because it is what is validated and saved.
    All processes take the weights of the first, because others may see other files.
    """
    callback = best_checkpoint_of(trainer)
    if callback is None:
        return
    path = callback.best_model_path  # "" before the first checkpoint
    weights = None
    if path and trainer.is_global_zero:
        weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    weights = trainer.strategy.broadcast(weights)
    if weights is None:
        rank_zero_warn(
            "from_best finds no checkpoint that was the best so far: this phase begins with the "
            "weights as they are."
        )
        return
    module.load_state_dict(weights)
    for average in lightning_internals.callbacks_of(trainer):
        if isinstance(average, ExponentialMovingAverage):
            average.restart(module)
    rank_zero_info(f"This phase begins with the weights of {os.path.relpath(path)}.")
