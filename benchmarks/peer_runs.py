"""Measurements of `benchmarks.peers`: `PeerRun`, a run of a contestant, and the `Epoch`s in it."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.peer_job import Phase

# Contestants, as options and files call them, with the names that people see.
PEERS = {
    "fit": "fit",
    "fast": "fit --config=fast",
    "lightning": "Lightning BackboneFinetuning",
    "fastai": "fastai fine_tune",
    "timm": "timm train.py",
    "torchvision": "torchvision's loop",
}


@dataclass(frozen=True)
class Epoch:
    """An epoch of a contestant, as the line of `peer_job.print_epoch` has it, with the time.

    Attributes:
        phase: What trained.
        images: Number of images trained on.
        seconds: Time of the training, without that of the validation.
        accuracy: On the test images, in [0, 1].
        minutes: Since the command was started, until the validation had ended.
    """

    phase: Phase
    images: int
    seconds: float
    accuracy: float
    minutes: float

    @property
    def images_per_second(self) -> float:
        """Speed of the training."""
        return self.images / self.seconds


@dataclass(frozen=True)
class PeerRun:
    """A run of a contestant.

    Attributes:
        peer: Key of `PEERS`.
        seed: Its seed, which is the number of the round.
        epochs: All epochs.
        minutes: Time of the whole command.
        peak_bytes: The most memory of the command and of the processes that it started.
    """

    peer: str
    seed: int
    epochs: list[Epoch]
    minutes: float
    peak_bytes: int


def speeds_of(runs: Sequence[PeerRun], phase: Phase) -> list[float]:
    """Return training images/s of all epochs of a phase."""
    speeds = []
    for run in runs:
        for epoch in run.epochs:
            if epoch.phase == phase:
                speeds.append(epoch.images_per_second)
    return speeds


def by_peer(runs: Sequence[PeerRun]) -> dict[str, list[PeerRun]]:
    """Return the runs by their contestant, in the order of `PEERS`."""
    runs_of: dict[str, list[PeerRun]] = {}
    for peer in PEERS:
        peer_runs = [run for run in runs if run.peer == peer]
        if peer_runs:
            runs_of[peer] = peer_runs
    return runs_of
