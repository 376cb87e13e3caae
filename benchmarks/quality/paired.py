"""Statistics of paired differences: two arms that share backbone, task and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peft_talan.sft.intervals import Interval

RESAMPLES = 10_000
CONFIDENCE = 0.95
FEWEST_SEEDS = 3
"""A resampling of fewer is no interval: it ends at the lowest and the highest seed."""


@dataclass(frozen=True)
class Summary:
    """The mean of paired differences, its bootstrap interval, and the sign test.

    Args:
        mean: Over all pairs.
        low: The lower end of the 95% interval; NaN where a cell has fewer seeds than `FEWEST_SEEDS`.
        high: The upper end.
        positive: Pairs above zero.
        negative: Pairs below zero.
        pairs: All pairs.
        sign_test: The two-sided p of the sign test; ties are left out.
    """

    mean: float
    low: float
    high: float
    positive: int
    negative: int
    pairs: int
    sign_test: float


def symbol(found: Interval) -> str:
    """▲ better, ▼ worse, = no difference: whether the interval leaves zero out."""
    return "▲" if found.low > 0 else "▼" if found.high < 0 else "="


def sign_test(positive: int, negative: int) -> float:
    """The probability of a split at least as uneven, were both signs equally likely."""
    count = positive + negative
    if count == 0:
        return 1.0
    tail = sum(math.comb(count, k) for k in range(max(positive, negative), count + 1)) / 2**count
    return min(1.0, 2 * tail)


def summarise(cells: Sequence[Sequence[float]]) -> Summary:
    """Summarise differences by cell; the bootstrap draws seeds inside each cell, so cells keep their weight.

    Args:
        cells: For each cell (backbone and task), the differences by seed.

    Returns:
        The summary; the mean is that of the cells' means.
    """
    kept = [np.asarray(cell, dtype=float) for cell in cells if len(cell)]
    if not kept:
        raise ValueError("cells: there is no pair")
    draw = np.random.default_rng(0)
    means = np.mean([cell[draw.integers(0, len(cell), (RESAMPLES, len(cell)))].mean(axis=1) for cell in kept], axis=0)
    spread = all(len(cell) >= FEWEST_SEEDS for cell in kept)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) if spread else (math.nan, math.nan)
    everything = np.concatenate(kept)
    positive, negative = int((everything > 0).sum()), int((everything < 0).sum())
    return Summary(
        mean=float(np.mean([cell.mean() for cell in kept])),
        low=float(low),
        high=float(high),
        positive=positive,
        negative=negative,
        pairs=len(everything),
        sign_test=sign_test(positive, negative),
    )
