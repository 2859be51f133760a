"""Contestants take turns, so that whatever else the machine is doing slows all of them alike."""

import time
from collections.abc import Callable, Mapping

import torch

from cifar_transfer.base.text import markdown


def seconds(work: Callable[[], object]) -> float:
    """Time one call of `work`, to the end of what it queued on a GPU."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(
    contestants: Mapping[str, Callable[[], object]], rounds: int, most: float
) -> dict[str, list[float]]:
    """Call each contestant once a round, in turn forwards and backwards, after a first round that does not count.

    Args:
        contestants: What to time, by name.
        rounds: How many times at most.
        most: No new round begins after so many seconds.

    Returns:
        The seconds of each call.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for work in contestants.values():
        seconds(work)
    start = time.perf_counter()
    for turn in range(rounds):
        for name, work in list(contestants.items())[:: -1 if turn % 2 else 1]:
            times[name].append(seconds(work))
        if time.perf_counter() - start > most:
            break
    return times


def table(times: Mapping[str, list[float]], images: int) -> str:
    """Images per second (median and quartiles over rounds), and as multiples of the first contestant's.

    Args:
        times: Seconds by contestant, the reference first; the ratio is the median over rounds of the ratio in a round.
        images: That each call works on.
    """
    rows = [["", "images/s", "quartiles", "times the first", "quartiles"]]
    first = torch.tensor(next(iter(times.values())))
    for name, values in times.items():
        own = torch.tensor(values)
        low, median, high = (images / own).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        least, ratio, most = (
            (first[: len(own)] / own).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        )
        rows.append(
            [
                name,
                f"{median:.0f}",
                f"{low:.0f} to {high:.0f}",
                f"{ratio:.2f}",
                f"{least:.2f} to {most:.2f}",
            ]
        )
    return markdown(rows)
