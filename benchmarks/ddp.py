"""Data parallelism on the CPU, and what the freeze costs it: `python -m benchmarks.ddp`.

Two processes (gloo), each with half of the cores. A run is taken to its second epoch, when
`BackboneFreeze` has unfrozen and wrapped the model anew. Then bare steps of that wrapper take turns
with those of a copy that was wrapped once, plainly, with those of processes that exchange nothing,
and with those of one process while the other rests.
"""

import argparse
import copy
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
from cifar_transfer.base.machine import cores

BATCH_SIZE = 64
STEPS_PER_TURN = 4
MAX_SECONDS = 150
ALONE = "one process, the other at rest"


def steps(
    model: nn.Module, batch: tuple[Tensor, Tensor], count: int = STEPS_PER_TURN
) -> Callable[[], None]:
    """Return bare steps of a module that gives logits; each turn ends with a barrier."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
    images, labels = batch

    def run() -> None:
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        dist.barrier()

    return run


def detached_copy(module: LightningModule) -> LightningModule:
    """Return a copy without a trainer."""
    copied = copy.deepcopy(module)
    copied.trainer = None
    return copied


class Compare(Callback):
    """Runs the contest at the start of the second epoch, and ends the training.

    Args:
        rounds: Number of rounds.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the wrappers take turns, and print the table on the first rank."""
        if trainer.current_epoch == 0 or batch_idx > 0:
            return
        wrapped = trainer.strategy.model
        assert isinstance(wrapped, DistributedDataParallel)
        steps_alone = STEPS_PER_TURN if trainer.global_rank == 0 else 0
        contestants = {
            "plain DDP": steps(DistributedDataParallel(detached_copy(pl_module)), batch),
            "DDP after the unfreezing": steps(wrapped, batch),
            "two processes without exchange": steps(detached_copy(pl_module), batch),
            ALONE: steps(detached_copy(pl_module), batch, steps_alone),
        }
        times = alternate(contestants, self.rounds, MAX_SECONDS)
        if trainer.is_global_zero:
            report(times)
        trainer.should_stop = True


def report(times: dict[str, list[float]]) -> None:
    """Print images per second, and the efficiency of plain DDP."""
    plain_seconds = float(torch.tensor(times["plain DDP"]).median())
    seconds_alone = float(torch.tensor(times.pop(ALONE)).median())
    threads = torch.get_num_threads()
    print(f"\n2 processes of {threads} threads, ResNet18, batches of {BATCH_SIZE} each")
    print(table(times, 2 * STEPS_PER_TURN * BATCH_SIZE))
    print(f"one process alone: {STEPS_PER_TURN * BATCH_SIZE / seconds_alone:.0f} images/s")
    print(f"efficiency of plain DDP: {seconds_alone / plain_seconds:.0%} of twice that")


def main() -> None:
    """Train two tiny epochs with the contest in between."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=20, help="Rounds of the contest.")
    parser.add_argument("--backbone", default="resnet18", help="Network of the contest.")
    options = parser.parse_args()
    torch.set_num_threads(max(1, cores() // 2))
    seed_everything(0)
    with tempfile.TemporaryDirectory() as folder:
        data = ShapesDataModule(train_images=4 * BATCH_SIZE, test_images=50, batch_size=BATCH_SIZE)
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[BackboneFreeze(unfreeze_epoch=1), Compare(options.rounds)],
            default_root_dir=folder,
        )
        model = TransferClassifier(options.backbone, "none", class_names=data.class_names)
        trainer.fit(model, data)


if __name__ == "__main__":
    main()
