"""Time `fit` beside a tutorial's loop and the bare step: `python -m benchmarks.pipeline [options]`.

* The reference is the loop that tutorials show: torchvision's transforms on one PIL image after the
  other in the main process, batches of 64, torchvision's ResNet18, `optim.Adam`, float32,
  `loss.item()` in each step.
* `fit` is the command itself, with every callback, logger and metric. The others take their turns
  within its training, after every `CHUNK` steps, and their time is taken out.
* The floor is forward, backward and optimizer of our network, on one normalised batch that is
  already on the device, in the precision of `fit`; compiled where there is a GPU.

Options are those of `fit`, say `--trainer.precision=bf16-mixed`. The images are random: no step
takes longer for what an image shows.
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
from cifar_transfer import BackboneFreeze, TransferClassifier
from cifar_transfer.base.errors import one_sentence
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.training.lightning_internals import callbacks_of

CHUNK = 8  # steps a turn
ROUNDS = 14  # turns that count
WARM = 2  # turns before them


class Pictures(Dataset[tuple[Tensor, int]]):
    """Random images, made PIL images one by one, as torchvision's CIFAR10 does."""

    def __init__(self, count: int) -> None:
        self.images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        self.transform = torchvision_pipeline()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(to_pil_image(self.images[index])), index % 10


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over the batches of a loader without end."""
    while True:
        yield from loader


class Tutorial:
    """The loop that tutorials show."""

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self.device = device
        self.network = models.resnet18()
        self.network.fc = nn.Linear(512, 10)
        self.network.to(device)
        self.batches = endless(DataLoader(Pictures(2000), batch_size, shuffle=True, drop_last=True))
        self.mean = torch.tensor([0.49, 0.48, 0.45]).view(3, 1, 1)
        self.std = torch.tensor([0.20, 0.20, 0.20]).view(3, 1, 1)
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
            images = ((images - self.mean) / self.std).to(self.device)
            labels = labels.to(self.device)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.network(images), labels)
            loss.backward()
            self.optimizer.step()
            running += loss.item()


def floor(
    module: TransferClassifier, trainer: Trainer, batch: tuple[Tensor, Tensor]
) -> Callable[[], None]:
    """Return a function that makes bare steps of a copy of the module's network as it is now."""
    network = copy.deepcopy(module.network)
    for copied, original in zip(network.modules(), module.network.modules(), strict=True):
        copied.training = original.training
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
    images, labels = batch
    prepared = module.classifier.prepare(images, side=None)
    images = prepared.contiguous(memory_format=torch.channels_last)
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
    """Let the others run after every `CHUNK` steps of the training, and keep everybody's times."""

    def __init__(self) -> None:
        self.times: dict[str, dict[str, list[float]]] = {}  # by phase and contestant
        self.began = 0.0
        self.phase = ""
        self.tutorial: Tutorial | None = None
        self.floor: Callable[[], None] | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the floor, whose network is in the phase of the last epoch."""
        self.floor = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the others their turn."""
        if (batch_idx + 1) % CHUNK:
            return
        turn = batch_idx // CHUNK
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        fit_seconds = time.perf_counter() - self.began
        if self.tutorial is None:
            self.tutorial = Tutorial(pl_module.device, len(batch[1]))
        if self.floor is None:
            assert isinstance(pl_module, TransferClassifier)
            freeze = next(c for c in callbacks_of(trainer) if isinstance(c, BackboneFreeze))
            self.phase = "unfrozen" if freeze.everything_trains else "frozen"
            self.tutorial.freeze(not freeze.everything_trains)
            self.floor = floor(pl_module, trainer, batch)
            self.times[self.phase] = {"tutorial's loop": [], "fit": [], "floor": []}
        tutorial_seconds = seconds(self.tutorial)
        floor_seconds = seconds(self.floor)
        if turn >= WARM:
            times = self.times[self.phase]
            times["tutorial's loop"].append(tutorial_seconds)
            times["fit"].append(fit_seconds)
            times["floor"].append(floor_seconds)
        self.began = time.perf_counter()


def main() -> None:
    """Train one frozen and one unfrozen epoch, and print a table of each."""
    steps = CHUNK * (ROUNDS + WARM)
    images = 64 * steps
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "--data=ShapesDataModule",
            f"--data.train_images={images * 5 // 4}",
            "--data.test_images=100",
            "--data.val_fraction=0.2",
            "--model.weights=none",
            f"--trainer.limit_train_batches={steps}",
            "--trainer.limit_val_batches=1",
            "--trainer.max_epochs=2",
            f"--trainer.default_root_dir={folder}",
            "--freeze.unfreeze_epoch=1",
        ]
        cli = FitCLI([*options, *sys.argv[1:]])
        turns = Turns()
        callbacks_of(cli.trainer).append(turns)
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
