"""Means over several seeds, and how far they may be trusted."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

# 97.5th percentiles of Student's t by degrees of freedom, from 1; of more the last one is used,
# which is a little too wide. Table: https://www.itl.nist.gov/div898/handbook/eda/section3/eda3672.htm
T_PERCENTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


class Interval(NamedTuple):
    """A mean with its 95 % interval, which is Student's and so supposes a normal distribution.

    Attributes:
        mean: Mean of the values.
        deviation: Their standard deviation, with one degree of freedom less than values; None for
            one value.
        half_width: The interval is the mean plus or minus this; None for one value.
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
    degrees = min(len(values) - 1, len(T_PERCENTILES))
    half_width = T_PERCENTILES[degrees - 1] * deviation / math.sqrt(len(values))
    return Interval(mean, deviation, half_width)
