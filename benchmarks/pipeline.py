"""How fast `fit` trains beside a tutorial's loop and the bare step: `python -m benchmarks.pipeline [options]`.

* The reference is the loop that tutorials show: torchvision's transforms on one PIL image after the other in the main
  process, batches of 64, torchvision's ResNet18, `optim.Adam`, float32, `loss.item()` in each step.
* `fit` is the command itself, with every callback, logger and metric. The others take their turns within its training,
  after each so many steps, and their time is taken out.
* The floor is forward, backward and optimizer of our network, on one normalised batch that is already on the device,
  in the precision of `fit`; compiled where there is a GPU.

Options are those of `fit`, say `--trainer.precision=bf16-mixed`. The images are random: no step takes longer for what
an image shows.
"""

import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.transforms.functional import to_pil_image

from benchmarks.augment import torchvision_pipeline
from benchmarks.turns import seconds, table
from cifar_transfer import BackboneFreeze
from cifar_transfer.base.errors import one_sentence
from cifar_transfer.cli.fit_cli import FitCLI

CHUNK, ROUNDS, WARM = 8, 14, 2
"""Steps a turn, turns that count, turns before them."""


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's CIFAR10 keeps them: an array, made a PIL image when asked for."""

    def __init__(self, count: int) -> None:
        self.images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        self.transform = torchvision_pipeline()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(to_pil_image(self.images[index])), index % 10


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """Batches without end."""
    while True:
        yield from loader


class Tutorial:
    """The reference."""

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self.device = device
        self.network = models.resnet18()
        self.network.fc = nn.Linear(512, 10)
        self.network.to(device)
        self.batches = endless(DataLoader(Pictures(2000), batch_size, shuffle=True, drop_last=True))
        self.mean, self.std = (
            torch.tensor(v).view(3, 1, 1) for v in ((0.49, 0.48, 0.45), (0.20, 0.20, 0.20))
        )
        self.freeze(True)

    def freeze(self, frozen: bool) -> None:
        """Train the head alone, or all; each with an optimizer of its own."""
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(not frozen or name.startswith("fc."))
        trainable = [
            parameter for parameter in self.network.parameters() if parameter.requires_grad
        ]
        self.optimizer = torch.optim.Adam(trainable, lr=1e-4, weight_decay=1e-4)

    def __call__(self) -> None:
        """Train for one turn."""
        self.network.train()
        running = 0.0
        for _ in range(CHUNK):
            images, labels = next(self.batches)
            images, labels = (
                ((images - self.mean) / self.std).to(self.device),
                labels.to(self.device),
            )
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.network(images), labels)
            loss.backward()
            self.optimizer.step()
            running += loss.item()


def floor(
    module: LightningModule, trainer: Trainer, batch: tuple[Tensor, Tensor]
) -> Callable[[], None]:
    """Bare steps of a copy of the module's network in its present phase."""
    network: nn.Module = copy.deepcopy(module.network)  # type: ignore[arg-type]
    for one, other in zip(network.modules(), module.network.modules(), strict=True):  # type: ignore[operator]
        one.training = other.training
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
    images, labels = batch
    images = ((images - module.mean) / module.std).contiguous(memory_format=torch.channels_last)  # type: ignore[operator]
    step = torch.compile(network) if images.is_cuda else network

    def steps() -> None:
        for _ in range(CHUNK):
            with trainer.precision_plugin.forward_context():
                loss = F.cross_entropy(step(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return steps


class Turns(Callback):
    """Lets the others run after each `CHUNK` steps of the training, and keeps everybody's times."""

    def __init__(self) -> None:
        self.times: dict[str, dict[str, list[float]]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the others their turn."""
        if (batch_idx + 1) % CHUNK:
            return
        turn = batch_idx // CHUNK
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        own = time.perf_counter() - self.began if turn else 0.0
        if turn == 0:
            freeze = next(c for c in trainer.callbacks if isinstance(c, BackboneFreeze))  # type: ignore[attr-defined]
            self.phase = "unfrozen" if freeze.everything_trains else "frozen"
            if not hasattr(self, "tutorial"):
                self.tutorial = Tutorial(pl_module.device, len(batch[1]))
            self.tutorial.freeze(not freeze.everything_trains)
            self.floor = floor(pl_module, trainer, batch)
            self.times[self.phase] = {"tutorial's loop": [], "fit": [], "floor": []}
        tutorial, bare = seconds(self.tutorial), seconds(self.floor)
        if turn >= WARM:
            for name, value in zip(self.times[self.phase], (tutorial, own, bare), strict=True):
                self.times[self.phase][name].append(value)
        self.began = time.perf_counter()


def main() -> None:
    """Train one frozen and one unfrozen epoch, and print a table of each."""
    images = 64 * CHUNK * (ROUNDS + WARM)
    with tempfile.TemporaryDirectory() as folder:
        cli = FitCLI(
            [
                *(
                    "--data=ShapesDataModule",
                    f"--data.train_images={images * 5 // 4}",
                    "--data.test_images=100",
                ),
                *("--data.val_fraction=0.2", "--model.weights=none"),
                *(
                    f"--trainer.limit_train_batches={CHUNK * (ROUNDS + WARM)}",
                    "--trainer.limit_val_batches=1",
                ),
                *(
                    "--trainer.max_epochs=2",
                    "--freeze.unfreeze_epoch=1",
                    f"--trainer.default_root_dir={folder}",
                ),
                *sys.argv[1:],
            ]
        )
        turns = Turns()
        cli.trainer.callbacks.append(turns)  # type: ignore[attr-defined]
        cli.trainer.fit(cli.model, cli.datamodule)
    for phase, times in turns.times.items():
        shares = torch.tensor(times["floor"]) / torch.tensor(times["fit"])
        print(f"\n{phase}, {torch.get_num_threads()} threads, {cli.trainer.precision}:")
        print(table(times, CHUNK * cli.datamodule.batch_size), end="")
        low, median, high = shares.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        print(f"fit has {median:.2f} of the floor's images/s (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    with one_sentence():
        main()
