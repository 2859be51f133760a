"""The optimizer, and its learning rate from step to step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from cifar_transfer.errors import UserError

Kind = Literal["adam", "adamw", "sgd"]
Schedule = Literal["plateau", "linear", "cosine"]
LARGEST_RATE = 1000  # of learning and of decay; nothing learns beyond it, and soon float32 ends
HEAD = "head"  # the parameter group of heads that have a learning rate of their own


def optimizer(kind: Kind, groups: list[dict[str, Any]], weight_decay: float, momentum: float, fused: bool) -> Optimizer:
    """An optimizer over parameter groups, each with its own `lr`.

    "adam" takes `weight_decay` as an L2 penalty, "adamw" decays the weights apart from the gradient
    (https://arxiv.org/abs/1711.05101), "sgd" has Nesterov's momentum. `fused` is one kernel for all parameters of Adam:
    on a CPU, 14 instead of 105 ms a step of ResNet18.
    """
    if kind == "sgd":  # not fused: torch's kernel fails when unfrozen parameters join others that have a momentum
        return torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay)
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


def configure(
    trainer: Trainer, parameters: Sequence[nn.Parameter], heads: Sequence[nn.Parameter], options: Mapping[str, Any]
) -> OptimizerLRScheduler:
    """What `LightningModule.configure_optimizers` returns.

    Args:
        trainer: Says how many steps there will be.
        parameters: All of the network.
        heads: Those of them with the rate `head_lr`, if that is not None.
        options: Those of `TransferClassifier`.

    Raises:
        UserError: A schedule without an end, or a warm-up longer than the run.
    """
    groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": options["lr"]}]
    if options["head_lr"] is not None:
        apart = set(heads)
        groups = [
            {"params": [parameter for parameter in parameters if parameter not in apart], "lr": options["lr"]},
            {"params": list(heads), "lr": options["head_lr"], "name": HEAD},
        ]
    # A fused optimizer unscales gradients itself, so mixed precision cannot clip them before (Lightning #21435).
    fused = not trainer.gradient_clip_val
    made = optimizer(options["optimizer"], groups, options["weight_decay"], options["momentum"], fused)
    if options["schedule"] == "plateau":
        plateau = ReduceLROnPlateau(made, "min", factor=options["lr_factor"], patience=options["lr_patience"])
        return {"optimizer": made, "lr_scheduler": {"scheduler": plateau, "reduce_on_plateau": False}}
    steps = trainer.estimated_stepping_batches
    if steps == math.inf:
        raise UserError(f"schedule={options['schedule']} ends with the run: set max_epochs or max_steps.")
    if trainer.num_training_batches == math.inf:  # estimated from max_steps alone, without looking at the data
        trainer.fit_loop.setup_data()
    warmup = options["warmup_epochs"] * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    if warmup > steps:
        raise UserError(
            f"warmup_epochs={options['warmup_epochs']} is {warmup:g} steps, but the run has {steps}: lower it."
        )
    share = curve(options["schedule"], warmup, steps)
    return {"optimizer": made, "lr_scheduler": {"scheduler": LambdaLR(made, share), "interval": "step"}}
