"""Means and shares with their 95% intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Not `scipy.stats`, whose import costs several seconds.
from scipy.special import ndtri, stdtrit

UPPER = 0.975
"""The probability below the upper end of an interval."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval.

    Args:
        mean: The mean.
        low: The lower end; the mean itself if it can't be known.
        high: The upper end.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of_mean(cls, values: Sequence[float]) -> Interval:
        """Student's interval of the mean of some values."""
        mean, count = statistics.mean(values), len(values)
        if count == 1:
            return cls(mean, mean, mean)
        reach = float(stdtrit(count - 1, UPPER)) * statistics.stdev(values) / math.sqrt(count)
        return cls(mean, mean - reach, mean + reach)

    @classmethod
    def of_share(cls, right: int, count: int) -> Interval:
        """Wilson's interval of the share `right / count`, which has a width for 0% and 100%, too."""
        share, square = right / count, float(ndtri(UPPER)) ** 2
        middle = (share + square / (2 * count)) / (1 + square / count)
        reach = math.sqrt(share * (1 - share) * square / count + square**2 / (4 * count**2)) / (1 + square / count)
        return cls(share, middle - reach, middle + reach)

    def minus(self, other: Interval) -> Interval:
        """Newcombe's interval of the difference of two shares, from the Wilson interval of each."""
        mean = self.mean - other.mean
        below = math.hypot(self.mean - self.low, other.high - other.mean)
        return Interval(mean, mean - below, mean + math.hypot(self.high - self.mean, other.mean - other.low))

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def text(self, digits: int = 4, factor: float = 1.0, sign: str = "") -> str:
        """The mean with both ends, each times a factor, such as 100 for percent; the sign "+" shows that, too."""
        mean, low, high = (f"{factor * value:{sign}.{digits}f}" for value in (self.mean, self.low, self.high))
        return mean if self.low == self.high else f"{mean} [{low}, {high}]"
