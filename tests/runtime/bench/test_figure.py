"""Proves that a figure's interval keeps the coverage it states, and that pairing round by round makes
a ratio immune to a machine that drifts: python -m pytest tests/runtime/bench/test_figure.py
"""

import math

import numpy as np
import pytest

from qvlm_runtime.bench.figure import COVERAGE, ENOUGH, figure, rank, ratio


@pytest.mark.parametrize(("count", "k"), [(6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (100, 40)])
def test_ranks_are_those_of_the_sign_test_tables(count: int, k: int) -> None:
    tail = sum(math.comb(count, i) for i in range(k)) / 2**count
    assert rank(count) == (k, pytest.approx(1 - 2 * tail))
    assert 1 - 2 * tail >= COVERAGE > 1 - 2 * (tail + math.comb(count, k) / 2**count)


def test_too_few_samples_state_what_they_cover() -> None:
    assert [rank(n) for n in (1, 2, 5)] == [(1, 0.0), (1, 0.5), (1, 0.9375)]
    assert rank(ENOUGH)[1] >= COVERAGE > rank(ENOUGH - 1)[1]
    assert figure([3.0]).spread == math.inf and figure([0.0, 0.0]).spread == 0.0


def test_a_figure_is_median_and_order_statistics_and_keeps_the_order_of_samples() -> None:
    one = figure([5.0, 1.0, 9.0, 3.0, 2.0, 8.0, 7.0, 4.0, 6.0])
    assert (one.median, one.low, one.high) == (5.0, 2.0, 8.0)
    assert one.samples == (5.0, 1.0, 9.0, 3.0, 2.0, 8.0, 7.0, 4.0, 6.0)
    assert one.spread == pytest.approx(0.6)


def test_a_common_factor_of_a_round_cancels_exactly() -> None:
    drift = np.array([1.0, 2.0, 4.0, 8.0, 4.0, 2.0])
    one = ratio(3.0 * drift, 1.5 * drift)
    assert (one.median, one.low, one.high) == (2.0, 2.0, 2.0)


def simulated(paired: bool, trials: int = 400) -> float:
    """Share of trials in which the interval of the ratio of two equal programs holds 1.

    Skewed noise of 10 %, on a machine that gets 60 % slower over the run. Unpaired: all rounds of
    one, then all of the other.
    """
    generator, held, rounds = np.random.default_rng(0), 0, 12
    for _ in range(trials):
        noise = 1 + 0.1 * generator.exponential(size=2 * rounds)
        seconds = np.linspace(1.0, 1.6, 2 * rounds) * noise
        # The one that comes first changes from round to round, as in measure.
        a, b = seconds[0::2].copy(), seconds[1::2].copy()
        a[1::2], b[1::2] = b[1::2].copy(), a[1::2].copy()
        if not paired:
            a, b = seconds[:rounds], seconds[rounds:]
        one = ratio(a, b)
        held += one.low <= 1.0 <= one.high
    return held / trials


def test_two_equal_programs_have_ratio_one_within_the_stated_interval() -> None:
    # Three standard deviations of a share of 400 trials below the stated coverage.
    _, stated = rank(12)
    assert simulated(paired=True) >= stated - 3 * math.sqrt(stated * (1 - stated) / 400)


def test_without_interleaving_the_same_interval_is_wrong() -> None:
    assert simulated(paired=False) < 0.05
