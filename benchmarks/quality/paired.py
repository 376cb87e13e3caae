"""Statistics of paired differences: two arms that share backbone, task and seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from peft_talan.sft.intervals import Interval

from ..runs import Row

RESAMPLES = 10_000
CONFIDENCE = 0.95
FEWEST_SEEDS = 3
"""A resampling of fewer is no interval: it ends at the lowest and the highest seed."""
PAIRS = (
    ("lora+talan", "lora"),
    ("lora+talan", "lora-matched"),
    ("lora-matched", "lora"),
    ("dora+talan", "dora"),
    ("rslora+talan", "rslora"),
)
MEASURES: dict[str, Callable[[Row, Row], float]] = {
    "exact match, points": lambda new, old: 100 * (new["exact_match"] - old["exact_match"]),
    "loss, % lower": lambda new, old: 100 * (1 - new["loss"] / old["loss"]),
    "known tasks, points": lambda new, old: 100 * (new["known_exact_match"] - old["known_exact_match"]),
    "known tasks, loss % lower": lambda new, old: 100 * (1 - new["known_loss"] / old["known_loss"]),
    "plain text, nats lower": lambda new, old: old["text_loss"] - new["text_loss"],
}
"""Differences so that more is better."""


@dataclass(frozen=True)
class Summary(Interval):
    """The mean of paired differences with its bootstrap interval, NaN where a cell has fewer than `FEWEST_SEEDS`."""

    positive: int
    negative: int
    pairs: int
    sign_test: float

    def text(self, digits: int = 2, factor: float = 1.0, sign: str = "+") -> str:
        """The mean with both ends, or alone where these are not known."""
        if math.isnan(self.low):
            return f"{factor * self.mean:{sign}.{digits}f}"
        return super().text(digits, factor, sign)


def symbol(found: Interval) -> str:
    """▲ better, ▼ worse, = no difference: whether the interval leaves zero out."""
    return "▲" if found.low > 0 else "▼" if found.high < 0 else "="


def sign_test(positive: int, negative: int) -> float:
    """The probability of a split at least as uneven, were both signs equally likely; ties are left out."""
    count = positive + negative
    if count == 0:
        return 1.0
    tail = sum(math.comb(count, k) for k in range(max(positive, negative), count + 1)) / 2**count
    return min(1.0, 2 * tail)


def summarise(cells: Sequence[Sequence[float]]) -> Summary:
    """Summarise the seeds' differences in each cell (backbone and task); the mean is that of the cells' means."""
    kept = [np.asarray(cell, dtype=float) for cell in cells if len(cell)]
    if not kept:
        raise ValueError("cells: there is no pair")
    draw = np.random.default_rng(0)
    # Seeds are drawn inside each cell, so that cells keep their weight.
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
