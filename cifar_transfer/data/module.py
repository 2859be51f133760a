"""Data modules: where images come from, how they are split, batched and augmented.

    images (uint8, on disk) -> batches (uint8) -> device -> float32 in [0, 1] -> augmentation while
    training -> network

Statistics and resolution of the network's input belong to the network, so that a checkpoint can be
used without the data module that trained it. The size that images are decoded to is decided here,
once (see `geometry`).

Lightning calls, in this order: `prepare_data` (once a machine), `setup` (each process),
`load_state_dict` (if a run continues), the loaders, `on_after_batch_transfer` (each batch), and
`state_dict` (each checkpoint).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.files import user_path
from cifar_transfer.base.primitives import StoredOptions, as_primitive
from cifar_transfer.data.augment import Augmentation, step_seed
from cifar_transfer.data.augment_options import MAX_SMALL_SIDE, Augment
from cifar_transfer.data.classes import Balance, loss_weights
from cifar_transfer.data.geometry import Fit, GreyRange, Size, pixels, to_float
from cifar_transfer.data.images import Batch, Images, UnreadableImages
from cifar_transfer.data.leave_out import read_image_list, unlisted_rows
from cifar_transfer.data.loading import (
    ResumableLoader,
    Shard,
    check_processes,
    evaluation_loader,
    training_loader,
    workers_within,
)
from cifar_transfer.data.splits import (
    SPLITS,
    GroupKeys,
    Names,
    Split,
    Splits,
    choose_splits,
    list_digest,
)
from cifar_transfer.data.text_list import TextList
from cifar_transfer.data.transformed_images import (
    Transform,
    TransformedImages,
    describe,
)

MAX_BATCH_IMAGES = 65536  # more is a slip of the finger
MAX_WORKERS = 512
CLASS_WEIGHTS = (1e-6, 1e6)  # least and greatest weight of a class


@dataclass(frozen=True)
class EarlierRun:
    """What a data module takes over from the run that it continues or evaluates.

    Attributes:
        size: Height and width in pixels that images were decoded to, or None to choose them anew.
        grey_range: Grey values that became black and white, see `geometry.Geometry`. Where `size`
            is known, None means that there are none.
        record: Names of the images of each split, as `splits.read` returns them, or None to choose
            the splits anew.
        class_names: Names of the classes, for data that cannot tell them without training images.
        augment: Options of the augmentation as its checkpoint stores them, for those that are not
            given.
    """

    size: Size | None = None
    grey_range: GreyRange | None = None
    record: Names | None = None
    class_names: Sequence[str] | None = None
    augment: Mapping[str, Any] | None = None


class ImageDataModule(LightningDataModule):
    """Base class of all data modules; a subclass has `load` and `class_names`.

    A subclass with options of its own passes them to `store_options` at the end of its constructor.

    Batches arrive on the device as float32 images [B, 3, H, W] in [0, 1] and int64 labels [B].
    Shuffling and augmentation depend on seed, epoch, step and rank alone, so that a resumed run
    sees what it would have seen.

    Args:
        batch_size: Images a step and process, at least 2 (batch-norm cannot normalise one).
        eval_batch_size: Images a batch in validation and test.
        val_fraction: About this share of every class of the training images is held out for
            validation, in [0, 1). Which ones follows from `seed` and their classes and names, so
            that images that come or go move no other. With 0, validation uses the test images, and
            the test figure is then not clean. Not used when the data have their own validation
            images.
        augment: Training augmentation. What is not given is that of a preset: "photos" for images
            of more than 64 pixels, "cifar" for smaller ones.
        transforms: Transforms of single training images before `augment`, from uint8 [3, H, W] to
            the same, in worker processes: those of torchvision v2, such as `[{"class_path":
            "torchvision.transforms.v2.TrivialAugmentWide"}]`, or from Python any functions. What
            they draw follows from seed, epoch and image.
        class_weights: Weights of the classes in the training loss: "balanced", which is
            N / (classes * images of the class) as in scikit-learn, or a positive number for each
            class. Only their ratios matter, because they are scaled to a mean of 1 over the images
            drawn. The weighted losses of a batch are divided by the number of its images, so that
            several processes take the step of one with their joint batch. `val/loss` has no
            weights.
        sampler: "balanced" draws each class equally often, in epochs of the same length, see
            `loading.Balanced`.
        leave_out: A file that lists images to leave out: one of those that
            `python -m cifar_transfer audit` writes, or any CSV with a column `image` that names
            them in the same way, for example "train/cat/007.png".
        leave_out_splits: The splits that they are left out of: "train", or several. Figures of
            test images that a network has chosen would be too good, so that they stay unless you
            ask.
        num_workers: Processes that decode images that are not cached; None takes one for each core.
            Cached images are read by the process itself, which is faster.
        seed: Decides which images are held out, the shuffling, the augmentation and dropout.

    Attributes:
        statistics: Name of the channel statistics that the network takes if it is asked for no
            others; None: those of its weights.
        fit: How `load` brings images of another shape to `size`.
        augmentation: The training augmentation with all its values, once `setup` knows the images.
        size: Height and width in pixels that `load` is to bring images to; None: any one size.
        grey_range: Grey values that become black and white where images have more than 8 bits; None
            if they have 8.
        group: Regular expression that says which images belong together, or None; recorded with
            the splits.
        images: Images of each split, without those that are left out; known after `setup`.
        recorded_run: Identifier of the run that has recorded the splits, or None.

    Raises:
        UserError: An option is out of its range, or cannot be stored in a checkpoint.
    """

    statistics: str | None = None
    fit: Fit = "crop"
    group: str | None = None

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        val_fraction: float = 0.1,
        augment: Augment = Augment(),  # noqa: B008 # frozen
        transforms: list[nn.Module] | None = None,
        class_weights: Balance | list[float] | None = None,
        sampler: Balance | None = None,
        leave_out: str | None = None,
        leave_out_splits: Split | list[Split] = "train",
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size: int = as_primitive("batch_size", batch_size)
        self.eval_batch_size: int = as_primitive("eval_batch_size", eval_batch_size)
        self.val_fraction: float = as_primitive("val_fraction", val_fraction)
        self.augment = augment
        self.transforms: list[Transform] = list(transforms or [])
        self.class_weights: Balance | list[float] | None = as_primitive(
            "class_weights", class_weights
        )
        self.sampler: Balance | None = as_primitive("sampler", sampler)
        self.leave_out: str | None = None
        if leave_out is not None:
            self.leave_out = str(user_path(as_primitive("leave_out", leave_out)))
        self.leave_out_splits: Split | list[Split] = as_primitive(
            "leave_out_splits", leave_out_splits
        )
        self.num_workers: int | None = as_primitive("num_workers", num_workers)
        self.seed: int = as_primitive("seed", seed)
        self._check_options()

        self.augmentation: Augmentation = augment.complete()
        self.size: Size | None = None
        self.grey_range: GreyRange | None = None
        self.images: dict[Split, Images] = {}
        self.recorded_run: str | None = None
        self._loaded: dict[Split, Images | None] = {}  # what `load` has returned
        self._looked_for_larger = False
        self._larger: Images | None = None  # what `load_larger` has returned
        self._splits: Splits | None = None
        self._stage: str | None = None
        self._earlier = EarlierRun()
        self._first_batch = 0  # of the next epoch: those before it were trained on already
        self.store_options()

    def _check_options(self) -> None:
        check(
            "batch_size",
            self.batch_size,
            lambda images: 2 <= images <= MAX_BATCH_IMAGES,
            f"2 to {MAX_BATCH_IMAGES} images",
        )
        check(
            "eval_batch_size",
            self.eval_batch_size,
            lambda images: 1 <= images <= MAX_BATCH_IMAGES,
            f"1 to {MAX_BATCH_IMAGES} images",
        )
        check(
            "val_fraction",
            self.val_fraction,
            lambda share: 0 <= share < 1,
            "a share of the training images in [0, 1)",
        )
        if self.class_weights not in (None, "balanced"):
            check(
                "class_weights",
                self.class_weights,
                _are_class_weights,
                "balanced, or a number from 1e-6 to 1e6 for each class",
            )
        check("sampler", self.sampler, lambda name: name in (None, "balanced"), "balanced, or null")
        if self.sampler and self.class_weights == "balanced":
            raise UserError(
                "class_weights=balanced and sampler=balanced make up for the same twice: "
                "take one of them."
            )
        check(
            "leave_out_splits",
            self.leave_out_splits,
            lambda names: bool(names) and set(_as_list(names)) <= set(SPLITS),
            "train, val, test, or a list of them",
        )
        if self.num_workers is not None:
            check(
                "num_workers",
                self.num_workers,
                lambda processes: 0 <= processes <= MAX_WORKERS,
                f"0 to {MAX_WORKERS} processes",
            )
        check("seed", self.seed, lambda seed: 0 <= seed < 2**32, "a number from 0 to 4294967295")

    def store_options(self, **options: Any) -> None:
        """Store the options of all data modules, and these of a subclass, in each checkpoint.

        The options are logged only if a subclass gives some: a module of the user's own may log
        others of the same names.

        Raises:
            UserError: An option cannot be stored, or the file of `leave_out` cannot be read.
        """
        stored = StoredOptions(
            data=type(self).__name__,
            batch_size=self.batch_size,
            eval_batch_size=self.eval_batch_size,
            val_fraction=self.val_fraction,
            augment=as_primitive("augment", self.augment),
            transforms=[describe(transform) for transform in self.transforms] or None,
            class_weights=self.class_weights,
            sampler=self.sampler,
            leave_out=self.leave_out,
            leave_out_splits=self.leave_out_splits,
            left_out=list_digest(self.leave_out) if self.leave_out else None,
            num_workers=self.num_workers,
            seed=self.seed,
        )
        for name, value in options.items():
            stored[name] = as_primitive(name, value)
        self.save_hyperparameters(stored, logger=bool(options))

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes in the order of the labels, known before any image is read."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def is_downloaded(self) -> bool:
        """Return whether the images are at hand; without them, `prepare_data` downloads them."""
        return True

    def load(self, split: Split) -> Images | None:
        """Return the images of a split at `size`, or None if the data have none of their own."""
        raise NotImplementedError

    def load_larger(self) -> Images | None:
        """Return the images of `load("train")` larger than `size`, or None if there are none.

        Called where the augmentation cuts parts out, which then need not be enlarged as much. See
        `geometry.size_with_room`.
        """
        return None

    def choose_size(self, largest_side: int | None) -> Size | None:
        """Return the size that `load` brings images to, or None if they keep theirs.

        Args:
            largest_side: Side in pixels of the largest square that the network takes, or None if it
                takes images as they are; see `geometry.choose_size`.
        """
        return None

    def choose_grey_range(self) -> GreyRange | None:
        """Return the grey values that `load` makes black and white, None if images have 8 bits."""
        return None

    def held_out_test_fraction(self) -> float:
        """Return the share of the training images that is held out for the test, in [0, 1).

        It counts only if the data have no test images of their own.
        """
        return 0.0

    def group_keys(self, names: Sequence[str]) -> Sequence[str]:
        """Return a text for each training image; those with the same one are held out together.

        Args:
            names: Names of the training images, "cat/007.png".
        """
        return names

    def continue_from(self, earlier: EarlierRun) -> None:
        """Decode, split and begin as an earlier run did, also after `setup`.

        Values that `earlier` leaves out (None) stay as they are.
        """
        before = self._earlier
        self._earlier = EarlierRun(
            size=earlier.size or before.size,
            grey_range=earlier.grey_range or before.grey_range,
            record=earlier.record or before.record,
            class_names=earlier.class_names or before.class_names,
            augment=earlier.augment or before.augment,
        )
        if earlier.augment is not None:
            self._store_augment(self.augment.on(earlier.augment))
        if self._splits is None:  # `setup` is still to come
            return
        if self._earlier != before:
            self._load_images()
            self._split_images()

    def _store_augment(self, augment: Augment) -> None:
        """Store options of the augmentation in checkpoints, in place of those that were given.

        The preset follows from the size of the images. A run that continues takes it from its
        checkpoint, because images that have changed since may ask for another one.
        """
        self.hparams["augment"] = as_primitive("augment", augment)

    def prepare_data(self) -> None:
        """Download and decode what is not on the disk yet; called once a machine."""
        self._load_images()

    def setup(self, stage: str | None = None) -> None:
        """Open the images of every split, and hold out those of validation.

        Args:
            stage: "fit", "validate", "test", "predict", or None for all of them.

        Raises:
            UserError: There is nothing to validate on, a label is no class's, or there are too few
                images for the processes.
        """
        self._stage = stage
        self._load_images()
        if self._splits is None:
            self._split_images()
        self._choose_augmentation()
        if stage == "fit":
            self._images_for_training()
        if self.trainer:
            check_processes(self._images_of_stage(), self.trainer.world_size)

    def _choose_augmentation(self) -> None:
        """Complete the augmentation by the preset that suits the size of the images."""
        images = self.images.get("train")
        if not images:
            return
        size = _size_of(images)
        augment = self.augment.on(self._earlier.augment or {})
        complete = augment.for_images(size)
        self.augmentation = complete.complete()
        self._store_augment(complete)
        is_default = augment.preset is None
        has_chosen_size = self.size is not None
        if is_default and self._stage == "fit" and (has_chosen_size or complete.preset == "photos"):
            self._tell_augmentation(complete.preset, size)

    def _tell_augmentation(self, preset: str | None, size: Size) -> None:
        comparison = "not more"
        if preset == "photos":
            comparison = "more"
        rank_zero_info(
            f"Augmentation: {preset}, because images have {pixels(size)} pixels, {comparison} than "
            f"{MAX_SMALL_SIDE} (--data.augment=NAME takes another)"
        )

    def _images_of_stage(self) -> dict[Split, Images]:
        """Return the images that the stage reads, by split; a fit ends with the test."""
        splits_of_stages: dict[str | None, Split] = {
            "validate": "val",
            "test": "test",
            "predict": "test",
        }
        only = splits_of_stages.get(self._stage)
        if only is None:
            return self.images
        return {only: self.images[only]} if only in self.images else {}

    def _load_images(self) -> None:
        """Load all splits, unless they are loaded at the size that is asked for now."""
        network = getattr(self.trainer, "lightning_module", None)
        largest_side = getattr(network, "largest_side", None)
        size = self._earlier.size or self.choose_size(largest_side)
        grey_range = self._earlier.grey_range
        if grey_range is None and self._earlier.size is None:
            grey_range = self.choose_grey_range()
        if self._loaded and size == self.size and grey_range == self.grey_range:
            return
        self.size = size
        self.grey_range = grey_range
        self.images = {}
        self._splits = None
        self._looked_for_larger = False
        self._larger = None
        self._loaded = self._load_splits()

    def _load_splits(self) -> dict[Split, Images | None]:
        """Return what `load` gives for each split.

        Raises:
            UnreadableImages: Images of any split are broken; the message names all that are known.
            UserError: `load` gives something else than images of this package.
        """
        loaded: dict[Split, Images | None] = {}
        reasons: list[str] = []
        for split in SPLITS:
            try:
                loaded[split] = self._load_split(split)
            except UnreadableImages as error:
                reasons += error.reasons
        if reasons:
            raise UnreadableImages(*reasons)
        return loaded

    def _load_split(self, split: Split) -> Images | None:
        images: Any = self.load(split)
        if images is None or isinstance(images, Images):
            return images
        raise UserError(
            f"{type(self).__name__}.load gives a {type(images).__name__}, and not Images: return "
            f"ArrayImages(array, labels) with an array uint8 [N, 3, H, W], or give the dataset to "
            f"DatasetDataModule."
        )

    def _split_images(self) -> None:
        """Fill `images`, and say so if the splits are others than before."""
        before = self._splits
        chosen = self._choose_splits(self.seed)
        self._splits = chosen
        self.images = self._images_by_split(chosen)
        if before is None or before.names != chosen.names or before.changes() != chosen.changes():
            self._report_splits(chosen)

    def _choose_splits(self, seed: int) -> Splits:
        """Return which of the loaded images are in which split.

        Args:
            seed: Seed of the validation images.

        Raises:
            UserError: There is nothing to train or to validate on, or a label is no class's.
        """
        names: dict[Split, Sequence[str]] = {}
        labels: dict[Split, np.ndarray] = {}
        for split, images in self._loaded.items():
            if images is not None:
                self._check_labels(split, images.labels)
                names[split] = self._names(split, images)
                labels[split] = images.labels
        if not names.get("train") and self._stage not in ("validate", "test", "predict"):
            raise UserError("There are no training images.")
        chosen = self.choose_splits(names, labels, seed, self.group_keys)
        needs_validation = self._stage not in ("test", "predict")
        if needs_validation and not chosen.names.get("val"):
            self._refuse_empty_validation(chosen.val_source)
        return chosen

    def choose_splits(
        self,
        names: Mapping[Split, Sequence[str]],
        labels: Mapping[Split, np.ndarray],
        seed: int,
        group_keys: GroupKeys,
    ) -> Splits:
        """Return which images are in which split, by the options and the earlier run.

        Args:
            names: Names of the images of each split that the data have.
            labels: Their labels, int64 [N].
            seed: Seed of the validation images.
            group_keys: Tells which training images are held out together.

        Raises:
            UserError: There is nothing to validate on, or `leave_out` does not fit these images.
        """
        return choose_splits(
            names,
            labels,
            self.val_fraction,
            seed,
            self._earlier.record,
            self.leave_out,
            _as_list(self.leave_out_splits),
            self.held_out_test_fraction(),
            group_keys,
        )

    def rows_with_seed(self, seed: int) -> dict[Split, np.ndarray]:
        """Return which images would be trained and validated on with another seed.

        Known after `setup`. The test images are the same with each seed.

        Returns:
            For "train" and "val" the rows, int64, in `images["train"]` followed by `images["val"]`.

        Raises:
            UserError: No validation images are held out, or images that are left out of training
                alone would be among those of validation.
        """
        assert self._splits is not None
        if self._splits.val_source != "train" or self._earlier.record is not None:
            raise UserError(
                f"A seed chooses the images that are held out for validation, and none are: "
                f"validation uses {self._splits.val_source} images, the same with each seed. Leave "
                f"--seeds out."
            )
        if self.leave_out is not None and not {"train", "val"} <= set(
            _as_list(self.leave_out_splits)
        ):
            raise UserError(
                f"leave_out={self.leave_out} lists images that are trained on with one seed and "
                f"validated on with another: leave them out of both, "
                f"--data.leave_out_splits=[train,val]."
            )
        chosen = self._choose_splits(seed)
        loaded_rows = np.concatenate([self._splits.rows["train"], self._splits.rows["val"]])
        order = np.argsort(loaded_rows)
        rows: dict[Split, np.ndarray] = {}
        for split in ("train", "val"):
            places = np.searchsorted(loaded_rows, chosen.rows[split], sorter=order)
            rows[split] = order[places]
        return rows

    def _images_by_split(self, chosen: Splits) -> dict[Split, Images]:
        """Return the loaded images of each split, without those that are left out."""
        images_by_split: dict[Split, Images] = {}
        for split, rows in chosen.rows.items():
            images = self._loaded[chosen.sources[split]]
            assert images is not None
            images_by_split[split] = _rows_of(images, rows)
        return images_by_split

    def _images_for_training(self) -> Images:
        """Return the training images, larger than `size` if the augmentation cuts parts out."""
        if not self.augmentation.crops_parts:
            return self.images["train"]
        if not self._looked_for_larger:
            self._looked_for_larger = True
            self._larger = self.load_larger()
            if self._larger is not None:
                _tell_of_larger(self._larger)
        if self._larger is None:
            return self.images["train"]
        assert self._splits is not None
        return _rows_of(self._larger, self._splits.rows["train"])

    def _check_labels(self, split: Split, labels: np.ndarray) -> None:
        if not len(labels):
            return
        if not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise UserError(
                f"The {split} images have labels from {labels.min()} to {labels.max()}, but the "
                f"classes are numbered from 0 to {self.num_classes - 1}."
            )

    def _names(self, split: Split, images: Images) -> Sequence[str]:
        """Return a name for each image; those without a name are told apart by their number."""
        names = images.names
        if isinstance(names, TextList):
            return names.beginning_with(f"{split}/")
        if names is None:
            class_names = self.class_names
            names = [f"{class_names[label]}/{row}" for row, label in enumerate(images.labels)]
        return [f"{split}/{name}" for name in names]

    def _refuse_empty_validation(self, source: Split) -> None:
        if self._earlier.record is not None:
            raise UserError(
                "None of the images that the run validated on is left: put them back, or begin a "
                "new run."
            )
        if source != "train":
            raise UserError(f"There are no {source} images to validate on: add some.")
        raise UserError(
            "There is nothing to validate on, because each class has one training image, or one "
            "group of them, and that is trained on: add images to the classes, or a folder val/."
        )

    def _report_splits(self, chosen: Splits) -> None:
        if chosen.val_source == "test":
            rank_zero_warn(
                "val_fraction=0: validation uses the test images, so the schedule and the choice "
                "of the checkpoint have seen them and the test figure is not clean."
            )
        changes = chosen.changes()
        if changes is not None:
            rank_zero_info(changes)
        if self.leave_out is not None:
            rank_zero_info(f"Left out: {chosen.left_out()} images, those in {self.leave_out}.")
        counts = [f"{len(images):,} {split}" for split, images in self.images.items()]
        rank_zero_info(f"Images: {', '.join(counts)}")

    @property
    def names(self) -> Names:
        """Names of the images of each split, including those left out; empty before `setup`."""
        return self._splits.names if self._splits else {}

    @property
    def validates_on_test_images(self) -> bool:
        """Whether validation uses the test images (`val_fraction=0`); known after `setup`."""
        return self._splits is not None and self._splits.val_source == "test"

    def names_of_images(self, split: Split) -> list[str]:
        """Return the names of `images[split]`, in their order."""
        names = self.names[split]
        return [names[row] for row in self.rows_that_stay(split, names)]

    def rows_that_stay(self, split: Split, names: Sequence[str]) -> np.ndarray:
        """Return the rows, int64, of the names in a split that `leave_out` does not leave out."""
        if self.leave_out is None or split not in _as_list(self.leave_out_splits):
            return np.arange(len(names))
        return unlisted_rows(names, read_image_list(self.leave_out))

    @property
    def image_size(self) -> Size:
        """Height and width of the images in pixels, known after `setup`.

        Raises:
            UserError: The images of the splits have several sizes.
        """
        self._require_images()
        sizes: dict[Split, Size] = {}
        for split, images in self.images.items():
            if len(images):
                sizes[split] = _size_of(images)
        if len(set(sizes.values())) > 1:
            size_texts = [f"{split} {pixels(size)}" for split, size in sizes.items()]
            raise UserError(
                f"The images of all splits need one size, and have {', '.join(size_texts)}: "
                f"resize them in `load`."
            )
        return min(sizes.values())

    def has_unequal_classes(self, split: Split) -> bool:
        """Return whether some class of a split has more images than another.

        Of images that are held out, the classes that they are a sample of count.
        """
        source = split
        if self._splits is not None:
            source = self._splits.sources.get(split, split)
        images = self._loaded.get(source)
        if images is None:
            return False
        counts = np.bincount(images.labels, minlength=self.num_classes)
        return len(set(counts)) > 1

    def loss_weights(self) -> Tensor | None:
        """Return the weights of the classes in the loss; see `classes.loss_weights`."""
        self._require_images()
        labels = self.images["train"].labels
        return loss_weights(labels, self.class_names, self.class_weights, self.sampler)

    def _require_images(self) -> None:
        """Raise a `UserError` before `setup`."""
        if self._splits is None:
            raise UserError(
                "The images are not loaded yet: call prepare_data() and setup() of the data module "
                "first, as a Trainer does."
            )

    def record_splits(self, folder: Path) -> None:
        """Record in a run's folder which image is in which split; missing ones stay recorded.

        Checkpoints that are written from now on say that the record is theirs.
        """
        self._require_images()
        assert self._splits is not None
        self.recorded_run = self._splits.write(folder, self.group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin the epoch after the batches that were trained on before the checkpoint."""
        if self.trainer is None or self.trainer.training:  # Lightning also restores for a test
            self._first_batch = state_dict["first_batch"]

    def shard(self, split: Split, training: bool = False) -> Shard:
        """Return what this process reads of a split.

        Args:
            split: The split.
            training: Whether images are those that `augmented` takes: with room for crops, and gone
                through `transforms`.

        Raises:
            UserError: The data have no such images.
        """
        self._require_images()
        if split not in self.images:
            raise UserError(
                f"There are no {split} images: add a folder {split}/ with the same classes."
            )
        images = self.images[split]
        if training:
            images = self._images_for_training()
        if training and self.transforms:
            images = TransformedImages(images, self.transforms, self.seed)
        rank = self.trainer.global_rank if self.trainer else 0
        world_size = self.trainer.world_size if self.trainer else 1
        workers = 0
        if images.on_the_fly:
            height, width = _size_of(images)
            batch_bytes = 3 * height * width * max(self.batch_size, self.eval_batch_size)
            workers = workers_within(self.num_workers, batch_bytes * world_size)
        return Shard(images, workers, rank, world_size)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return training batches, a shard for each process: shuffled, or to overfit in order."""
        overfits = bool(getattr(self.trainer, "overfit_batches", 0))
        first_batch = self._first_batch
        self._first_batch = 0
        return training_loader(
            self.shard("train", training=True),
            self.batch_size,
            self.seed,
            balanced=self.sampler is not None,
            first_batch=first_batch,
            shuffled=not overfits,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return validation batches in order, each image once over all processes."""
        return evaluation_loader(self.shard("val"), self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return test batches in order, each image once over all processes."""
        return evaluation_loader(self.shard("test"), self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the batches of the test, for `Trainer.predict`; their labels are not used."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn images into float32 in [0, 1], and augment those of training, on the device.

        Batches that are no pairs of images and labels come from a loader of the user's own. They
        are left as they are.
        """
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            return batch
        images, labels = batch
        if self.trainer is None or not self.trainer.training:
            return to_float(images), labels
        self._seed_step(self.trainer, images.is_cuda)
        return self.augmented(images), labels

    def augmented(self, images: Tensor) -> Tensor:
        """Return training images with the augmentation, drawn from torch's global CPU generator.

        Args:
            images: Images of `shard("train", training=True)`, uint8 [B, 3, H, W].

        Returns:
            float32 [B, 3, H, W] in [0, 1], of `size`, on the images' device.
        """
        return self.augmentation(images, self.size)

    def _seed_step(self, trainer: Trainer, on_cuda: bool) -> None:
        """Seed all chance of a training step, dropout included, by seed, epoch, step and rank."""
        loader = trainer.train_dataloader
        if not isinstance(loader, ResumableLoader):  # a subclass has another
            return
        step = loader.batches_read - 1
        seed = step_seed(self.seed, trainer.current_epoch, step, trainer.global_rank)
        # `torch.manual_seed` takes 0.4 ms, because it also seeds devices that are not used.
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            torch.cuda.manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Return how many batches of the epoch were trained on: none when the epoch is over."""
        if self.trainer is None:
            return {}
        loader = self.trainer.train_dataloader
        if not isinstance(loader, ResumableLoader):  # nothing is trained
            return {}
        batches = max(loader.batches_read, loader.first_batch)
        if batches >= self.trainer.num_training_batches:
            batches = 0
        return {"first_batch": batches}


def _tell_of_larger(images: Images) -> None:
    """Say at which size training images are read, and how much that keeps."""
    height, width = _size_of(images)
    size = pixels((height, width))
    if images.on_the_fly:
        rank_zero_info(f"Training images are decoded to {size} pixels, of which parts are cut out")
        return
    megabytes = math.ceil(3 * height * width * len(images) / 1e6)
    rank_zero_info(
        f"Training images are also kept at {size} pixels, of which parts are cut out "
        f"({megabytes:,} MB)"
    )


def _size_of(images: Images) -> Size:
    """Return height and width in pixels of the first image."""
    image, _ = images[0]
    height, width = image.shape[1:]
    return height, width


def _rows_of(images: Images, rows: np.ndarray) -> Images:
    """Return the images of some rows, int64 [N]; the images themselves if those are all."""
    if len(rows) < len(images):
        return images.subset(rows)
    return images


def _as_list(splits: Split | list[Split]) -> list[Split]:
    if isinstance(splits, str):
        return [splits]
    return splits


def _are_class_weights(weights: list[float]) -> bool:
    least, greatest = CLASS_WEIGHTS
    return len(weights) > 0 and all(least <= weight <= greatest for weight in weights)
