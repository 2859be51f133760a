"""How fast `fit` trains beside a tutorial's loop and the bare step.

    python -m benchmarks.pipeline [options of fit, such as --trainer.precision=bf16-mixed]

* The reference is the loop that tutorials show: torchvision's transforms on one PIL image after the
  other in the main process, batches of 64, torchvision's ResNet18, `optim.Adam`, float32,
  `loss.item()` in each step.
* `fit` is the command itself, with every callback, logger and metric. The others take their turns
  within its training, after each few steps, and their time is taken out.
* The floor is forward, backward and optimizer of our network, on one normalised batch that is
  already on the device, in the precision of `fit`; compiled where there is a GPU.

The images are random: no step takes longer because of what an image shows.
"""

import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms
from torchvision.transforms.functional import to_pil_image

from benchmarks.turns import QUARTILES, seconds, table
from cifar_transfer import BackboneFreeze
from cifar_transfer.base.errors import one_sentence
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.training.lightning_internals import callbacks_of

STEPS_PER_TURN = 8
COUNTED_TURNS = 14
WARM_UP_TURNS = 2  # before those that count
TUTORIAL_IMAGES = 2000
NAMES = ("tutorial's loop", "fit", "floor")


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's CIFAR10 keeps them: an array, made a PIL image when asked for."""

    def __init__(self, count: int) -> None:
        self.images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(0.5),
                transforms.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
                transforms.RandomRotation(15),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(to_pil_image(self.images[index])), index % 10


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield batches without end."""
    while True:
        yield from loader


class Tutorial:
    """The reference."""

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self.device = device
        self.network = models.resnet18()
        self.network.fc = nn.Linear(512, 10)
        self.network.to(device)
        pictures = Pictures(TUTORIAL_IMAGES)
        loader = DataLoader(pictures, batch_size, shuffle=True, drop_last=True)
        self.batches = endless(loader)
        self.mean = torch.tensor([0.49, 0.48, 0.45]).view(3, 1, 1)
        self.std = torch.tensor([0.20, 0.20, 0.20]).view(3, 1, 1)
        self.freeze(True)

    def freeze(self, frozen: bool) -> None:
        """Train the head alone, or everything; each with an optimizer of its own."""
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(not frozen or name.startswith("fc."))
        trainable = [
            parameter for parameter in self.network.parameters() if parameter.requires_grad
        ]
        self.optimizer = torch.optim.Adam(trainable, lr=1e-4, weight_decay=1e-4)

    def __call__(self) -> None:
        """Train for one turn."""
        self.network.train()
        running_loss = 0.0
        for _ in range(STEPS_PER_TURN):
            images, labels = next(self.batches)
            images = ((images - self.mean) / self.std).to(self.device)
            labels = labels.to(self.device)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.network(images), labels)
            loss.backward()
            self.optimizer.step()
            running_loss += loss.item()


def floor(module: Any, trainer: Trainer, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """Return bare steps of a copy of a `TransferClassifier`'s network in its present phase."""
    network = copy.deepcopy(module.network)
    for copied, original in zip(network.modules(), module.network.modules(), strict=True):
        copied.training = original.training
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
    images, labels = batch
    images = module.classifier.prepare(images, module.largest_side)
    images = images.contiguous(memory_format=torch.channels_last)
    forward = torch.compile(network) if images.is_cuda else network

    def steps() -> None:
        for _ in range(STEPS_PER_TURN):
            with trainer.precision_plugin.forward_context():
                loss = F.cross_entropy(forward(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return steps


class Turns(Callback):
    """Lets the others run after each few steps of the training, and keeps everybody's times.

    Attributes:
        times: Seconds of each turn, by phase and contestant.
    """

    def __init__(self) -> None:
        self.times: dict[str, dict[str, list[float]]] = {}
        self._turn_began = 0.0
        self._phase = ""
        self._tutorial: Tutorial | None = None
        self._floor: Callable[[], None]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the others their turn."""
        if (batch_idx + 1) % STEPS_PER_TURN != 0:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        fit_seconds = time.perf_counter() - self._turn_began
        turn = batch_idx // STEPS_PER_TURN
        if turn == 0:
            self._begin_phase(trainer, pl_module, batch)
        assert self._tutorial is not None
        durations = (seconds(self._tutorial), fit_seconds, seconds(self._floor))
        if turn >= WARM_UP_TURNS:
            for name, duration in zip(NAMES, durations, strict=True):
                self.times[self._phase][name].append(duration)
        self._turn_began = time.perf_counter()

    def _begin_phase(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        freeze = _freeze_callback(trainer)
        self._phase = "unfrozen" if freeze.everything_trains else "frozen"
        self.times[self._phase] = {name: [] for name in NAMES}
        if self._tutorial is None:
            self._tutorial = Tutorial(pl_module.device, len(batch[1]))
        self._tutorial.freeze(not freeze.everything_trains)
        self._floor = floor(pl_module, trainer, batch)


def _freeze_callback(trainer: Trainer) -> BackboneFreeze:
    callbacks = callbacks_of(trainer)
    return next(callback for callback in callbacks if isinstance(callback, BackboneFreeze))


def main(args: Sequence[str]) -> None:
    """Train one frozen and one unfrozen epoch, and print a table of each."""
    steps = STEPS_PER_TURN * (COUNTED_TURNS + WARM_UP_TURNS)
    images = 64 * steps
    turns = Turns()
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
            "--freeze.unfreeze_epoch=1",
            f"--trainer.default_root_dir={folder}",
        ]
        cli = FitCLI([*options, *args])
        callbacks_of(cli.trainer).append(turns)
        cli.trainer.fit(cli.model, cli.datamodule)
    for phase, times in turns.times.items():
        print(f"\n{phase}, {torch.get_num_threads()} threads, {cli.trainer.precision}:")
        print(table(times, STEPS_PER_TURN * cli.datamodule.batch_size), end="")
        shares = torch.tensor(times["floor"]) / torch.tensor(times["fit"])
        low, median, high = shares.quantile(QUARTILES).tolist()
        print(f"fit has {median:.2f} of the floor's images/s (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    with one_sentence():
        main(sys.argv[1:])
