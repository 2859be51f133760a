"""Data parallelism on the CPU, and what the freeze costs it: `python -m benchmarks.ddp`.

Two processes (gloo), each with half of the cores. A run is taken to its second epoch, when `BackboneFreeze` has
unfrozen and wrapped the model anew; then bare steps of that wrapper take turns with those of a copy that was wrapped
once, plainly, with those of processes that exchange nothing, and with those of one process while the other rests.
"""

import copy
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.turns import alternate, table
from cifar_transfer import BackboneFreeze, ShapesDataModule, TransferClassifier

BATCH, STEPS, ROUNDS, MOST_SECONDS = 64, 4, 20, 150


def steps(model: nn.Module, batch: tuple[Tensor, Tensor], work: bool = True) -> Callable[[], None]:
    """Bare steps of a module whose forward gives logits, then a wait for the other process."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)

    def run() -> None:
        for _ in range(STEPS if work else 0):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
        dist.barrier()

    return run


class Compare(Callback):
    """Runs the contest at the start of the second epoch."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the wrappers take turns, and print what came of it on the first rank."""
        if trainer.current_epoch == 0 or batch_idx:
            return
        wrapped = trainer.strategy.model
        assert isinstance(wrapped, DistributedDataParallel)

        def own() -> nn.Module:
            module = copy.deepcopy(pl_module)
            module.trainer = None  # type: ignore[assignment]
            return module

        contestants = {
            "plain DDP": steps(DistributedDataParallel(own()), batch),
            "DDP after the unfreezing": steps(wrapped, batch),
            "two processes without exchange": steps(own(), batch),
            "one process, the other at rest": steps(own(), batch, work=trainer.global_rank == 0),
        }
        times = alternate(contestants, ROUNDS, MOST_SECONDS)
        if trainer.is_global_zero:
            medians = {name: float(torch.tensor(values).median()) for name, values in times.items()}
            single = times.pop("one process, the other at rest")
            print(
                f"\n2 processes of {torch.get_num_threads()} threads, ResNet18, batches of {BATCH} each"
            )
            print(table(times, 2 * STEPS * BATCH))
            print(
                f"one process alone: {STEPS * BATCH / torch.tensor(single).median():.0f} images/s"
            )
            alone = medians["one process, the other at rest"]
            print(f"efficiency of plain DDP: {alone / medians['plain DDP']:.0%} of twice that")
        trainer.should_stop = True


def main() -> None:
    """Two tiny epochs with the contest in between."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    seed_everything(0)
    with tempfile.TemporaryDirectory() as folder:
        data = ShapesDataModule(train_images=4 * BATCH, test_images=50, batch_size=BATCH)
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[BackboneFreeze(unfreeze_epoch=1), Compare()],
            default_root_dir=folder,
        )
        trainer.fit(TransferClassifier("resnet18", "none", class_names=data.class_names), data)


if __name__ == "__main__":
    main()
