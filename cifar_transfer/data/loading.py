"""Loaders: which images each process reads, in which order, and from where a resumed epoch goes on."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.images import Batch, Images, cores

RESERVED_FILES = 40  # that a process may have open beside
FILES_A_WORKER = 6  # of its queues and pipes, and of the images in shared memory
SHARED_MEMORY = Path("/dev/shm")  # through which torch's workers pass their batches
BATCHES_AHEAD = 3  # of a worker: two that wait, and one that is being made
LOADERS = 2  # of training and validation, whose workers live side by side


class Shuffled(DistributedSampler):
    """`DistributedSampler` that can begin later."""

    first = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.first, None)


class Balanced(Shuffled):
    """Draws each class as often as any other, to one image in an epoch of `each` images a process.

    Classes take turns, and each goes round its images in a fixed order: an epoch takes up where the one before has
    ended, and is shuffled. So each image of a class comes k or k + 1 times, within an epoch and over all of them.
    `labels`, int64 [N], are those of the images of all processes.
    """

    def __init__(
        self, labels: np.ndarray, each: int, num_replicas: int, rank: int, seed: int
    ) -> None:
        super().__init__(range(each * num_replicas), num_replicas, rank, seed=seed)  # type: ignore[arg-type] # its length counts
        mixed = np.random.default_rng(seed).permutation(len(labels))
        mixed = mixed[np.argsort(labels[mixed], kind="stable")]
        self.rounds = np.split(
            mixed, np.flatnonzero(np.diff(labels[mixed])) + 1
        )  # rows of each class

    def __iter__(self) -> Iterator[int]:
        for place in super().__iter__():
            turn, label = divmod(self.epoch * self.total_size + place, len(self.rounds))
            yield int(self.rounds[label][turn % len(self.rounds[label])])


class ResumableLoader(DataLoader[Batch]):
    """Training batches; a checkpoint of the middle of an epoch, where Lightning keeps the state, goes on from there."""

    given = 0  # batches of the epoch so far
    epoch: Callable[[], float]  # how many there are in an epoch, which the Trainer may limit
    _skipped = 0

    def state_dict(self) -> dict[str, int]:
        """How many batches to skip: none when the epoch is over."""
        return {"given": 0 if self.given >= self.epoch() else self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch after these batches."""
        self._skipped = state["given"]

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override] # as loop and profilers use it
        self.given, self._skipped = self._skipped, 0
        self.sampler.first = self.given * (self.batch_size or 1)  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self.given += 1
            yield batch


def check_processes(images: Mapping[str, Images], world: int) -> None:
    """Refuse, by a `UserError`, splits too small to give each of `world` processes a batch."""
    for split, found in images.items():
        least = 2 if split == "train" else 1  # batch-norm cannot train on one
        if len(found) < least * world:
            processes = f"{world} processes, of which each" if world > 1 else "1 process, which"
            few = f"{len(found)} {split} images are too few for {processes} needs {least}"
            raise UserError(f"{few}: take fewer devices, or add images.")


def training_loader(
    images: Images,
    batch_size: int,
    workers: int,
    rank: int,
    world: int,
    seed: int,
    balanced: bool = False,
) -> ResumableLoader:
    """Shuffled batches for process `rank` of `world`, read by `workers` processes; seed and epoch give the order."""
    sampler = Shuffled(images, num_replicas=world, rank=rank, shuffle=True, seed=seed)
    # Batch-norm cannot train on one value a channel, and a network may end in 1 x 1 pixels.
    last = len(sampler) % batch_size == 1
    if balanced:
        sampler = Balanced(images.labels, len(sampler) - last, world, rank, seed)
    return ResumableLoader(images, batch_size, sampler=sampler, drop_last=last, **_reading(workers))


def evaluation_loader(
    images: Images, batch_size: int, workers: int, rank: int, world: int
) -> DataLoader[Batch]:
    """Batches in order, each image once over all processes: repeats to make these even would count in the metrics."""
    sampler = UnrepeatedDistributedSampler(images, num_replicas=world, rank=rank, shuffle=False)
    return DataLoader(images, batch_size, sampler=sampler, **_reading(workers))


def rows_loader(
    images: Images, batches: Sequence[Sequence[int]], workers: int
) -> DataLoader[Batch]:
    """Batches of these rows, in this order."""
    return DataLoader(images, batch_sampler=batches, **_reading(workers))  # type: ignore[arg-type] # any iterable does


def workers_within(asked: int | None, batch_bytes: int) -> int:
    """How many processes decode: so many, or one for each core, within what the system admits.

    Without files to open a loader fails in mid-epoch, and without shared memory, of which Docker gives 64 MB, it waits
    for ever. `batch_bytes` are those of the largest batch.
    """
    wanted, limits = cores() if asked is None else asked, {}
    with suppress(ImportError):  # on Windows, which has no such limit
        import resource

        if (files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) != resource.RLIM_INFINITY:
            limits["`ulimit -n` admits few open files"] = (files - RESERVED_FILES) // FILES_A_WORKER
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        room = f"{SHARED_MEMORY} has {free / 1e6:.0f} MB (docker run --shm-size)"
        limits[room] = free // (BATCHES_AHEAD * batch_bytes)
    for why, most in limits.items():
        if wanted > (most := max(0, most // LOADERS)):
            rank_zero_warn(f"{most} instead of {wanted} processes decode images, because {why}.")
            wanted = most
    return wanted


def _reading(workers: int) -> dict:
    pin = torch.cuda.is_available()
    return dict(
        num_workers=workers, persistent_workers=workers > 0, pin_memory=pin, collate_fn=as_is
    )


def as_is(batch: Batch) -> Batch:
    """Collate function of a dataset whose `__getitems__` returns whole batches."""
    return batch
