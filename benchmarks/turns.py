"""Contestants take turns, so that whatever else the machine is doing slows all of them alike."""

import time
from collections.abc import Callable, Mapping

import torch

from cifar_transfer.base.text import markdown

QUARTILES = torch.tensor([0.25, 0.5, 0.75])


def seconds(work: Callable[[], object]) -> float:
    """Time one call of `work`, to the end of what it queued on a GPU."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(
    contestants: Mapping[str, Callable[[], object]], rounds: int, max_seconds: float
) -> dict[str, list[float]]:
    """Call each contestant once a round, forwards and backwards in turn.

    A first round does not count.

    Args:
        contestants: Works to time, by name.
        rounds: Number of rounds at most.
        max_seconds: No new round begins after so many seconds.

    Returns:
        The seconds of each call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for work in contestants.values():
        seconds(work)
    start = time.perf_counter()
    for number in range(rounds):
        names = list(contestants)
        if number % 2 == 1:
            names.reverse()
        for name in names:
            times[name].append(seconds(contestants[name]))
        if time.perf_counter() - start > max_seconds:
            break
    return times


def table(times: Mapping[str, list[float]], images: int) -> str:
    """Return a table of images per second, and of multiples of the first contestant's.

    Both are medians with quartiles over rounds. The multiple is the median of the ratio in a round.

    Args:
        times: Seconds by contestant, the reference first.
        images: Number of images that each call works on.
    """
    rows = [["", "images/s", "quartiles", "times the first", "quartiles"]]
    reference = torch.tensor(next(iter(times.values())))
    for name, values in times.items():
        durations = torch.tensor(values)
        low, median, high = (images / durations).quantile(QUARTILES).tolist()
        ratios = reference[: len(durations)] / durations
        low_ratio, ratio, high_ratio = ratios.quantile(QUARTILES).tolist()
        row = [
            name,
            f"{median:.0f}",
            f"{low:.0f} to {high:.0f}",
            f"{ratio:.2f}",
            f"{low_ratio:.2f} to {high_ratio:.2f}",
        ]
        rows.append(row)
    return markdown(rows)
