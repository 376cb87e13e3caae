"""Means and shares with their 95% intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Of Student's distribution at 97.5%, by degrees of freedom from 1 on."""
NORMAL_QUANTILE = 1.96


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
        """Student's interval of a mean.

        Args:
            values: What the mean is of.

        Returns:
            The interval.
        """
        mean, count = statistics.mean(values), len(values)
        if count == 1:
            return cls(mean, mean, mean)
        quantile = T_QUANTILES[count - 2] if count <= len(T_QUANTILES) + 1 else NORMAL_QUANTILE
        half = quantile * statistics.stdev(values) / math.sqrt(count)
        return cls(mean, mean - half, mean + half)

    @classmethod
    def of_share(cls, right: int, count: int) -> Interval:
        """Wilson's interval of a share, which has a width for 0% and 100%, too.

        Args:
            right: How many.
            count: Of how many.

        Returns:
            The interval.
        """
        share, square = right / count, NORMAL_QUANTILE**2
        middle = (share + square / (2 * count)) / (1 + square / count)
        half = math.sqrt(share * (1 - share) * square / count + square**2 / (4 * count**2)) / (1 + square / count)
        return cls(share, middle - half, middle + half)

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def text(self, digits: int = 4, factor: float = 1.0, sign: str = "") -> str:
        """The mean with both ends.

        Args:
            digits: After the point. Default 4.
            factor: Times each number, such as 100 for percent. Default 1.
            sign: `"+"` shows the sign of positive numbers, too. Default none.

        Returns:
            The text.
        """
        mean, low, high = (f"{factor * value:{sign}.{digits}f}" for value in (self.mean, self.low, self.high))
        return mean if self.low == self.high else f"{mean} [{low}, {high}]"
