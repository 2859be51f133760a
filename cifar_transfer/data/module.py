"""Data modules: where images come from, how they are split, batched and augmented.

    images (uint8, on disk) -> batches (uint8) -> device -> float32 in [0, 1] -> augmentation while training -> network

Statistics and resolution of the network's input belong to the network, so that a checkpoint can be used without the
data module that trained it. The size that images are decoded to is decided here, once (see `geometry`).
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.data import splits
from cifar_transfer.data.augment import Augment, step_seed
from cifar_transfer.data.classes import Balance, loss_weights
from cifar_transfer.data.geometry import Size, pixels, to_float
from cifar_transfer.data.images import Batch, Images
from cifar_transfer.data.loading import (
    check_processes,
    evaluation_loader,
    training_loader,
    workers_within,
)
from cifar_transfer.data.splits import SPLITS, Names, Split

LARGEST_BATCH = 65536  # images; more is a slip of the finger
MOST_WORKERS = 512
HASH, PERMUTATION = (
    "hash",
    "permutation",
)  # how images are held out; checkpoints that do not say how are older


class ImageDataModule(LightningDataModule):
    """What all data modules share; a subclass has `load` and `class_names`, and `record`s options of its own.

    Batches arrive on the device as float32 images [B, 3, H, W] in [0, 1] and int64 labels [B]. Shuffling and
    augmentation depend on seed, epoch, step and rank alone, so that a resumed run sees what it would have seen.

    Args:
        batch_size: Images a step and process, at least 2 (batch-norm cannot normalise one).
        eval_batch_size: Images a batch in validation and test.
        val_fraction: About this share of every class of the training images is held out for validation, in [0, 1).
            Which ones follows from `seed` and their classes and names, so that images that come or go move no other.
            With 0, validation uses the test images, and the test figure is then not clean. Not used when the data have
            their own validation images.
        augment: Training augmentation; its options switch each operation off at 0.
        class_weights: Of images in the training loss: "balanced", which is N / (classes * images of the class) as in
            scikit-learn, or a positive number for each class, of which only the ratios matter, as they are scaled to a
            mean of 1 over the images drawn. The weighted losses of a batch are divided by the number of its images, so
            that several processes take the step of one with their joint batch. `val/loss` has no weights.
        sampler: "balanced" draws each class equally often, in epochs of the same length, see `loading.Balanced`.
        leave_out: A file of images to do without, wherever they are: one of those that `python -m cifar_transfer audit`
            writes, or any CSV with a column `image` that names them alike, say "train/cat/007.png".
        num_workers: Processes that decode images that are not cached; None takes one for each core. Cached images are
            read by the process itself, which is faster.
        seed: Of the held-out images, the shuffling, the augmentation and dropout.

    Raises:
        UserError: An option out of its range.
    """

    statistics: str | None = (
        None  # name of the channel statistics, unless others are asked for; None: of the weights
    )
    fixed_size: Size | None = (
        None  # that images are decoded to, set before `setup` to that of a checkpoint
    )

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        val_fraction: float = 0.1,
        augment: Augment = Augment(),  # noqa: B008 # frozen
        class_weights: Balance | list[float] | None = None,
        sampler: Balance | None = None,
        leave_out: str | None = None,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check(
            "batch_size",
            batch_size,
            lambda n: 2 <= n <= LARGEST_BATCH,
            f"2 to {LARGEST_BATCH} images",
        )
        check(
            "eval_batch_size",
            eval_batch_size,
            lambda n: 1 <= n <= LARGEST_BATCH,
            f"1 to {LARGEST_BATCH} images",
        )
        check(
            "val_fraction",
            val_fraction,
            lambda x: 0 <= x < 1,
            "a share of the training images in [0, 1)",
        )
        if class_weights not in (None, "balanced"):
            wanted = "balanced, or a number from 1e-6 to 1e6 for each class"
            check(
                "class_weights",
                class_weights,
                lambda ws: ws and all(1e-6 <= w <= 1e6 for w in ws),
                wanted,
            )
        check("sampler", sampler, lambda name: name in (None, "balanced"), "balanced, or null")
        if sampler and class_weights == "balanced":
            raise UserError(
                "class_weights=balanced and sampler=balanced make up for the same twice: take one of them."
            )
        if num_workers is not None:
            check(
                "num_workers",
                num_workers,
                lambda n: 0 <= n <= MOST_WORKERS,
                f"0 to {MOST_WORKERS} processes",
            )
        check("seed", seed, lambda n: 0 <= n < 2**32, "a number from 0 to 4294967295")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.val_fraction, self.augment, self.num_workers, self.seed = (
            val_fraction,
            augment,
            num_workers,
            seed,
        )
        self.class_weights, self.sampler, self.leave_out = class_weights, sampler, leave_out
        self.resumed: list[
            dict[str, int]
        ] = []  # the state of the next training loader, if a run continues
        self.size: Size | None = None  # that `load` brings images to
        self.images: dict[Split, Images] = {}
        self.names: Names = {}  # of `images`, and of those left out
        self.recorded: Names | None = None  # the splits of a run that is continued or evaluated
        self._loaded: dict[Split, Images | None] = {}  # what `load` has said
        self.record()

    def record(self, **options: str | int | float | None) -> None:
        """Keep these options and those of this class with every checkpoint, as primitives; without these, unlogged."""
        own = ["batch_size", "eval_batch_size", "val_fraction", "num_workers", "seed"]
        own += ["class_weights", "sampler", "leave_out"]
        shared = {name: getattr(self, name) for name in own} | {"augment": asdict(self.augment)}
        shared["left_out"] = splits.mark(self.leave_out) if self.leave_out else None
        shared |= {"data": type(self).__name__, "held_out_by": HASH}
        self.save_hyperparameters(shared | options, logger=bool(options))

    @property
    def class_names(self) -> list[str]:
        """The classes' names in the order of the labels; known before any image is read or downloaded."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels; known after `setup`. A `UserError` refuses several sizes."""
        filled = {split: images for split, images in self.images.items() if len(images)}
        sizes: dict[Split, Any] = {
            split: images[0][0].shape[1:] for split, images in filled.items()
        }
        if len({*sizes.values()}) > 1:
            found = ", ".join(f"{split} {pixels(size)}" for split, size in sizes.items())
            raise UserError(
                f"The images of all splits need one size, and have {found}: resize them in `load`."
            )
        height, width = min(sizes.values())
        return height, width

    def load(self, split: Split) -> Images | None:
        """The images of a split, or None where the data have none of their own."""
        raise NotImplementedError

    def choose_size(self, largest: int | None) -> Size | None:
        """The size that `load` brings images to; None: their own. Arguments as of `geometry.choose_size`."""
        return None

    def prepare_data(self) -> None:
        """Download and decode: called once a machine, before `setup`."""
        self._load_all()

    def _load_all(
        self,
    ) -> (
        None
    ):  # once, as to look through a folder takes seconds; again if another size is asked for
        network = getattr(self.trainer, "lightning_module", None)
        size = self.fixed_size or self.choose_size(getattr(network, "largest_side", None))
        if size != self.size or not self._loaded:
            self.size, self.images, self._loaded = size, {}, {}
            self._loaded = {split: self.load(split) for split in SPLITS}

    def setup(self, stage: str | None = None) -> None:
        """Open the images of every split and hold out those of validation.

        Raises:
            UserError: There is nothing to validate on, a label that is no class's, or too few images for the processes.
        """
        self._load_all()
        if not self.images:
            self._split(stage)
        if self.trainer:
            used = {"validate": ["val"], "test": ["test"]}.get(
                stage or "", SPLITS
            )  # a fit ends with the test
            check_processes(
                {s: found for s, found in self.images.items() if s in used}, self.trainer.world_size
            )

    def loss_weights(self) -> Tensor | None:
        """What `classes.loss_weights` makes of `class_weights`; its errors are that one's. Called after `setup`."""
        return loss_weights(
            self.images["train"].labels, self.class_names, self.class_weights, self.sampler
        )

    def unequal(self, split: Split) -> bool:
        """Whether the classes of a split differ in size; of images held out, the classes that they are a sample of."""
        images = self._loaded.get(self._source if split == "val" else split)
        return (
            images is not None
            and len(set(np.bincount(images.labels, minlength=self.num_classes))) > 1
        )

    def _split(self, stage: str | None = None) -> None:
        loaded = {split: images for split, images in self._loaded.items() if images is not None}
        if not loaded.get("train"):
            raise UserError("There are no training images.")
        self.names = {}
        for split, images in loaded.items():
            labels = images.labels
            if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
                found, most = f"labels from {labels.min()} to {labels.max()}", self.num_classes - 1
                raise UserError(
                    f"The {split} images have {found}, but the classes are numbered from 0 to {most}."
                )
            # A number tells those apart that have no name: they are always the same ones in the same order.
            names = images.names or [
                f"{self.class_names[label]}/{row}" for row, label in enumerate(labels)
            ]
            self.names[split] = [f"{split}/{name}" for name in names]
        source: Split = "val" if "val" in loaded else "train"
        if source == "train" and self.val_fraction == 0:
            source = "test"
            if source not in loaded:
                raise UserError(
                    "There is nothing to validate on: set val_fraction or add a folder val/."
                )
            rank_zero_warn(
                "val_fraction=0: validation uses the test images, so the schedule and the choice of the checkpoint "
                "have seen them and the test figure is not clean."
            )
        self._source = source
        chosen = self._chosen(source, loaded[source])
        if not chosen.any() and stage != "test":  # which needs none of them
            few = f"val_fraction={self.val_fraction} of {len(chosen)} images holds out none: raise it."
            gone = "None of the images that the run validated on is left: put them back, or begin a new run."
            raise UserError(gone if self.recorded else few)
        shares: dict[Split, np.ndarray] = {"val": chosen}
        if source == "train":
            shares["train"] = ~chosen
        images, all_names = loaded[source], np.array(self.names[source], dtype=object)
        for split, rows in shares.items():
            loaded[split] = images if rows.all() else images.subset(np.flatnonzero(rows))
            self.names[split] = all_names[rows].tolist()
        self.images = {split: loaded[split] for split in SPLITS if split in loaded}
        if self.leave_out:
            for split, rows in splits.without(self.names, self.leave_out).items():
                self.images[split] = self.images[split].subset(rows)
        rank_zero_info(
            "Images: %s",
            ", ".join(f"{len(images):,} {split}" for split, images in self.images.items()),
        )

    def _chosen(self, source: Split, images: Images) -> np.ndarray:
        """Which images of a split are validated on, bool [N]: the recorded ones, else those held out, or all."""
        names = self.names[source]
        if self.recorded:
            known = set(self.recorded["val"])
            chosen = np.array([name in known for name in names])
            if said := splits.changes(self.names, self.recorded):
                rank_zero_info(said)
        elif source != "train":
            chosen = np.ones(len(images), dtype=bool)
        elif self.hparams.get("held_out_by") == PERMUTATION:
            chosen = splits.hold_out_as_before(images.labels, self.val_fraction, self.seed)
        else:
            relative = [name.partition("/")[2] for name in names]
            chosen = splits.hold_out(relative, images.labels, self.val_fraction, self.seed)
        return chosen

    def continue_run(self, checkpoint: str | Path, saved: Mapping[str, Any]) -> None:
        """Validate on the images that the run of a checkpoint has validated on, called after `setup`.

        Args:
            checkpoint: The file, in the folder of the run.
            saved: The options of the data module in it; older versions chose otherwise, and have no record.

        Raises:
            UserError: The record is damaged, or none of its validation images is left.
        """
        choice = saved.get("held_out_by", PERMUTATION)
        recorded = None if self.recorded else splits.read(checkpoint)
        other = recorded and (
            {*recorded["val"]} != {*self.names["val"]} or splits.changes(self.names, recorded)
        )
        if other or choice != self.hparams.get("held_out_by"):
            self.recorded = self.recorded or recorded
            self.hparams["held_out_by"] = choice
            self._split()

    def record_splits(self, folder: Path) -> None:
        """Record in a run's folder which image is in which split; those that are gone are remembered."""
        before = self.recorded or {split: [] for split in SPLITS}
        here = {name for names in self.names.values() for name in names}
        gone = {split: [name for name in before[split] if name not in here] for split in SPLITS}
        splits.write(folder, {split: self.names.get(split, []) + gone[split] for split in SPLITS})

    def shard(self, split: Split) -> dict[str, Any]:
        """What a loader of this process needs to know of a split."""
        if split not in self.images:
            raise UserError(
                f"There are no {split} images: add a folder {split}/ with the same classes."
            )
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        images = self.images[split]
        workers = 0
        if images.on_the_fly:
            height, width = self.size or self.image_size
            largest = (
                3 * height * width * max(self.batch_size, self.eval_batch_size)
            )  # bytes of a batch
            workers = workers_within(self.num_workers, largest * world)  # as all share the memory
        return {"images": images, "workers": workers, "rank": rank, "world": world}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled training batches, a shard a rank."""
        options = {"seed": self.seed, "balanced": self.sampler is not None} | self.shard("train")
        loader = training_loader(batch_size=self.batch_size, **options)
        loader.epoch = lambda: self.trainer.num_training_batches if self.trainer else len(loader)
        for state in self.resumed:
            loader.load_state_dict(state)
        self.resumed = []
        return loader

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches in order, each image once over all ranks."""
        return evaluation_loader(batch_size=self.eval_batch_size, **self.shard("val"))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test batches in order, each image once over all ranks."""
        return evaluation_loader(batch_size=self.eval_batch_size, **self.shard("test"))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Bytes to float32 in [0, 1], and the augmentation while training, on the device the batch has come to."""
        images, labels = batch
        if self.trainer is None or not self.trainer.training:
            return to_float(images), labels
        # From here on all chance of this step, dropout included, follows from these.
        step = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        seed = step_seed(self.seed, self.trainer.current_epoch, step, self.trainer.global_rank)
        torch.default_generator.manual_seed(
            seed
        )  # `torch.manual_seed` costs 0.4 ms, for devices that are not used
        if images.is_cuda:
            torch.cuda.manual_seed(seed)
        return self.augment(images), labels
