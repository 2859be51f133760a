"""An exponential moving average of the weights: what a run validates, keeps in its checkpoints and tests.

Why not Lightning's `EMAWeightAveraging`: it has no warm-up, keeps a GPU's average in host memory, averages integers,
lacks a step if another callback saves it first, is not asked for checkpoints of weights only, and mistakes the average
for the weights in what is saved during a validation or after the training.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cifar_transfer.base.errors import UserError
from cifar_transfer.training.checkpoint_file import RAW, STEPS
from cifar_transfer.training.image_sizes import SizedModule


class AveragedModule(SizedModule):
    """A classifier that averages its weights after each step of the optimizer, if its option `ema` is a decay.

    Batch-norm's statistics are averaged as the weights are: they belong to them, and nothing has to be run again. While
    fitting validates, and when it has ended, the module has the average; checkpoints have it as their `state_dict`.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self._other: dict[
            str, Tensor
        ] = {}  # the average, or while that is in use, the weights that train
        self._saved: dict[str, Tensor] = {}  # the average of a run that continues
        self._steps, self._in_use = 0, False

    def on_fit_start(self) -> None:
        """Begin with the weights as they are on their device, or take up the average of the run that continues."""
        super().on_fit_start()
        self._other, self._in_use = {}, False
        if self.hparams["ema"] is None:
            return
        for other in (type(one) for one in self.trainer.callbacks):  # type: ignore[attr-defined] # set by a connector
            if issubclass(other, WeightAveraging | StochasticWeightAveraging):
                raise UserError(
                    f"ema={self.hparams['ema']} and {other.__name__} both average the weights: take one."
                )
        whole = isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if not whole or self.dtype in (torch.float16, torch.bfloat16):
            raise UserError(
                f"ema={self.hparams['ema']} averages whole weights of 32 bits or more, not those of "
                f"{type(self.trainer.strategy).__name__} and precision={self.trainer.precision}: use one device or "
                f"strategy=ddp, with 32-true, bf16-mixed or 16-mixed."
            )
        every = chain(
            self.named_parameters(remove_duplicate=False),
            self.named_buffers(remove_duplicate=False),
        )
        copies: dict[int, Tensor] = {}  # of shared weights one
        self._other = {
            name: copies.setdefault(id(now), now.detach().clone()) for name, now in every
        }
        for name in self._other.keys() & self._saved.keys():
            self._other[name].copy_(self._saved[name])
        self._steps, self._saved = self._steps if self._saved else 0, {}
        for optimizer in self.trainer.optimizers:
            optimizer.register_step_post_hook(self._follow)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        named = chain(self.named_parameters(), self.named_buffers())
        return ((self._other[name], now) for name, now in named)

    @torch.no_grad()
    def _follow(self, *_: Any) -> None:
        pairs = list(self._pairs())
        numbers = [pair for pair in pairs if pair[0].is_floating_point()]
        # The warm-up of timm's ModelEmaV3 (https://github.com/huggingface/pytorch-image-models): the first is a copy.
        decay = min(self.hparams["ema"], 1 - (1 + self._steps) ** (-2 / 3))
        get_ema_multi_avg_fn(decay)(
            [average for average, _ in numbers], [now for _, now in numbers], 0
        )
        for average, now in pairs:
            if not average.is_floating_point():
                average.copy_(now)
        self._steps += 1

    @torch.no_grad()
    def _exchange(self) -> None:
        if (
            not self._in_use and self.trainer.world_size > 1
        ):  # as DDP does: batch-norm's are those of the first
            for name, _ in self.named_buffers():
                torch.distributed.broadcast(self._other[name], 0)
        for other, now in self._pairs():
            kept = now.clone()
            now.copy_(other)
            other.copy_(kept)
        self._in_use = not self._in_use

    def on_validation_epoch_start(self) -> None:
        """Have the average validated."""
        if self._other and self.trainer.state.fn == TrainerFn.FITTING:
            self._exchange()

    def on_validation_epoch_end(self) -> None:
        """Train on with the raw weights."""
        super().on_validation_epoch_end()
        if self._other and self.trainer.state.fn == TrainerFn.FITTING:
            self._exchange()

    def on_fit_end(self) -> None:
        """Leave the average in the module."""
        if self._other:
            self._exchange()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the average, and what is needed to go on with it."""
        super().on_save_checkpoint(checkpoint)
        if self._other:
            now = checkpoint["state_dict"]
            other = {name: self._other.get(name, value) for name, value in now.items()}
            raw, average = (other, now) if self._in_use else (now, other)
            checkpoint.update({"state_dict": average, RAW: raw, STEPS: self._steps})

    def take_up_average(self, checkpoint: dict[str, Any]) -> None:
        """Have the run that continues from a checkpoint load its raw weights, and later its average."""
        if self.hparams["ema"] is None:
            return
        forms = [
            {name: value.shape for name, value in checkpoint.get(key, {}).items()}
            for key in ("state_dict", RAW)
        ]
        if forms[0] != forms[1] or STEPS not in checkpoint:
            raise UserError(
                f"ema={self.hparams['ema']} finds no average in the checkpoint that it could continue: leave it out, "
                f"or begin a new run from its weights with --model.weights=CHECKPOINT."
            )
        self._saved, self._steps = checkpoint["state_dict"], checkpoint[STEPS]
        checkpoint["state_dict"] = checkpoint[RAW]
