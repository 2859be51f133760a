"""Loaders: which images each process reads, in which order, and from where a resumed epoch goes on."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch
from torch.utils.data import DataLoader, DistributedSampler

from cifar_transfer.data.images import Batch, Images
from cifar_transfer.errors import UserError


class WholeShard(DistributedSampler):
    """Every image exactly once over all ranks: `DistributedSampler` without the repeats that make the ranks even.

    Repeats would count some images twice in the metrics. Nothing is exchanged per batch in evaluation, so the ranks
    need not have the same number of batches.
    """

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


class Shuffled(DistributedSampler):
    """`DistributedSampler` that can begin later."""

    first = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.first, None)


class ResumableLoader(DataLoader[Batch]):
    """Training batches; a checkpoint written within an epoch continues after those that were given.

    Lightning keeps the state of every loader that has one.

    Attributes:
        given: How many batches of the epoch have been given.
        epoch: Returns how many there are in an epoch, which the Trainer may limit.
    """

    given = 0
    epoch: Callable[[], float]

    def state_dict(self) -> dict[str, int]:
        """How many batches to skip: none when the epoch is over."""
        return {"given": 0 if self.given >= self.epoch() else self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch after these batches."""
        self._skipped = state["given"]

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override] # as loop and profilers use it
        self.given, self._skipped = getattr(self, "_skipped", 0), 0
        self.sampler.first = self.given * (self.batch_size or 1)  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self.given += 1
            yield batch


def check_processes(images: Mapping[str, Images], world: int) -> None:
    """Refuse, as a `UserError`, splits of which one of `world` processes would get no batch: the others would wait."""
    for split, found in images.items():
        least = 2 if split == "train" else 1  # batch-norm cannot train on one
        if len(found) < least * world:
            processes = f"{world} processes, of which each" if world > 1 else "1 process, which"
            few = f"{len(found)} {split} images are too few for {processes} needs {least}"
            raise UserError(f"{few}: take fewer devices, or add images.")


def training_loader(images: Images, batch_size: int, workers: int, rank: int, world: int, seed: int) -> ResumableLoader:
    """Shuffled batches of the process `rank` of `world`; the seed and the epoch decide the order."""
    sampler = Shuffled(images, num_replicas=world, rank=rank, shuffle=True, seed=seed)
    # Batch-norm cannot train on one value a channel, and a network may end in 1 x 1 pixels.
    last = len(sampler) % batch_size == 1
    return ResumableLoader(images, batch_size, sampler=sampler, drop_last=last, **_reading(workers))


def evaluation_loader(images: Images, batch_size: int, workers: int, rank: int, world: int) -> DataLoader[Batch]:
    """Batches in order, each image once over all processes."""
    sampler = WholeShard(images, num_replicas=world, rank=rank, shuffle=False)
    return DataLoader(images, batch_size, sampler=sampler, **_reading(workers))


def _reading(workers: int) -> dict:
    pin = torch.cuda.is_available()
    return {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pin, "collate_fn": as_is}


def as_is(batch: Batch) -> Batch:
    """Collate function of a dataset whose `__getitems__` returns whole batches."""
    return batch
