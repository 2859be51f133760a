"""The optimizer of `TransferClassifier`: its options, its parameter groups, its learning rates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from lightning import Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer

from cifar_transfer.base.errors import check
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.network.stages import HEAD
from cifar_transfer.training import schedule
from cifar_transfer.training.schedule import HEAD_GROUP, MAX_LEARNING_RATE

OptimizerName = Literal["adam", "adamw", "sgd"]
ScheduleName = Literal["plateau", "linear", "cosine"]
MAX_WEIGHT_DECAY = 1000
RATE = f"a positive rate up to {MAX_LEARNING_RATE}"


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of the optimizer and of its schedule, checked and turned into primitives.

    Args:
        optimizer: "adam" takes `weight_decay` as an L2 penalty, "adamw" decays the weights apart
            from the gradient (https://arxiv.org/abs/1711.05101), "sgd" has Nesterov's momentum.
        lr: Learning rate until the unfreezing or the schedule changes it.
        head_lr: Learning rate of the heads, also after the unfreezing; None: that of the backbone.
        layer_decay: Each stage of the backbone learns at this share of the rate of the stage above
            it, in (0, 1]; None: all stages learn at the same rate.
        weight_decay: Weight decay of all parameters.
        momentum: Momentum of "sgd", in [0, 1).
        schedule: "plateau" lowers the rate when `val/loss` no longer falls; "linear" and "cosine"
            take it from step to step up to its value and down to zero at the end of the run.
        warmup_epochs: Epochs, also fractions of one, on the way up; 0 for "plateau".
        lr_factor: Factor by which "plateau" lowers the rate, in (0, 1).
        lr_patience: Epochs without a lower `val/loss` that "plateau" lets pass.

    Raises:
        UserError: A value is out of range, or not what a checkpoint can store.
    """

    optimizer: OptimizerName = "adam"
    lr: float = 1e-3
    head_lr: float | None = None
    layer_decay: float | None = None
    weight_decay: float = 1e-4
    momentum: float = 0.9
    schedule: ScheduleName = "plateau"
    warmup_epochs: float = 0.0
    lr_factor: float = 0.5
    lr_patience: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = as_primitive(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        self._check_choices()
        self._check_ranges()

    def _check_choices(self) -> None:
        optimizers = get_args(OptimizerName)
        schedules = get_args(ScheduleName)
        check("optimizer", self.optimizer, lambda x: x in optimizers, '"adam", "adamw" or "sgd"')
        check(
            "schedule", self.schedule, lambda x: x in schedules, '"plateau", "linear" or "cosine"'
        )

    def _check_ranges(self) -> None:
        check("lr", self.lr, lambda x: 0 < x <= MAX_LEARNING_RATE, RATE)
        if self.head_lr is not None:
            check("head_lr", self.head_lr, lambda x: 0 < x <= MAX_LEARNING_RATE, RATE)
        if self.layer_decay is not None:
            share = "a share in (0, 1], or null"
            check("layer_decay", self.layer_decay, lambda x: 0 < x <= 1, share)
        decays = f"0 to {MAX_WEIGHT_DECAY}"
        check("weight_decay", self.weight_decay, lambda x: 0 <= x <= MAX_WEIGHT_DECAY, decays)
        check("momentum", self.momentum, lambda x: 0 <= x < 1, "a share in [0, 1)")
        check("warmup_epochs", self.warmup_epochs, lambda x: 0 <= x < math.inf, "0 epochs or more")
        if self.schedule == "plateau":
            check("warmup_epochs", self.warmup_epochs, lambda x: x == 0, "0 for a plateau")
        check("lr_factor", self.lr_factor, lambda x: 0 < x < 1, "a factor between 0 and 1")
        check("lr_patience", self.lr_patience, lambda n: n >= 0, "0 epochs or more")


def configure(
    trainer: Trainer,
    network: nn.Module,
    stages: Mapping[str, Sequence[str]],
    options: OptimizerOptions,
) -> OptimizerLRScheduler:
    """Return the optimizer and its schedule, as `LightningModule.configure_optimizers` does.

    Args:
        trainer: Trainer of the run; it knows how many steps the run has.
        network: Network of which all parameters are optimized, frozen or not.
        stages: Names of parameters and buffers in `network` by stage, from stem to head.
        options: Options of the optimizer and its schedule.

    Raises:
        UserError: The schedule has no end, or its warm-up is longer than the run.
    """
    # A fused optimizer unscales gradients itself; then mixed precision cannot clip them before
    # (Lightning #21435).
    fused = not trainer.gradient_clip_val
    optimizer = make_optimizer(parameter_groups(network, stages, options), options, fused)
    config: LRSchedulerConfigType
    if options.schedule == "plateau":
        plateau = schedule.plateau(optimizer, options.lr_factor, options.lr_patience)
        # The classifier steps it, before the checkpoint of the epoch is written.
        config = {"scheduler": plateau, "reduce_on_plateau": False}
    else:
        curve = schedule.per_step(trainer, optimizer, options.schedule, options.warmup_epochs)
        config = {"scheduler": curve, "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": config}


def parameter_groups(
    network: nn.Module, stages: Mapping[str, Sequence[str]], options: OptimizerOptions
) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer, from stem to head, each with its `lr`.

    There is one group for all parameters, unless `head_lr` gives the heads a group of their own,
    or `layer_decay` each stage. A group with `layer_decay` has the name of its `stage` and its
    `lr_scale`, the share of the learning rate that it gets.
    """
    groups: list[dict[str, Any]] = []
    group_of: dict[str, dict[str, Any]] = {}  # by the name of a parameter
    for number, (stage, names) in enumerate(stages.items(), start=1):
        if stage == HEAD and options.head_lr is not None:
            groups.append({"lr": options.head_lr, "name": HEAD_GROUP, "params": []})
        elif options.layer_decay is not None:
            scale = options.layer_decay ** (len(stages) - number)
            lr = options.lr * scale
            groups.append({"lr": lr, "lr_scale": scale, "stage": stage, "params": []})
        elif not groups:
            groups.append({"lr": options.lr, "params": []})
        for name in names:
            group_of[name] = groups[-1]
    # Within a group, parameters are in the order of the network. Checkpoints rely on it.
    for name, parameter in network.named_parameters():
        group_of[name]["params"].append(parameter)
    return groups


def make_optimizer(
    groups: list[dict[str, Any]], options: OptimizerOptions, fused: bool
) -> Optimizer:
    """Return the optimizer that `options.optimizer` names.

    Args:
        groups: Parameter groups, each with its own `lr`.
        options: Options of the optimizer.
        fused: Whether Adam updates all parameters in one kernel: on a CPU, a step of ResNet18 takes
            14 instead of 105 ms.
    """
    if options.optimizer == "sgd":
        # Not fused: torch's kernel fails when parameters without a momentum, because they were
        # frozen, join others that have one.
        return torch.optim.SGD(
            groups,
            momentum=options.momentum,
            nesterov=options.momentum > 0,
            weight_decay=options.weight_decay,
        )
    if options.optimizer == "adam":
        return torch.optim.Adam(groups, weight_decay=options.weight_decay, fused=fused)
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=fused)


def stage_learning_rates(
    optimizers: Sequence[Optimizer], network: nn.Module, stages: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Return the highest learning rate in each stage of a network; 0 where all of it is frozen."""
    rate_of: dict[nn.Parameter, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rate_of[parameter] = float(group["lr"])
    parameters = dict(network.named_parameters(remove_duplicate=False))
    rates: dict[str, float] = {}
    for stage, names in stages.items():
        rates[stage] = 0.0
        for name in names:
            parameter = parameters.get(name)  # None for a buffer
            if parameter is not None and parameter.requires_grad:
                rates[stage] = max(rates[stage], rate_of.get(parameter, 0.0))
    return rates
