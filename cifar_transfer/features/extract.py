"""Features: what a frozen backbone gives its head for each image, computed once and kept on disk.

    images (uint8) -> device -> float32 in [0, 1] -> a view -> network in eval mode
        -> input of its head: the features

Features are float32. The network computes them in the precision of the Trainer (`bf16-mixed`
autocasts, `32-true` does not).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.augment import step_seed
from cifar_transfer.data.geometry import to_float
from cifar_transfer.data.loading import rows_loader
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.data.splits import Split
from cifar_transfer.features.chosen_rows import ChosenRows, FeatureArray
from cifar_transfer.features.store import (
    DEFAULT_LIMIT_GB,
    FeatureFile,
    default_folder,
    make_room,
)
from cifar_transfer.network.image_classifier import ImageClassifier

MAX_BATCH_PIXELS = 2**20  # of the network's input
MIN_BATCH_IMAGES = 8
MAX_BATCH_IMAGES = 256
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # the others convert the weights
FEATURES_VERSION = 3  # raised when the features of the same images and weights change


class Features(NamedTuple):
    """Features of the N images of a split.

    Attributes:
        views: Arrays float32 [N, D], memory-mapped. The first is of the images themselves.
        labels: Classes of the images, int64 [N].
    """

    views: list[FeatureArray]
    labels: np.ndarray


def split_anew(
    features: Mapping[Split, Features], rows: Mapping[Split, np.ndarray]
) -> dict[Split, Features]:
    """Return the features of other training and validation images; those of the test stay.

    Args:
        features: Features of each split; validation images have as many views as training images.
        rows: For "train" and "val" the rows, int64, in the training images followed by the
            validation images.
    """
    train = features["train"]
    val = features["val"]
    labels = np.concatenate([train.labels, val.labels])
    anew = dict(features)
    for split, split_rows in rows.items():
        views: list[FeatureArray] = []
        for arrays in zip(train.views, val.views, strict=True):
            views.append(ChosenRows(arrays, split_rows))
        anew[split] = Features(views, labels[split_rows])
    return anew


@dataclass(frozen=True)
class _Part:
    """One view of the images of a split, and the file of its features.

    View 0 is the image itself, view 1 its mirror image, and each further one an augmented image.
    """

    split: Split
    view: int
    file: FeatureFile


class FeatureExtractor:
    """Computes the features of all images of a data module that are not on disk yet.

    Args:
        classifier: Network, which is put into eval mode and otherwise stays as it is.
        data: Images.
        folder: Where the features are kept; None: `store.default_folder`.
        views: Number of views of each training image: the image itself, its mirror image, and
            augmented images.
        limit_gb: Limit of all features in the folder, 1e9 bytes each.
        test: Whether to compute features of the test images too.
        splits_with_views: Splits whose images have so many views; those of the others have one.

    Attributes:
        computed: Number of images that `compute` had to compute, over all views and processes.

    Raises:
        UserError: The head of the network is no linear layer with a bias.
    """

    def __init__(
        self,
        classifier: ImageClassifier,
        data: ImageDataModule,
        folder: Path | None = None,
        views: int = 1,
        limit_gb: float = DEFAULT_LIMIT_GB,
        test: bool = True,
        splits_with_views: Sequence[Split] = ("train",),
    ) -> None:
        head = classifier.network.get_submodule(classifier.heads[0])
        if not isinstance(head, torch.nn.Linear) or head.bias is None:
            raise UserError(
                f"{classifier.backbone} cannot be probed, because its head is no linear "
                f"layer with a bias: take another."
            )
        self.classifier = classifier.eval()
        self.data = data
        self.folder = folder or default_folder()
        self.views = views
        self.limit_gb = limit_gb
        self.test = test
        self.splits_with_views = splits_with_views
        self.width = head.in_features
        self.computed = 0

    @torch.inference_mode()
    def compute(self, trainer: Trainer) -> dict[Split, Features]:
        """Return the features of each split, after computing those that are not on disk.

        All processes of the Trainer call this together, once the data are set up, the geometry of
        the network is settled and the network is on its device.

        Raises:
            UserError: The features exceed the limit, or the precision of the Trainer
                converts the weights.
            OSError: The features cannot be written.
        """
        if trainer.precision not in PRECISIONS:
            raise UserError(
                f"precision={trainer.precision} converts the weights of the network, and features "
                f"need them in 32 bits: take precision=32-true, bf16-mixed or 16-mixed."
            )
        parts = self._parts(trainer.precision)
        if trainer.is_global_zero:
            make_room(self.folder, [part.file for part in parts], self.limit_gb)
        # The first process decides for all, because other programs may add and remove files.
        is_whole = trainer.strategy.broadcast([part.file.is_whole() for part in parts])
        arrays = {}
        missing = []
        for part, array_is_whole in zip(parts, is_whole, strict=True):
            if array_is_whole:
                arrays[part] = part.file.read()  # now: what is mapped stays if the file is removed
            else:
                missing.append(part)
        self.computed = sum(part.file.count for part in missing)
        if missing:
            total = sum(part.file.count for part in parts)
            rank_zero_info(f"Features of {self.computed:,} images to compute, of {total:,}.")
        for part in missing:
            self._compute_part(part, trainer)
            arrays[part] = part.file.read()
        features: dict[Split, Features] = {}
        for part in parts:
            if part.view == 0:
                features[part.split] = Features([], self.data.images[part.split].labels)
            features[part.split].views.append(arrays[part])
        return features

    def _parts(self, precision: str) -> list[_Part]:
        """Return all views of all splits, those of the training images first."""
        backbone = _fingerprint(self.classifier)
        parts = []
        for split, images in self.data.images.items():
            if split == "test" and not self.test:
                continue
            marks = images.marks().tobytes()
            for view in range(self.views if split in self.splits_with_views else 1):
                augmentation = (self.data.augmentation, self.data.seed) if view > 1 else None
                key = hashlib.sha256(backbone)
                key.update(marks)
                key.update(repr((precision, view, augmentation)).encode())
                path = self.folder / f"features-{key.hexdigest()[:32]}.npy"
                parts.append(_Part(split, view, FeatureFile(path, len(images), self.width)))
        return parts

    def _compute_part(self, part: _Part, trainer: Trainer) -> None:
        """Compute the features of a view, and write them together with the other processes."""
        shard = self.data.shard(part.split)
        batches = self._batches(part.file.count)[trainer.global_rank :: trainer.world_size]
        loader = rows_loader(shard.images, batches, shard.workers)
        bar = tqdm(
            total=sum(map(len, batches)),
            unit="img",
            desc=f"features of {part.split} images",
            disable=None if trainer.is_global_zero else True,  # None: only on a terminal
        )
        with bar, part.file.write(trainer.strategy) as array:
            for step, (images, _) in enumerate(loader):
                rows = batches[step]
                batch_number = trainer.global_rank + step * trainer.world_size
                floats = to_float(images.to(self.classifier.device))
                with trainer.precision_plugin.forward_context():
                    features = self._features(self._view(floats, part.view, batch_number))
                array[rows.start : rows.stop] = features.numpy()
                bar.update(len(rows))

    def _batches(self, count: int) -> list[range]:
        """Return the rows of each batch of `count` images."""
        height, width = self.classifier.geometry.input_size
        size = MAX_BATCH_PIXELS // (height * width)
        size = min(MAX_BATCH_IMAGES, max(MIN_BATCH_IMAGES, size))
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def _view(self, images: Tensor, view: int, batch_number: int) -> Tensor:
        """Return a view of float images [B, 3, H, W]; the same batch has the same augmentation."""
        if view == 0:
            return images
        if view == 1:
            return images.flip(3)
        torch.manual_seed(step_seed(self.data.seed, view, batch_number, 0))
        return self.data.augmentation(images)

    def _features(self, images: Tensor) -> Tensor:
        """Return the input of the head, float32 [B, D] on the CPU, of float images [B, 3, H, W]."""
        with self.classifier.features() as passes:
            self.classifier(images)
        return passes[0]


def _fingerprint(classifier: ImageClassifier) -> bytes:
    """Return a digest of the backbone, its weights, and of how images become its input."""
    description = classifier.description
    architecture = (description.backbone, description.small_images, description.patch_size)
    text = repr((FEATURES_VERSION, architecture, description.geometry))
    digest = hashlib.sha256(text.encode())
    heads = tuple(f"{head}." for head in classifier.heads)
    for name, value in classifier.network.state_dict().items():
        if not name.startswith(heads):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.digest()


def extract_features(
    trainer: Trainer, extractor: FeatureExtractor, settle: Callable[[], None]
) -> dict[Split, Features]:
    """Return the features of each split, outside a fit.

    Args:
        trainer: Starts the processes, which must not end with the test (as those of ddp_spawn).
            Each of them calls this function.
        extractor: Network and images.
        settle: Settles the geometry of the network. Called once the data are set up.

    Raises:
        UserError: See `FeatureExtractor.compute`, and what the data and `settle` raise.
    """
    module = _ExtractionModule(extractor, settle)
    trainer.test(module, verbose=False)
    return module.features


class _ExtractionModule(LightningModule):
    """Runs an extractor in all processes of a Trainer.

    `trainer.test` starts the processes, sets up the data and moves the network to its device. The
    test itself has a single empty batch; its step computes all features.
    """

    features: dict[Split, Features]

    def __init__(self, extractor: FeatureExtractor, settle: Callable[[], None]) -> None:
        super().__init__()
        self.classifier = extractor.classifier  # as a submodule, so that it is moved
        self.extractor = extractor
        self.settle = settle

    @property
    def largest_side(self) -> int | None:
        """Side in pixels to which images are decoded, as for a fit of the same network."""
        return self.classifier.geometry.input_side

    def prepare_data(self) -> None:
        """Download and decode the images, in one process of each machine."""
        self.extractor.data.trainer = self.trainer  # as Lightning does with a data module
        self.extractor.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Set up the data, and settle the geometry of the network by them."""
        self.extractor.data.trainer = self.trainer
        self.extractor.data.setup()
        self.settle()

    def test_dataloader(self) -> DataLoader[int]:
        """Return a single batch for each process."""
        return DataLoader([0])  # type: ignore[arg-type] # a list is a dataset

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Compute all features."""
        self.features = self.extractor.compute(self.trainer)
