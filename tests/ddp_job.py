"""A job that the tests of DDP start; every rank writes what it saw.

`python ddp_job.py FOLDER STRATEGY DEVICES [phases|balanced|TEACHER.ckpt]`
"""

import gc
import sys
from pathlib import Path

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from cifar_transfer import Augment, BackboneFreeze, Phase, ShapesDataModule, TransferClassifier

PHASES = [Phase(["head"]), Phase(["stage4", "conv5"], epoch=1, lr=2e-4), Phase(["all"], epoch=2)]


class Witness(Callback):
    """Keep the batch, the weights before it and the gradients of the first step of each epoch."""

    def __init__(self):
        self.steps = []
        self.wrappers = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        # Statistics of half a batch are not those of the whole, so that gradients compare only
        # with batch-norm in eval mode.
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()
        if batch_idx == 0:
            self.wrappers.append(sum(type(o) is DistributedDataParallel for o in gc.get_objects()))
            assert type(trainer.strategy.model) is DistributedDataParallel
            state = {name: value.clone() for name, value in module.state_dict().items()}
            self.steps.append(
                {"images": batch[0].clone(), "labels": batch[1].clone(), "before": state}
            )

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if "gradients" not in self.steps[-1]:
            named = module.named_parameters()
            self.steps[-1]["gradients"] = {
                n: p.grad.clone() for n, p in named if p.grad is not None
            }


def main(folder, strategy, devices, case=None):
    torch.set_num_threads(1)
    seed_everything(0)
    off = Augment(
        padding=0, flip=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, degrees=0.0
    )
    images = {"train_images": 160}
    if case == "balanced":
        images = {"train_images": 157, "val_fraction": 0.4, "class_weights": case}
    data = ShapesDataModule(**images, test_images=45, batch_size=16, augment=off)
    teacher = case if case and case.endswith(".ckpt") else None
    model = TransferClassifier(
        "shufflenet_v2_x0_5", "none", class_names=data.class_names, teacher=teacher
    )
    witness = Witness()
    trainer = Trainer(
        accelerator="cpu",
        devices=int(devices),
        strategy=strategy,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BackboneFreeze(1, phases=PHASES if case == "phases" else None), witness],
        default_root_dir=folder,
    )
    trainer.fit(model, data)
    end = {
        "state": model.state_dict(),
        "val": float(trainer.callback_metrics["val/loss"]),
        "wrappers": witness.wrappers,
    }
    torch.save({"steps": witness.steps, **end}, Path(folder, f"rank{trainer.global_rank}.pt"))
    figures = trainer.test(model, data, verbose=False)[0]
    torch.save(figures, Path(folder, f"test{trainer.global_rank}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
