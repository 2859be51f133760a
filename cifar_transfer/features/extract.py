"""What a frozen backbone gives its head for each image of a data module, computed once and kept.

images (uint8) -> device -> float32 in [0, 1] -> a view of them -> network, in eval mode -> what comes into its head
"""

import hashlib
import math
import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.augment import step_seed
from cifar_transfer.data.geometry import to_float
from cifar_transfer.data.images import Batch
from cifar_transfer.data.loading import rows_loader
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.data.splits import Split
from cifar_transfer.features.store import LIMIT_GB, FeatureFile, default_folder, make_room

BATCH_PIXELS = 2**20  # that the network sees at once, within 8 to 256 images
TRIED = 16  # validation images
VERSION = b"2"  # of what features are: another one computes all anew


class Features(NamedTuple):
    """Of N images."""

    views: list[
        np.ndarray
    ]  # [N, D] each, memory-mapped: float16 of training images, float32 of others
    labels: np.ndarray  # int64 [N]


class Part(NamedTuple):
    """A view of a split's images."""

    split: Split
    view: int
    file: FeatureFile
    missing: list[int]  # batches that this process computes


class FeatureExtractor(LightningModule):
    """Computes what is missing of the features of a data module's images, on as many devices as the Trainer has.

    Images of training are only fitted on: their features are computed in bfloat16 where that is faster, and kept in
    half precision. Those of others are kept as the network computes them in float32, so that a head has the very
    accuracy on them that the network has with this head.

    Args:
        classifier: A `TransferClassifier`, whose network stays as it is.
        data: Its images.
        folder: Where to keep the features; None: `store.default_folder`.
        views: Of each training image: 1 the image, 2 also its mirror image, each further one an augmented image.
        limit_gb: Most that the folder may hold, 1e9 bytes each.
        test: Also of test images.
    """

    def __init__(
        self,
        classifier: Any,
        data: ImageDataModule,
        folder: Path | None = None,
        views: int = 1,
        limit_gb: float = LIMIT_GB,
        test: bool = True,
    ) -> None:
        super().__init__()
        self.module, self.data, self.folder = (
            classifier.eval(),
            data,
            folder or default_folder(),
        )
        self.classifier = classifier.classifier
        self.views, self.limit_gb, self.test = views, limit_gb, test
        self.allow_zero_length_dataloader_with_multiple_devices = True  # of parts that are there
        self.parts: list[Part] = []
        self.computed = 0  # images, of all processes
        head = classifier.network.get_submodule(classifier.heads[0])
        if not isinstance(head, torch.nn.Linear) or head.bias is None:
            raise UserError(
                f"{classifier.classifier.backbone} cannot be probed, because its head is no linear layer with a bias: "
                f"take another."
            )
        self.in_bfloat16 = False  # whether training images take bfloat16

    def prepare_data(self) -> None:
        """As of the data."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Have data and network meet, and see which batches are missing."""
        self.trainer.datamodule = self.data  # type: ignore[attr-defined] # where the classifier looks for it
        self.data.trainer = self.trainer
        self.data.setup()
        self.module.setup(stage)
        self._plan()

    def _plan(self) -> None:
        choices = self._choices()
        found = [half for half, parts in choices.items() if parts[0].file.path.is_file()]
        half = found[0] if found else self._faster_in_bfloat16()
        self.in_bfloat16 = self.trainer.strategy.broadcast(half)
        self.parts = choices[self.in_bfloat16]
        if self.trainer.is_global_zero:
            paths = [part.file.path for part in self.parts]
            make_room(
                self.folder, sum(part.file.bytes for part in self.parts), paths, self.limit_gb
            )
            for part in self.parts:
                part.file.make()
        self.trainer.strategy.barrier()
        for part in self.parts:
            missing = part.file.missing()
            self.computed += sum(len(part.file.batches[number]) for number in missing)
            part.missing.extend(missing[self.trainer.global_rank :: self.trainer.world_size])
        self.trainer.strategy.barrier()  # before one of them writes

    def _choices(self) -> dict[bool, list[Part]]:
        """The parts, that of the training images first, if these take bfloat16 or not."""
        height, width = self.classifier.geometry.input_size
        batch = min(256, max(8, BATCH_PIXELS // (height * width)))
        columns, weights = self._features(self._noise(1)).shape[1], self._fingerprint()
        choices: dict[bool, list[Part]] = {True: [], False: []}
        for split in self.splits:
            images = self.data.images[split]
            known = weights + images.marks().tobytes()
            for view, half in product(range(self.views if split == "train" else 1), choices):
                kind = ("float16", half) if split == "train" else ("float32", False)
                augmented = (self.data.augment, self.data.seed) if view > 1 else None
                key = hashlib.sha256(
                    known + repr((kind, batch, view, augmented)).encode()
                ).hexdigest()
                file = FeatureFile(
                    self.folder / f"features-{key[:32]}.bin", len(images), columns, kind[0], batch
                )
                choices[half].append(Part(split, view, file, []))
        return choices

    @property
    def splits(self) -> list[Split]:
        """Whose images, those of training first; known after the data's `setup`."""
        return [split for split in self.data.images if split != "test" or self.test]

    def _noise(self, count: int) -> Tensor:
        return torch.rand(count, 3, *self.classifier.geometry.size, device=self.classifier.device)

    def _fingerprint(self) -> bytes:
        """Of the backbone's weights and of how images come to it."""
        digest = hashlib.sha256(VERSION + repr(self.classifier.geometry).encode())
        heads = tuple(f"{head}." for head in self.classifier.heads)
        for name, value in self.classifier.network.state_dict().items():
            if not name.startswith(heads):
                digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.digest()

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """The missing batches of each part."""
        loaders = []
        for split, _, file, missing in self.parts:
            shard = self.data.shard(split)
            loaders.append(
                rows_loader(shard.images, [file.batches[n] for n in missing], shard.workers)
            )
        return loaders

    def on_test_start(self) -> None:
        """Show how much there is to do."""
        total = sum(len(file.batches[n]) for _, _, file, missing in self.parts for n in missing)
        wanted = sum(part.file.shape[0] for part in self.parts)
        rank_zero_info(f"Features of {self.computed:,} images to compute, of {wanted:,}.")
        self._bar = tqdm(
            total=total,
            unit="img",
            desc="features",
            disable=None if self.trainer.is_global_zero else True,
        )

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compute a batch, and write it."""
        split, view, file, missing = self.parts[dataloader_idx]
        number = missing[batch_idx]
        images = to_float(batch[0].flip(3) if view == 1 else batch[0])
        if view > 1:
            torch.manual_seed(step_seed(self.data.seed, view, number, 0))
            images = self.data.augment(images)
        with torch.autocast(
            images.device.type, torch.bfloat16, enabled=split == "train" and self.in_bfloat16
        ):
            features = self._features(images)
        file.write(number, features.numpy())
        self._bar.update(len(images))

    def on_test_end(self) -> None:
        """Put the bar away."""
        self._bar.close()

    def found(self) -> dict[Split, Features]:
        """The features of each split, once they are there."""
        files = {
            split: [part.file for part in self.parts if part.split == split]
            for split in self.splits
        }
        return {
            s: Features([file.read() for file in files[s]], self.data.images[s].labels)
            for s in files
        }

    def within(self, trainer: Trainer) -> dict[Split, Features]:
        """The features, computed within a fit of the network itself, by all of its processes together."""
        self.trainer = trainer
        self._plan()
        self.on_test_start()
        for number, loader in enumerate(self.test_dataloader()):
            for index, batch in enumerate(loader):
                self.test_step(
                    move_data_to_device(batch, trainer.strategy.root_device), index, number
                )
        self.on_test_end()
        trainer.strategy.barrier()
        return self.found()

    @torch.inference_mode()
    def _features(self, images: Tensor) -> Tensor:
        """What comes into the head, float32 [B, D] on the CPU, of images, float [B, 3, H, W] in [0, 1]."""
        with self.classifier.features() as seen:
            self.classifier(images)
        return seen[0]

    def _faster_in_bfloat16(self) -> bool:
        """Measured, because some processors have it and others emulate it at a tenth of the speed."""
        images, seconds = self._noise(16), dict[bool, float]()
        for half in (False, True):
            with torch.autocast(self.classifier.device.type, torch.bfloat16, enabled=half):
                for _ in range(4):  # the first warms up, and others may be disturbed
                    start = time.perf_counter()
                    self._features(images)
                    seconds[half] = min(time.perf_counter() - start, seconds.get(half, math.inf))
        return seconds[True] < 0.8 * seconds[False]

    def put(self, head: Any, val: Features) -> None:
        """Give the network this head, `heads.Linear`; of several heads, whose logits it averages, the first has all.

        Raises:
            UserError: The network does not give the logits of the head for validation images.
        """
        first, *others = (
            self.classifier.network.get_submodule(name) for name in self.classifier.heads
        )
        images, _ = self.data.images["val"].__getitems__(range(min(TRIED, len(val.labels))))
        with torch.no_grad():
            for name, value in (("weight", head.weight), ("bias", head.bias)):
                getattr(first, name).copy_(value * (1 + len(others)))
                for other in others:
                    getattr(other, name).zero_()
            given = self.classifier(to_float(images).to(self.classifier.device)).cpu()
        wanted = head.logits(val._replace(views=[val.views[0][: len(images)]]))
        if not torch.allclose(given, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
            raise UserError(
                f"{self.classifier.backbone} cannot be probed, because it does more with its head's logits: "
                f"take another."
            )


def features(trainer: Trainer, extractor: FeatureExtractor) -> dict[Split, Features]:
    """The features of each split, computed where they are missing; all processes call it together.

    Args:
        trainer: Made with `use_distributed_sampler=False` and `enable_progress_bar=False`.
        extractor: Of the network and the data.

    Raises:
        UserError: Data and network do not fit each other, or the features would exceed the limit.
    """
    trainer.test(extractor, verbose=False)
    return extractor.found()
