"""A small LightningModule that is not the project's, and a fit of it that is watched."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from conftest import quiet_trainer
from lightning import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from cifar_transfer import BackboneFreeze

STEPS = 4  # an epoch


class Net(LightningModule):
    """A small network; what a test is about is given, or overridden."""

    def __init__(
        self,
        backbone=None,
        head=None,
        optimizer=lambda module: SGD(module.parameters(), 0.01),
        schedule=None,
    ):
        super().__init__()
        self.backbone = backbone or nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16)
        )
        self.head = head or nn.Linear(16, 3)
        self.make, self.schedule = optimizer, schedule

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        made = self.make(self)
        if self.schedule is None:
            return made
        return {
            "optimizer": made,
            "lr_scheduler": {"scheduler": self.schedule(made), "interval": "step"},
        }


class Watch(Callback):
    """Notes the state before each step, and after the last."""

    def __init__(self):
        self.rates, self.weights, self.trains, self.eval = [], [], [], []

    def note(self, trainer, module):
        self.rates.append(
            [group["lr"] for each in trainer.optimizers for group in each.param_groups]
        )
        self.weights.append(
            {name: value.detach().clone() for name, value in module.state_dict().items()}
        )
        self.trains.append({name for name, p in module.named_parameters() if p.requires_grad})
        self.eval.append({name for name, child in module.named_modules() if not child.training})

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.note(trainer, module)

    def on_train_end(self, trainer, module):
        self.note(trainer, module)

    def moved(self, name):
        """In which epochs a tensor changes."""
        values = [weights[name] for weights in self.weights[::STEPS]]
        return [not torch.equal(one, other) for one, other in pairwise(values)]


def batches():
    chance = torch.Generator().manual_seed(0)
    images = torch.randn(STEPS * 8, 8, generator=chance)
    return DataLoader(TensorDataset(images, (images[:, :2] > 0).sum(1)), batch_size=8)


def fit(module, freeze, epochs=3, callbacks=(), ckpt_path=None, **options):
    seed_everything(0)
    watch = Watch()
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[freeze, watch, *callbacks], **options)
    trainer.fit(module, batches(), ckpt_path=ckpt_path)
    return watch


def freeze(unfreeze_epoch=1, unfrozen_lr=1e-4, frozen=("backbone",), **options):
    return BackboneFreeze(unfreeze_epoch, unfrozen_lr, list(frozen), **options)


def trainable(module):
    return SGD([p for p in module.parameters() if p.requires_grad], 0.01)
