"""Samples to a figure with a stated spread, and paired samples to a ratio with one.

The figure is the median. Its interval is made of order statistics: of n samples the k-th smallest
and the k-th largest enclose the true median with probability 1 - 2 P(Binomial(n, 1/2) < k),
whatever the distribution is; timings are skewed, so a standard deviation would promise what it
does not keep. k is the largest with at least 95 %. Fewer than six samples cannot reach that; then
k is 1 and the coverage that is reached stands beside the figure.

A ratio is the median of the quotients of samples taken in the same round: what slows a whole round
(another process, a clock step) slows both sides and cancels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

COVERAGE = 0.95
ENOUGH = 6  # the fewest samples whose range covers the median with 95 %: 1 - 2 / 2**6 = 0.969


@dataclass(frozen=True)
class Figure:
    """Median of ``samples`` (in the order taken); [low, high] holds the true one with ``coverage``."""

    median: float
    low: float
    high: float
    coverage: float
    samples: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Half the interval's width over the median; 0.0 for a median of 0, infinite below two samples."""
        if len(self.samples) < 2:
            return math.inf
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def figure(samples: Sequence[float]) -> Figure:
    """The figure of at least one sample."""
    ordered = sorted(samples)
    k, coverage = rank(len(ordered))
    median = statistics.median(ordered)
    return Figure(median, ordered[k - 1], ordered[-k], coverage, tuple(samples))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Figure:
    """The figure of the quotients; sample i of both was taken in round i."""
    return figure([a / b for a, b in zip(numerators, denominators, strict=True)])


def rank(count: int) -> tuple[int, float]:
    """The largest k whose order statistics cover the median with COVERAGE, or 1; and its coverage."""
    best, tail = (1, max(0.0, 1 - 2 * 0.5**count)), 0.0
    for k in range(1, count // 2 + 1):
        tail += math.comb(count, k - 1) * 0.5**count
        if 1 - 2 * tail < COVERAGE:
            break
        best = (k, 1 - 2 * tail)
    return best
