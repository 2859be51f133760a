"""What each contestant of `benchmarks.peers` is given to do, and the line that it prints an epoch.

A contestant is a process of its own. It takes a `PeerJob` as JSON, and prints a line with
`print_epoch` when it has validated an epoch, so that `benchmarks.peers` can note the time.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

Phase = Literal["frozen", "unfrozen"]

EPOCH_MARK = "PEER-EPOCH "  # begins the lines of `print_epoch`
MEAN = (0.485, 0.456, 0.406)  # of ImageNet, of values in [0, 1]
DEVIATION = (0.229, 0.224, 0.225)
PADDING = 4  # pixels on every side, before a crop to the image's size
WEIGHT_DECAY = 0.01  # decoupled: AdamW in PyTorch and timm, Adam in fastai


@dataclass(frozen=True)
class PeerJob:
    """A fine-tuning of ResNet18, the same for all contestants.

    Attributes:
        root: Folder of the images, laid out as `train/<class>/*` and `test/<class>/*`.
        weights: File of a state dict of torchvision's ResNet18, whose head is not used.
        image_size: Side in pixels of the squares that the network takes.
        batch_size: Images a step.
        frozen_epochs: Epochs in which only the head trains, by contestants that have such a phase.
        unfrozen_epochs: Epochs in which everything trains. Contestants without a frozen phase train
            everything in all epochs.
        lr: Learning rate that the contestant's own schedule starts from.
        workers: Processes that load images.
        seed: Seed of the new head, the order of the images and their augmentation.
        device: "cpu" or "cuda".
    """

    root: str
    weights: str
    image_size: int
    batch_size: int
    frozen_epochs: int
    unfrozen_epochs: int
    lr: float
    workers: int
    seed: int
    device: str

    @property
    def epochs(self) -> int:
        """Number of all epochs."""
        return self.frozen_epochs + self.unfrozen_epochs

    @property
    def num_classes(self) -> int:
        """Number of folders in `train/`."""
        folders = [path for path in Path(self.root, "train").iterdir() if path.is_dir()]
        return len(folders)

    def to_json(self) -> str:
        """Return the job as an argument of a command."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "PeerJob":
        """Return the job that `to_json` wrote."""
        return cls(**json.loads(text))


def print_epoch(phase: Phase, images: int, seconds: float, accuracy: float) -> None:
    """Print the line of an epoch that has been validated.

    Args:
        phase: What trained.
        images: Number of images trained on.
        seconds: Time of the training, without that of the validation.
        accuracy: Share of the test images that are classified correctly, in [0, 1].
    """
    values = {"phase": phase, "images": images, "seconds": seconds, "accuracy": accuracy}
    print(f"{EPOCH_MARK}{json.dumps(values)}", flush=True)


def pretrained_resnet18(weights: str) -> models.ResNet:
    """Return torchvision's ResNet18 with the weights of a file, but for its head, which is new."""
    network = models.resnet18()
    state = torch.load(weights, map_location="cpu", weights_only=True)
    for name in ("fc.weight", "fc.bias"):
        state[name] = network.state_dict()[name]
    network.load_state_dict(state)
    return network


def network_with_head(job: PeerJob) -> models.ResNet:
    """Return ResNet18 with the pretrained weights and a new head for the classes of the images."""
    network = pretrained_resnet18(job.weights)
    network.fc = nn.Linear(network.fc.in_features, job.num_classes)
    return network


def loaders(job: PeerJob) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of the training and of the test images, as torchvision's users write them.

    Images are float32 [N, 3, image_size, image_size], normalised. Those of training are cropped
    after padding with black, and flipped.
    """
    side = [job.image_size, job.image_size]
    to_normalised = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, DEVIATION),
    ]
    augment = [v2.RandomCrop(side, padding=PADDING), v2.RandomHorizontalFlip()]
    train_transform = v2.Compose([v2.Resize(side), *augment, *to_normalised])
    test_transform = v2.Compose([v2.Resize(side), *to_normalised])
    train_images = ImageFolder(str(Path(job.root, "train")), train_transform)
    test_images = ImageFolder(str(Path(job.root, "test")), test_transform)
    on_gpu = job.device == "cuda"
    train_loader: DataLoader = DataLoader(
        train_images,
        job.batch_size,
        shuffle=True,
        num_workers=job.workers,
        pin_memory=on_gpu,
    )
    test_loader: DataLoader = DataLoader(
        test_images,
        job.batch_size,
        num_workers=job.workers,
        pin_memory=on_gpu,
    )
    return train_loader, test_loader
