"""`BackboneFreeze`: train the head first, then everything.

Why not Lightning's `BaseFinetuning`. It thaws parameters that `DistributedDataParallel` was not told of when it wrapped
the model, so their gradients are never averaged and the ranks drift apart without a word (pytorch-lightning #20340); it
stays frozen when resumed after the unfreezing (#21901); and frozen batch-norm keeps learning (#21531). Here

* all parameters are in the optimizer from the start, only `requires_grad` changes;
* under DDP the model is wrapped anew at the unfreezing, so that the frozen epochs send the head's gradients alone and
  the later ones run in plain DDP, without `find_unused_parameters` and its search of the graph in every step;
* whether it has unfrozen is in the checkpoint, and one idempotent function puts the model into that state.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from cifar_transfer.console import counted
from cifar_transfer.errors import UserError, check
from cifar_transfer.training import resume
from cifar_transfer.training.optimizer import HEAD, LARGEST_RATE


class BackboneFreeze(Callback):
    """Keep parameters frozen for the first epochs, then unfreeze them at another learning rate.

    Args:
        unfreeze_epoch: How many epochs the parameters stay frozen. 0 never freezes and leaves the learning rate
            alone; with all epochs of the run only the head is ever trained (a linear probe).
        unfrozen_lr: Learning rate from then on of all parameter groups but one named "head"; None leaves it as it is. A
            `ReduceLROnPlateau` starts afresh, because losses of the frozen phase do not compare with later ones; a
            schedule of steps keeps its curve, which now leads up to this rate.
        frozen: Regular expressions; parameters whose name one of them matches from the start are frozen, for example
            `network\\.(conv1|bn1|layer[12])\\.`. None freezes all but the heads, which the module names in
            `heads` (submodules of its `network`).
        batch_norm: "eval" keeps frozen modules in eval mode, so that batch-norm uses and keeps the pretrained
            statistics and dropout is off; "train" lets the statistics follow the new data.

    Raises:
        UserError: A pattern that matches nothing, a strategy that shards parameters, or options that a resumed
            checkpoint would silently undo.

    Example::

        from lightning import Trainer
        from cifar_transfer import BackboneFreeze, CIFAR10DataModule, TransferClassifier

        freeze = BackboneFreeze(unfreeze_epoch=5, unfrozen_lr=1e-4)
        trainer = Trainer(max_epochs=40, callbacks=[freeze], devices=2)
        trainer.fit(TransferClassifier("resnet18"), CIFAR10DataModule("data"))
    """

    def __init__(
        self,
        unfreeze_epoch: int = 5,
        unfrozen_lr: float | None = 1e-4,
        frozen: list[str] | None = None,
        batch_norm: Literal["eval", "train"] = "eval",
    ) -> None:
        check("unfreeze_epoch", unfreeze_epoch, lambda n: n >= 0, "0 (never frozen) or a later epoch")
        if unfrozen_lr is not None:
            wanted = f"a positive rate up to {LARGEST_RATE}, or null to leave the rate as it is"
            check("unfrozen_lr", unfrozen_lr, lambda x: 0 < x <= LARGEST_RATE, wanted)
        for pattern in frozen or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"frozen has {pattern!r}, which is not a regular expression ({error}).") from None
        if frozen == []:
            raise UserError("frozen is []: name what is to be frozen, or freeze nothing with unfreeze_epoch=0.")
        self.unfreeze_epoch, self.unfrozen_lr = unfreeze_epoch, unfrozen_lr
        self.frozen, self.batch_norm = frozen, batch_norm
        self.unfrozen = unfreeze_epoch == 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze before the strategy wraps the model: DDP then leaves the backbone out."""
        if stage != "fit":
            return
        if self.unfreeze_epoch and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UserError(
                f"BackboneFreeze works on one device and under DDP, not under {type(trainer.strategy).__name__}, which "
                f"shards parameters when it wraps the model and cannot unfreeze some later: use strategy=ddp."
            )
        if self.frozen is None and not hasattr(pl_module, "heads"):
            raise UserError(
                f"{type(pl_module).__name__} names no head, so all of it would be frozen: give BackboneFreeze the "
                f"names of what to freeze, frozen=[...], or the module an attribute `heads`."
            )
        if next(self._frozen_parameters(pl_module), None) is None:
            raise UserError(
                f"No parameter's name begins with any of {self.frozen}: see the module's named_parameters()."
            )
        self._require_grad(pl_module)
        if not _trainable(pl_module):
            raise UserError(
                f"frozen={self.frozen} freezes every parameter, also the head's, so nothing would train: name fewer."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the state, which may come from a checkpoint: a run resumed within an epoch skips its start."""
        self._apply(trainer, pl_module)
        total = sum(p.numel() for p in pl_module.parameters())
        until = f"backbone frozen for {self.unfreeze_epoch} epochs" if not self.unfrozen else "nothing frozen"
        rank_zero_info(f"Trainable parameters: {_trainable(pl_module):,} of {total:,} ({until}).")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unfreeze when the epoch has come."""
        self._apply(trainer, pl_module)

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        transition = not self.unfrozen and trainer.current_epoch >= self.unfreeze_epoch
        self.unfrozen = self.unfrozen or transition
        changed, strategy = self._require_grad(pl_module), trainer.strategy
        if changed and isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
            strategy.model = pl_module  # the old wrapper, and with it its hooks on the gradients, goes
            strategy.configure_ddp()
        self._set_mode(pl_module)
        if transition:
            self._start_afresh(trainer)
            rate = "" if self.unfrozen_lr is None else f", learning rate {self.unfrozen_lr:g}"
            epoch, count = counted(trainer.current_epoch), _trainable(pl_module)
            rank_zero_info(f"Epoch {epoch}: unfrozen{rate}; trainable {count:,} parameters.")

    def _require_grad(self, pl_module: LightningModule) -> bool:
        changed = False
        for _, parameter in self._frozen_parameters(pl_module):
            changed |= parameter.requires_grad != self.unfrozen
            parameter.requires_grad_(self.unfrozen)
        return changed

    def _set_mode(self, pl_module: LightningModule) -> None:
        if self.batch_norm == "train" or self.unfreeze_epoch == 0:
            return
        names = {name for name, _ in self._frozen_parameters(pl_module)}
        for prefix, module in pl_module.named_modules():
            own = {f"{prefix}.{name}" for name, _ in module.named_parameters()}
            if own and own <= names:  # all of a block is frozen, so that its stochastic depth rests too
                module.train(self.unfrozen)

    def _start_afresh(self, trainer: Trainer) -> None:
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.best, scheduler.num_bad_epochs, scheduler.cooldown_counter = scheduler.mode_worse, 0, 0
        if self.unfrozen_lr is None:
            return
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            if group.get("name") != HEAD:
                group["lr"] = self.unfrozen_lr * group["lr"] / group.get("initial_lr", group["lr"])
        for config in trainer.lr_scheduler_configs:
            if hasattr(scheduler := config.scheduler, "base_lrs"):
                groups = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True)
                scheduler.base_lrs = [rate if group.get("name") == HEAD else self.unfrozen_lr for group, rate in groups]

    def _frozen_parameters(self, pl_module: LightningModule) -> Iterator[tuple[str, nn.Parameter]]:
        heads = tuple(f"network.{head}." for head in getattr(pl_module, "heads", ()))
        for name, parameter in pl_module.named_parameters():
            if any(re.match(pattern, name) for pattern in self.frozen) if self.frozen else not name.startswith(heads):
                yield name, parameter

    def state_dict(self) -> dict[str, Any]:
        """Whether it has unfrozen, and how it was told to."""
        return {"unfrozen": self.unfrozen} | self._settings()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue in the checkpoint's phase; a `UserError` if it has unfrozen already, under other settings."""
        saved, asked = resume.flat(freeze=state_dict), resume.flat(freeze=self._settings())
        for change in resume.compare(saved, asked, within_epoch=False, unfrozen=state_dict["unfrozen"]):
            rank_zero_info(change)
        self.unfrozen = state_dict["unfrozen"]

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("unfreeze_epoch", "unfrozen_lr", "frozen", "batch_norm")}


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
