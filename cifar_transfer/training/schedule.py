"""Learning rates from step to step: the schedules of the classifier, and what a phase sets in them.

`BackboneFreeze` sets the learning rate of a phase in any optimizer and under any schedule of torch.
A schedule keeps the shape of its curve, which from then on leads to the new rate.
"""

import math
from collections.abc import Iterator
from typing import Any

from lightning import Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from cifar_transfer.base.errors import UserError
from cifar_transfer.training import lightning_internals

MAX_LEARNING_RATE = 1000
HEAD_GROUP = "head"  # name of a parameter group that has a learning rate of its own in all phases
# Fields of a parameter group in which schedules of torch keep absolute learning rates.
GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
# Attributes of schedules of torch that list an absolute learning rate for each group.
SCHEDULE_RATES = ("base_lrs", "max_lrs")


def plateau(optimizer: Optimizer, factor: float, patience: int) -> ReduceLROnPlateau:
    """Return the schedule that lowers the learning rate when the validation loss no longer falls.

    Args:
        optimizer: Optimizer whose rates are lowered.
        factor: Factor by which the rates are multiplied, in (0, 1).
        patience: Epochs without a lower loss that are let pass.
    """
    return ReduceLROnPlateau(optimizer, "min", factor=factor, patience=patience)


def per_step(trainer: Trainer, optimizer: Optimizer, shape: str, warmup_epochs: float) -> LambdaLR:
    """Return a schedule that changes the learning rate in each step, down to zero at the run's end.

    Args:
        trainer: Trainer of the run; it knows how many steps the run and an epoch have.
        optimizer: Optimizer whose rates are multiplied by `learning_rate_share`.
        shape: "linear" or "cosine".
        warmup_epochs: Epochs, also fractions of one, in which the rate rises.

    Raises:
        UserError: The run has no end, or the warm-up is longer than the run.
    """
    steps = trainer.estimated_stepping_batches
    if steps == math.inf:
        raise UserError(f"schedule={shape} ends with the run: set max_epochs or max_steps.")
    batches = lightning_internals.count_training_batches(trainer)
    warmup_steps = warmup_epochs * math.ceil(batches / trainer.accumulate_grad_batches)
    if warmup_steps > steps:
        raise UserError(
            f"warmup_epochs={warmup_epochs} is {warmup_steps:g} steps, but the run has {steps}: "
            f"lower it."
        )

    def share(step: int) -> float:
        return learning_rate_share(step, shape, warmup_steps, steps)

    return LambdaLR(optimizer, share)


def learning_rate_share(step: int, shape: str, warmup_steps: float, steps: float) -> float:
    """Return the share of the learning rate that a step gets, in [0, 1].

    The share rises in a line for `warmup_steps`, then falls to zero at the last of all `steps`.

    Args:
        step: Number of the step, from 0.
        shape: "linear" or "cosine": how the share falls.
        warmup_steps: Steps in which it rises.
        steps: All steps of the run.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    steps_after_warmup = max(1.0, steps - warmup_steps)
    remaining = max(0.0, 1 - (step - warmup_steps) / steps_after_warmup)
    if shape == "linear":
        return remaining
    return (1 - math.cos(math.pi * remaining)) / 2


def check_learning_rate(trainer: Trainer, lr: float) -> None:
    """Check that a phase can set a learning rate in every schedule of a run.

    Raises:
        UserError: A schedule is not of torch, or does not go below a rate above `lr`.
    """
    for scheduler in _schedulers(trainer):
        name = type(scheduler).__name__
        if not isinstance(scheduler, LRScheduler):
            raise UserError(
                f"{name} is not of torch, so that a phase cannot set its rate: give the phases no "
                f"lr."
            )
        lowest = getattr(scheduler, "eta_min", 0)
        if lowest > lr:
            raise UserError(
                f"{name} goes to eta_min={lowest:g}, which is above the rate of a phase, {lr:g}: "
                f"lower it."
            )


def check_optimizers(trainer: Trainer) -> None:
    """Check that every optimizer of a run can begin to train parameters later.

    Raises:
        UserError: An optimizer is fused SGD with dampening.
    """
    for group in _groups(trainer):
        if group.get("fused") and group.get("momentum") and group.get("dampening"):
            raise UserError(
                "Fused SGD with dampening cannot begin to train parameters later: take fused=False."
            )


def prepare_for_new_parameters(trainer: Trainer) -> None:
    """Prepare schedules and optimizers of a run for other parameters that begin to train.

    A `ReduceLROnPlateau` forgets its losses, because they do not compare with later ones.
    """
    for scheduler in _schedulers(trainer):
        if isinstance(scheduler, ReduceLROnPlateau):
            lightning_internals.reset_plateau(scheduler)
    for optimizer in trainer.optimizers:
        lightning_internals.complete_momentum(optimizer)


def set_learning_rate(trainer: Trainer, lr: float) -> None:
    """Set the learning rate of all parameter groups but those named "head".

    A group gets `lr`, or its share `lr_scale` of it. Schedules keep the shape of their curves,
    because every absolute rate that they go by changes by the same factor.
    """
    for optimizer in trainer.optimizers:
        schedulers = []
        for scheduler in _schedulers(trainer):
            if scheduler.optimizer is optimizer:
                schedulers.append(scheduler)
        for index, group in enumerate(optimizer.param_groups):
            if group.get("name") != HEAD_GROUP:
                _set_group_rate(group, index, schedulers, lr * group.get("lr_scale", 1.0))


def _set_group_rate(
    group: dict[str, Any], index: int, schedulers: list[LRScheduler], lr: float
) -> None:
    """Set the rate to which the curve of a group leads, in the group and in its schedules.

    Args:
        group: Parameter group of an optimizer.
        index: Index of the group in the optimizer.
        schedulers: Schedules of the optimizer.
        lr: The new rate.
    """
    before = _highest_rate(group, index, schedulers)
    for key in GROUP_RATES:
        if key in group:
            _scale(group, key, before, lr)
    for scheduler in schedulers:
        for name in SCHEDULE_RATES:
            rates = getattr(scheduler, name, None)
            if rates:
                _scale(rates, index, before, lr)


def _highest_rate(group: dict[str, Any], index: int, schedulers: list[LRScheduler]) -> float:
    """Return the learning rate to which the curve of a group leads."""
    for scheduler in schedulers:
        if hasattr(scheduler, "max_lrs"):  # CyclicLR
            return float(scheduler.max_lrs[index])
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))  # max_lr: OneCycleLR


def _scale(rates: Any, key: Any, before: float, after: float) -> None:
    """Change a rate in a list or dict by the factor that leads from `before` to `after`."""
    rate = after  # exactly: after * before / before may differ from it in the last bit
    if rates[key] != before:
        rate = after * float(rates[key]) / before
    if isinstance(rates[key], Tensor):  # as capturable and compiled optimizers have it
        rates[key].fill_(rate)
    else:
        rates[key] = rate


def _schedulers(trainer: Trainer) -> Iterator[Any]:
    """Iterate over the schedules of a run, also over those that others are made of."""
    for config in trainer.lr_scheduler_configs:
        yield from lightning_internals.schedulers_within(config.scheduler)


def _groups(trainer: Trainer) -> Iterator[dict[str, Any]]:
    for optimizer in trainer.optimizers:
        yield from optimizer.param_groups
