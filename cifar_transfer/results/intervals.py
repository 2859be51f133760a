"""Means over several seeds, and how far they may be trusted."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

# 97.5th percentiles of Student's t by degrees of freedom, from 1; of more the last one is used,
# which is a little too wide. Table: https://www.itl.nist.gov/div898/handbook/eda/section3/eda3672.htm
T_PERCENTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

# An interval needs as many values. That of two is 13 times as wide as they are apart.
MIN_VALUES = 3
MAX_SEEDS = 1000  # of a command

DIFFERENCE = "difference (points)"  # heading of differences of percentages


class Interval(NamedTuple):
    """A mean with its 95 % interval, which is Student's and so supposes a normal distribution.

    Attributes:
        mean: Mean of the values.
        deviation: Their standard deviation, with one degree of freedom less than values; None for
            one value.
        half_width: The interval is the mean plus or minus this; None for fewer than `MIN_VALUES`.
    """

    mean: float
    deviation: float | None
    half_width: float | None

    def text(self, decimals: int) -> str:
        """Return the mean and half of the interval, such as "91.71 ± 0.35"."""
        if self.half_width is None:
            return f"{self.mean:.{decimals}f}"
        return f"{self.mean:.{decimals}f} ± {self.half_width:.{decimals}f}"


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of one value or more with its 95 % interval."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    deviation = stdev(values)
    if len(values) < MIN_VALUES:
        return Interval(mean, deviation, None)
    degrees = min(len(values) - 1, len(T_PERCENTILES))
    half_width = T_PERCENTILES[degrees - 1] * deviation / math.sqrt(len(values))
    return Interval(mean, deviation, half_width)


def interval_of(values: Sequence[float]) -> Interval | None:
    """Return the mean of values with its 95 % interval, or None if there are none."""
    if not values:
        return None
    return mean_interval(values)


def paired_difference(
    values: Mapping[int, float], other_values: Mapping[int, float]
) -> Interval | None:
    """Return how much greater values are than others of the same seeds.

    None if no seed has both. What a seed chooses is the same for both, so that pairs tell more than
    the two means.

    Args:
        values: A value for each seed.
        other_values: The same of what is compared with.
    """
    differences = []
    for seed, value in values.items():
        if seed in other_values:
            differences.append(value - other_values[seed])
    return interval_of(differences)


def interval_text(interval: Interval | None) -> str:
    """Return the cell of an interval in a table for people; "" for None."""
    if interval is None:
        return ""
    return interval.text(2)


def interval_columns(name: str) -> list[str]:
    """Return the headings of `interval_cells`."""
    return [name, f"{name}: deviation", f"{name}: from", f"{name}: to"]


def interval_cells(interval: Interval | None, lowest: float = 0.0) -> list[str]:
    """Return mean, deviation, and both ends of the interval; empty where there is none.

    Args:
        interval: Interval of a percentage, or of a difference of percentages.
        lowest: Least value that is possible, 0 or, of differences, -100. No end is below it, and
            none above 100.
    """
    if interval is None:
        return [""] * 4
    mean, deviation, half_width = interval
    if half_width is None:
        return [number(mean, 2), number(deviation, 2), "", ""]
    low = max(lowest, mean - half_width)
    high = min(100.0, mean + half_width)
    return [number(mean, 2), number(deviation, 2), number(low, 2), number(high, 2)]


def seeds_note(num_seeds: int, num_networks: int) -> str:
    """Return what means and, of several networks, differences of a table over seeds are."""
    if num_seeds < MIN_VALUES:
        text = f"Mean over {num_seeds} seeds, too few for an interval: take {MIN_VALUES} or more."
    else:
        text = f"Mean ± half of the 95 % interval (Student's t) over {num_seeds} seeds."
    if num_networks > 1:
        text += " Differences are to the first network, seed by seed."
    return f"{text}\n"


def number(value: float | None, decimals: int) -> str:
    """Return a number with so many decimals; "" for None."""
    if value is None:
        return ""
    return f"{value:.{decimals}f}"
