"""Loaders: which images each process reads, in which order, and where a resumed epoch goes on."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.machine import cores
from cifar_transfer.data.images import Batch, Images
from cifar_transfer.data.splits import Split
from cifar_transfer.data.transformed_images import TransformedImages

RESERVED_FILES = 40  # files that a process may have open beside those of its workers
FILES_PER_WORKER = 6  # its queues and pipes, and the images in shared memory
SHARED_MEMORY = Path("/dev/shm")  # through which torch's workers pass their batches
BATCHES_PER_WORKER = 3  # in shared memory: two that wait, and one that is being made
SIMULTANEOUS_LOADERS = 2  # the workers of training and validation live side by side


@dataclass(frozen=True)
class Shard:
    """What a process reads of a split.

    Attributes:
        images: The images of the split, of all processes.
        workers: Number of worker processes that decode images; 0: this process reads them itself.
        rank: Number of this process, from 0.
        world_size: Number of processes that share the images.
    """

    images: Images
    workers: int = 0
    rank: int = 0
    world_size: int = 1


class Shuffled(DistributedSampler):
    """A `DistributedSampler` whose next epoch may begin later.

    Attributes:
        skipped_images: Images of this process that the next epoch leaves out at its beginning.
        indices_per_epoch: Number by which an index is larger in each epoch than in the one before:
            0, or the number of images for `TransformedImages`, which learn the epoch from it.
    """

    skipped_images = 0
    indices_per_epoch = 0

    def __iter__(self) -> Iterator[int]:
        first_index = self.epoch * self.indices_per_epoch
        for row in self._rows():
            yield first_index + row

    def _rows(self) -> Iterator[int]:
        return islice(super().__iter__(), self.skipped_images, None)


class InOrder(Shuffled, SequentialSampler):
    """A `Shuffled` that does not shuffle: the images of `overfit_batches`, alike in each epoch.

    Lightning gives every loader whose sampler is no `SequentialSampler` another sampler then, which
    knows neither the processes nor where an epoch goes on.
    """

    def __init__(self, images: Images, num_replicas: int, rank: int) -> None:
        super().__init__(images, num_replicas, rank, shuffle=False)


class EachOnce(UnrepeatedDistributedSampler, SequentialSampler):  # type: ignore[misc] # both yield rows
    """All images in order, each once over all processes.

    It is a `SequentialSampler` for the same reason as `InOrder`.
    """

    def __init__(self, images: Images, num_replicas: int, rank: int) -> None:
        super().__init__(images, num_replicas, rank, shuffle=False)


class Balanced(Shuffled):
    """Draw all classes equally often (counts differ by at most one an epoch).

    Classes take turns, and each goes round its images in a fixed order. An epoch takes up where the
    one before has ended, and is shuffled. So each image of a class is drawn k or k + 1 times,
    within an epoch and over all epochs.

    Args:
        labels: Labels of the images of all processes, int64 [N].
        num_samples: Images that each process draws in an epoch.
        num_replicas: Number of processes.
        rank: Number of this process.
        seed: Another seed gives another order.
    """

    def __init__(
        self, labels: np.ndarray, num_samples: int, num_replicas: int, rank: int, seed: int
    ) -> None:
        places = range(num_samples * num_replicas)
        super().__init__(places, num_replicas, rank, seed=seed)  # type: ignore[arg-type] # only its length counts
        shuffled = np.random.default_rng(seed).permutation(len(labels))
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        boundaries = np.flatnonzero(np.diff(labels[by_class])) + 1
        self.rows_of_classes = np.split(by_class, boundaries)

    def _rows(self) -> Iterator[int]:
        for place in super()._rows():
            place_over_epochs = self.epoch * self.total_size + place
            turn, label = divmod(place_over_epochs, len(self.rows_of_classes))
            rows = self.rows_of_classes[label]
            yield int(rows[turn % len(rows)])


class ResumableLoader(DataLoader[Batch]):
    """Training batches, whose next epoch may begin in its middle.

    Attributes:
        first_batch: Batches that the next epoch skips, because they were trained on before.
        batches_read: Batches of the current epoch that were read, including those skipped.
    """

    first_batch = 0
    batches_read = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override] # DataLoader's iterator class
        self.batches_read = self.first_batch
        self.first_batch = 0
        self.sampler.skipped_images = self.batches_read * (self.batch_size or 1)  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self.batches_read += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, because the data module stores `batches_read`.

        Lightning restores a loader only if it is made after the loops are restored; a schedule that
        counts the steps of the run has it made before. Without this method and `load_state_dict`
        Lightning warns that the loader cannot resume.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing, as `state_dict` explains."""


def check_processes(images: Mapping[Split, Images], world_size: int) -> None:
    """Check that splits have enough images to give each process a batch.

    Raises:
        UserError: A split has fewer than one image for each process, or two for training, because
            batch-norm cannot train on one.
    """
    for split, split_images in images.items():
        min_images = 2 if split == "train" else 1
        if len(split_images) >= min_images * world_size:
            continue
        processes = "1 process, which"
        if world_size > 1:
            processes = f"{world_size} processes, of which each"
        raise UserError(
            f"{len(split_images)} {split} images are too few for {processes} needs {min_images}: "
            f"take fewer devices, or add images."
        )


def training_loader(
    shard: Shard,
    batch_size: int,
    seed: int,
    balanced: bool = False,
    first_batch: int = 0,
    shuffled: bool = True,
) -> ResumableLoader:
    """Return shuffled batches, whose order follows from seed and epoch.

    A last batch of one image is left out: batch-norm cannot train on one value a channel, and a
    network may end in 1 x 1 pixels.

    Args:
        shard: The images, and which of them this process reads.
        batch_size: Images in a batch of this process.
        seed: Another seed gives another order.
        balanced: Whether to draw all classes equally often; see `Balanced`.
        first_batch: Batches of the first epoch to skip.
        shuffled: Whether to shuffle; without it the images come in order, and `balanced` is left
            out.
    """
    sampler = Shuffled(shard.images, shard.world_size, shard.rank, shuffle=True, seed=seed)
    num_samples = len(sampler)
    single_image_left = num_samples % batch_size == 1
    if not shuffled:
        sampler = InOrder(shard.images, shard.world_size, shard.rank)
    elif balanced:
        if single_image_left:
            num_samples -= 1
        labels = shard.images.labels
        sampler = Balanced(labels, num_samples, shard.world_size, shard.rank, seed)
    if isinstance(shard.images, TransformedImages):
        sampler.indices_per_epoch = len(shard.images)
    loader = ResumableLoader(
        shard.images,
        batch_size,
        sampler=sampler,
        drop_last=single_image_left,
        **_worker_options(shard.workers),
    )
    loader.first_batch = first_batch
    return loader


def evaluation_loader(shard: Shard, batch_size: int) -> DataLoader[Batch]:
    """Return batches in order, each image once over all processes.

    Repeated images, which would give all processes equally many, would count in the metrics.
    """
    sampler = EachOnce(shard.images, shard.world_size, shard.rank)
    # By its name, because Lightning makes the loader anew to predict, and has one, too.
    return DataLoader(
        shard.images, batch_size=batch_size, sampler=sampler, **_worker_options(shard.workers)
    )


def ends_in_one_image(loader: Any, num_batches: float) -> bool:
    """Return whether the last batch of an epoch has a single image, as far as a loader tells.

    Args:
        loader: A loader of any kind.
        num_batches: Batches of an epoch, which may end before the loader does.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    if loader.batch_size is None or loader.drop_last:  # a batch sampler of its own
        return False
    images = len(loader.sampler)  # type: ignore[arg-type] # only that of an `IterableDataset` has no length
    last_batch = images - loader.batch_size * (len(loader) - 1)
    return last_batch == 1 and num_batches >= len(loader)


def rows_loader(
    images: Images, batches: Sequence[Sequence[int]], workers: int
) -> DataLoader[Batch]:
    """Return batches of given rows of the images, in this order."""
    return DataLoader(images, batch_sampler=batches, **_worker_options(workers))  # type: ignore[arg-type] # any iterable will do


def workers_within(num_workers: int | None, batch_bytes: int) -> int:
    """Return how many processes may decode images, within what the system allows.

    Without files to open a loader fails in the middle of an epoch. Without shared memory, of which
    Docker gives 64 MB, it waits for ever.

    Args:
        num_workers: Processes that are asked for; None asks for one for each core.
        batch_bytes: Size of the largest batch, of all training processes together.
    """
    if num_workers is None:
        num_workers = cores()
    max_files = _max_open_files()
    if max_files is not None:
        limit = (max_files - RESERVED_FILES) // FILES_PER_WORKER
        num_workers = _limited(num_workers, limit, "`ulimit -n` admits few open files")
    if SHARED_MEMORY.is_dir():
        free_bytes = shutil.disk_usage(SHARED_MEMORY).free
        limit = free_bytes // (BATCHES_PER_WORKER * batch_bytes)
        reason = f"{SHARED_MEMORY} has {free_bytes / 1e6:.0f} MB (docker run --shm-size)"
        num_workers = _limited(num_workers, limit, reason)
    return num_workers


def _max_open_files() -> int | None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return None
    max_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if max_files == resource.RLIM_INFINITY else max_files


def _limited(num_workers: int, limit: int, reason: str) -> int:
    """Return no more workers than a limit for all loaders together allows, and say why."""
    limit_per_loader = max(0, limit // SIMULTANEOUS_LOADERS)
    if num_workers <= limit_per_loader:
        return num_workers
    rank_zero_warn(
        f"{limit_per_loader} instead of {num_workers} processes decode images, because {reason}."
    )
    return limit_per_loader


def _worker_options(workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "collate_fn": as_is,
    }


def as_is(batch: Batch) -> Batch:
    """Collate function of a dataset whose `__getitems__` returns whole batches."""
    return batch
