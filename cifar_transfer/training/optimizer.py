"""The optimizer, and its learning rate from step to step."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from cifar_transfer.base.errors import UserError

Kind = Literal["adam", "adamw", "sgd"]
Schedule = Literal["plateau", "linear", "cosine"]
LARGEST_RATE = 1000  # of learning and of decay; nothing learns beyond it, and soon float32 ends
HEAD = "head"  # the parameter group of heads that have a learning rate of their own
ABSOLUTE = (
    "lr",
    "initial_lr",
    "max_lr",
    "min_lr",
    "swa_lr",
)  # rates in a group, of torch's schedules


def optimizer(
    kind: Kind, groups: list[dict[str, Any]], weight_decay: float, momentum: float, fused: bool
) -> Optimizer:
    """An optimizer over parameter groups, each with its own `lr`.

    "adam" takes `weight_decay` as an L2 penalty, "adamw" decays the weights apart from the gradient
    (https://arxiv.org/abs/1711.05101), "sgd" has Nesterov's momentum. `fused` is one kernel for all parameters of Adam:
    on a CPU, 14 instead of 105 ms a step of ResNet18.
    """
    if (
        kind == "sgd"
    ):  # not fused: torch's kernel fails when unfrozen parameters join others that have a momentum
        return torch.optim.SGD(
            groups, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
        )
    adam = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
    return adam(groups, weight_decay=weight_decay, fused=fused)


def curve(schedule: Schedule, warmup: float, steps: float) -> Callable[[int], float]:
    """The share of the learning rate that a step gets: up in a line, for `warmup` of all `steps`, then down to zero."""

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        left = max(0.0, 1 - (step - warmup) / max(1.0, steps - warmup))
        return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2

    return share


def _parts(scheduler: Any) -> Iterator[Any]:
    """A scheduler, and those that it is made of; torch has no public name for them."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _parts(part)


def _curves(trainer: Trainer) -> list[Any]:
    return [part for config in trainer.lr_scheduler_configs for part in _parts(config.scheduler)]


def check_rates(trainer: Trainer, lr: float | None, factor: float | None) -> None:
    """Refuse, by a `UserError`, what would undo the rate of a phase, or fail when other parameters begin to train."""
    for curve in _curves(trainer) if lr or factor else ():
        name = type(curve).__name__
        if not isinstance(curve, LRScheduler):
            raise UserError(
                f"{name} is not of torch, so that a phase cannot set its rate: give the phases no lr."
            )
        if lr and (lowest := getattr(curve, "eta_min", 0)) > lr:
            raise UserError(
                f"{name} goes to eta_min={lowest:g}, which is above the rate of a phase, {lr:g}: lower it."
            )
    for group in (group for each in trainer.optimizers for group in each.param_groups):
        if group.get("fused") and group.get("momentum") and group.get("dampening"):
            raise UserError(
                "Fused SGD with dampening cannot begin to train parameters later: take fused=False."
            )


def start_afresh(trainer: Trainer) -> None:
    """Have plateaus forget the losses of what was trained before, and fused SGD take parameters without a momentum."""
    for curve in _curves(trainer):
        if isinstance(curve, ReduceLROnPlateau):
            curve.best, curve.num_bad_epochs, curve.cooldown_counter = curve.mode_worse, 0, 0
    for each in trainer.optimizers:
        for group in each.param_groups:
            if group.get("fused") and group.get(
                "momentum"
            ):  # torch's kernel wants all of them or none
                for parameter in group["params"]:
                    each.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def set_rates(trainer: Trainer, lr: float | None, factor: float | None) -> None:
    """Set the rate, `lr` times a group's `lr_scale` or `factor` as much, of all groups but heads with their own.

    Schedules keep their curve, for every absolute rate that they go by changes by the same factor.
    """
    for each in trainer.optimizers if lr or factor else ():
        curves = [curve for curve in _curves(trainer) if curve.optimizer is each]
        for place, group in enumerate(each.param_groups):
            if group.get("name") == HEAD:
                continue
            highest = [curve.max_lrs[place] for curve in curves if hasattr(curve, "max_lrs")]
            base = float(
                highest[0] if highest else group.get("max_lr", group.get("initial_lr", group["lr"]))
            )
            new = lr * group.get("lr_scale", 1.0) if lr else base * (factor or 1.0)
            places: list[tuple[Any, Any]] = [(group, key) for key in ABSOLUTE if key in group]
            places += [
                (rates, place)
                for c in curves
                for name in ("base_lrs", "max_lrs")
                if (rates := getattr(c, name, None))
            ]
            for where, key in places:
                rate = new if where[key] == base else new * float(where[key]) / base
                if isinstance(where[key], Tensor):  # as capturable and compiled optimizers have it
                    where[key].fill_(rate)
                else:
                    where[key] = rate


def rates(
    optimizers: Sequence[Optimizer], module: nn.Module, stages: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """The highest learning rate in each stage of a module; 0 where all is frozen."""
    rate = {
        p: float(group["lr"])
        for each in optimizers
        for group in each.param_groups
        for p in group["params"]
    }
    named = {
        name: rate.get(p, 0.0) * p.requires_grad
        for name, p in module.named_parameters(remove_duplicate=False)
    }
    return {stage: max(named.get(name, 0.0) for name in names) for stage, names in stages.items()}


def _groups(
    network: nn.Module, stages: Mapping[str, Sequence[str]], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    group_of: dict[str, dict[str, Any]] = {}  # by the name of a parameter
    for depth, (stage, names) in enumerate(reversed([*stages.items()])):
        apart = stage == HEAD and options["head_lr"] is not None
        fields = {"lr": options["head_lr"], "name": HEAD} if apart else {"lr": options["lr"]}
        if options["layer_decay"] is not None and not apart:
            scale = options["layer_decay"] ** depth
            fields = {"lr": options["lr"] * scale, "lr_scale": scale, "stage": stage}
        group = groups.setdefault(
            fields.get("stage") or fields.get("name", ""), fields | {"params": []}
        )
        group_of |= dict.fromkeys(names, group)
    for name, parameter in network.named_parameters():  # in this order, which checkpoints rely on
        group_of[name]["params"].append(parameter)
    return list(reversed(groups.values()))


def configure(
    trainer: Trainer,
    network: nn.Module,
    stages: Mapping[str, Sequence[str]],
    options: Mapping[str, Any],
) -> OptimizerLRScheduler:
    """What `LightningModule.configure_optimizers` returns.

    Args:
        trainer: Says how many steps there will be.
        network: All of its parameters are optimized.
        stages: Names of its parameters, from stem to head.
        options: Those of `TransferClassifier`.

    Raises:
        UserError: A schedule without an end, or a warm-up longer than the run.
    """
    groups = _groups(network, stages, options)
    # A fused optimizer unscales gradients itself, so mixed precision cannot clip them before (Lightning #21435).
    fused = not trainer.gradient_clip_val
    made = optimizer(
        options["optimizer"], groups, options["weight_decay"], options["momentum"], fused
    )
    if options["schedule"] == "plateau":
        plateau = ReduceLROnPlateau(
            made, "min", factor=options["lr_factor"], patience=options["lr_patience"]
        )
        return {
            "optimizer": made,
            "lr_scheduler": {"scheduler": plateau, "reduce_on_plateau": False},
        }
    steps = trainer.estimated_stepping_batches
    if steps == math.inf:
        raise UserError(
            f"schedule={options['schedule']} ends with the run: set max_epochs or max_steps."
        )
    if (
        trainer.num_training_batches == math.inf
    ):  # estimated from max_steps alone, without looking at the data
        trainer.fit_loop.setup_data()
    warmup = options["warmup_epochs"] * math.ceil(
        trainer.num_training_batches / trainer.accumulate_grad_batches
    )
    if warmup > steps:
        raise UserError(
            f"warmup_epochs={options['warmup_epochs']} is {warmup:g} steps, but the run has {steps}: lower it."
        )
    share = curve(options["schedule"], warmup, steps)
    return {
        "optimizer": made,
        "lr_scheduler": {"scheduler": LambdaLR(made, share), "interval": "step"},
    }
