"""An exponential moving average of the weights: what a run validates, saves and tests.

Lightning's `EMAWeightAveraging` is not used (seen in 2.6.6), because it has no warm-up, keeps the
average of a GPU's weights in host memory, averages integers, lacks a step if another callback saves
it first, is not asked for checkpoints of weights only, and takes the average for the weights in
what is saved during a validation or after the training.
"""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cifar_transfer.base.errors import UserError
from cifar_transfer.training.checkpoint_file import RAW_STATE_KEY, STEPS_KEY
from cifar_transfer.training.lightning_internals import callbacks_of, is_fitting


class ExponentialMovingAverage(Callback):
    """Averages a module's weights and batch-norm statistics after each optimizer step.

    The module holds the raw weights while it trains. It holds the average while a fit validates,
    and when the fit has ended. Checkpoints have the average as their `state_dict`.

    The order of events::

        on_fit_start               copy the weights, or take over the average of a resumed run
        each optimizer step        average = decay * average + (1 - decay) * weights
        on_validation_epoch_start  exchange weights and average
        on_validation_epoch_end    exchange them back
        add_to_checkpoint          put the average in the place of the weights. The module calls it,
                                   because Lightning asks no callback for weights-only checkpoints
        restart                    average = weights, for a phase that begins with the best ones
        on_load_checkpoint         restore the raw weights, and remember the average
        on_fit_end                 exchange, and leave the average in the module

    Args:
        decay: Share of the average that a step keeps, in [0, 1). In the first steps it is smaller,
            as in timm's ModelEmaV3 (https://github.com/huggingface/pytorch-image-models).

    Raises:
        UserError: Another callback averages the weights, the strategy shards them, or they have 16
            bits, in which small changes would be lost.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        # The average; while the module holds that, the weights that train.
        self._other: dict[str, Tensor] = {}
        self._module_holds_average = False
        self._resumed_average: dict[str, Tensor] = {}
        self._steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights as they are on their device, or with a resumed run's average."""
        self._check(trainer, pl_module)
        self._module_holds_average = False
        self._other = _copy(pl_module)
        for name, value in self._resumed_average.items():
            if name in self._other:
                self._other[name].copy_(value)
        if not self._resumed_average:
            self._steps = 0
        self._resumed_average = {}
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self._update(pl_module))

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in callbacks_of(trainer):
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                name = type(callback).__name__
                raise UserError(f"ema={self.decay} and {name} both average the weights: take one.")
        is_whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        has_16_bits = pl_module.dtype in (torch.float16, torch.bfloat16)
        if not is_whole or has_16_bits:
            raise UserError(
                f"ema={self.decay} averages whole weights of 32 bits or more, not those of "
                f"{type(trainer.strategy).__name__} and precision={trainer.precision}: use one "
                f"device or strategy=ddp, with 32-true, bf16-mixed or 16-mixed."
            )

    @torch.no_grad()
    def _update(self, pl_module: LightningModule) -> None:
        """Average the weights after a step; integers, such as batch counts, are copied."""
        averages = []
        weights = []
        for name, value in _parameters_and_buffers(pl_module):
            average = self._other[name]
            if average.is_floating_point():
                averages.append(average)
                weights.append(value)
            else:
                average.copy_(value)
        decay = min(self.decay, 1 - (1 + self._steps) ** (-2 / 3))
        update_all = get_ema_multi_avg_fn(decay)
        update_all(averages, weights, 0)
        self._steps += 1

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        if self._other and is_fitting(pl_module):
            self._exchange(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train on with the raw weights."""
        if self._other and is_fitting(pl_module):
            self._exchange(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        if self._other:
            self._exchange(trainer, pl_module)

    @torch.no_grad()
    def _exchange(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._module_holds_average and trainer.world_size > 1:
            # DDP trains each process with its own batch-norm statistics, and saves the first's.
            for name, _ in pl_module.named_buffers():
                torch.distributed.broadcast(self._other[name], 0)
        for name, value in _parameters_and_buffers(pl_module):
            previous = value.clone()
            value.copy_(self._other[name])
            self._other[name].copy_(previous)
        self._module_holds_average = not self._module_holds_average

    def restart(self, pl_module: LightningModule) -> None:
        """Take the weights that the module has been given for the average, and go on from there."""
        for name, value in _copy(pl_module).items():
            self._other[name] = value

    def add_to_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the average in the place of the weights, and the weights beside it."""
        if not self._other:
            return
        module_state = checkpoint["state_dict"]
        other_state = {}
        for name, value in module_state.items():
            other_state[name] = self._other.get(name, value)
        if self._module_holds_average:
            checkpoint["state_dict"] = module_state
            checkpoint[RAW_STATE_KEY] = other_state
        else:
            checkpoint["state_dict"] = other_state
            checkpoint[RAW_STATE_KEY] = module_state
        checkpoint[STEPS_KEY] = self._steps

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the raw weights of a run that continues; the module has loaded the average."""
        average = checkpoint["state_dict"]
        raw_state = checkpoint.get(RAW_STATE_KEY, {})
        if STEPS_KEY not in checkpoint or average.keys() != raw_state.keys():
            raise UserError(
                f"ema={self.decay} finds no average in the checkpoint that it could continue: "
                f"leave it out, or begin a new run from its weights with "
                f"--model.weights=CHECKPOINT."
            )
        pl_module.load_state_dict(raw_state)
        self._resumed_average = average
        self._steps = checkpoint[STEPS_KEY]


def _parameters_and_buffers(module: LightningModule) -> Iterable[tuple[str, Tensor]]:
    """Yield names and tensors; shared weights come once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _copy(module: LightningModule) -> dict[str, Tensor]:
    """Return a copy of all weights and buffers by each of their names; names of one share one."""
    copies: dict[int, Tensor] = {}
    named: dict[str, Tensor] = {}
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    for name, value in [*parameters, *buffers]:
        if id(value) not in copies:
            copies[id(value)] = value.detach().clone()
        named[name] = copies[id(value)]
    return named
