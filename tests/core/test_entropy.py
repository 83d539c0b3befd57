"""Q-VLM's dependency kernels agree with loops in float64, and partitions are cut where Eq. 7 says.

Run: python -m pytest tests/core/test_entropy.py -q
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvlm import entropy
from qvlm.errors import RecipeError

Array = npt.NDArray[np.float64]


def loop_assignment(x: float, low: float, high: float, levels: int, exponent: int) -> list[float]:
    """Eq. 5 written out."""
    delta = (high - low) / (levels - 1)
    weights = [math.exp(-((x - (low + m * delta)) ** 2) / delta**exponent) for m in range(levels)]
    return [w / sum(weights) for w in weights]


def loop_dependency(before: Array, after: Array, bits: int, exponent: int) -> float:
    """Eq. 4 element by element; before and after [tokens, channels]."""
    levels = 2**bits
    table = [[0.0] * levels for _ in range(levels)]
    for t in range(before.shape[0]):
        for c in range(before.shape[1]):
            rows = (before[:, c], after[:, c])
            a, b = (
                loop_assignment(float(r[t]), float(r.min()), float(r.max()), levels, exponent)
                for r in rows
            )
            for i in range(levels):
                for j in range(levels):
                    table[i][j] += a[i] * b[j] / before.size
    return -sum(p * math.log(p / sum(row)) for row in table for p in row if p > 0)


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("exponent", [1, 2])
def test_dependency_equals_loops(bits: int, exponent: int) -> None:
    rng = np.random.default_rng(bits)
    before = rng.normal(size=(11, 5)) * [0.1, 1.0, 3.0, 7.0, 0.5]
    after = before + rng.normal(size=(11, 5))
    samples = [torch.tensor(before[:4]).reshape(1, 4, 5), torch.tensor(before[4:]).reshape(1, 7, 5)]
    nexts = [torch.tensor(after[:4]).reshape(1, 4, 5), torch.tensor(after[4:]).reshape(1, 7, 5)]
    found = entropy.dependency(samples, nexts, bits, exponent)
    # Both in float64; sums of 55 terms of at most 1: far below 1e-12.
    assert found.conditional == pytest.approx(
        loop_dependency(before, after, bits, exponent), abs=1e-12
    )


def test_exponent_two_has_no_unit() -> None:
    before, after = torch.randn(1, 30, 4).double(), torch.randn(1, 30, 4).double()
    one = entropy.dependency([before], [after], 3, 2).conditional
    # A power of two scales every intermediate exactly.
    assert entropy.dependency([64 * before], [64 * after], 3, 2).conditional == one
    assert entropy.dependency([64 * before], [64 * after], 3, 1).conditional != one


def test_chunks_and_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = torch.randn(1, 40, 6).double(), torch.randn(1, 40, 6).double()
    whole = entropy.dependency([before], [after], 2).conditional
    monkeypatch.setattr(entropy, "CHUNK", 6 * 4 * 7)  # seven tokens at a time
    chunked = entropy.dependency([before], [after], 2).conditional
    assert chunked == pytest.approx(whole, abs=1e-12)  # float64 sums in another order
    monkeypatch.setattr(entropy, "ASSIGNMENTS", 40 * 6 * 4 // 2)  # every second token
    ranges = (entropy.channel_ranges([before]), entropy.channel_ranges([after]))
    counts = entropy.joint_counts(before[0, ::2], after[0, ::2], ranges, 4)
    half = float(entropy.conditional_entropy(counts))
    assert entropy.dependency([before], [after], 2).conditional == pytest.approx(half, abs=1e-12)


def test_limit_cases() -> None:
    diagonal = torch.eye(4, dtype=torch.float64)
    assert float(entropy.conditional_entropy(diagonal)) == pytest.approx(0.0, abs=1e-12)
    independent = torch.ones(4, 4, dtype=torch.float64)
    assert float(entropy.conditional_entropy(independent)) == pytest.approx(math.log(4), abs=1e-12)
    assert float(entropy.entropy(torch.ones(8).double())) == pytest.approx(math.log(8), abs=1e-12)
    # A constant channel sits on one point and must not divide by zero.
    constant = entropy.soft_assignment(torch.ones(3), torch.ones(3), torch.ones(3), 4)
    assert bool(torch.isfinite(constant).all())
    # On a rounding point the neighbours at one Delta weigh exp(-1), exp(-4), ...
    on_point = entropy.soft_assignment(torch.tensor(2.0), torch.tensor(0.0), torch.tensor(3.0), 4)
    weights = torch.exp(-(torch.arange(4.0) - 2).square())
    # Four float32 operations.
    torch.testing.assert_close(on_point, weights / weights.sum(), rtol=4 * 2**-23, atol=0)


def test_soft_assignment_has_a_gradient() -> None:
    x = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    low, high = torch.full((3,), -3.0).double(), torch.full((3,), 3.0).double()

    def loss(value: torch.Tensor) -> torch.Tensor:
        a = entropy.soft_assignment(value, low, high, 4).reshape(-1, 4)
        return entropy.conditional_entropy(a.T @ a.roll(1, 0))

    # gradcheck's own defaults stand for float64 central differences (eps 1e-6).
    assert torch.autograd.gradcheck(loss, (x,))


def test_conditional_entropy_is_at_most_the_plain_one() -> None:
    before, after = torch.randn(1, 200, 3).double(), torch.randn(1, 200, 3).double()
    found = entropy.dependency([before], [after], 3)
    assert 0 < found.conditional <= found.entropy_after <= math.log(8)


# Hand-made entropies: (scores, depth, h0, blocks).
CUTS = [
    ([3.0, 1.0, 1.0], 3, None, ((0, 1, 2), (3,))),  # h0 = 5/3; (3 + 1) / 2 = 2 lies above it
    ([1.0, 1.0, 1.0], 3, None, ((0,), (1,), (2,), (3,))),  # nothing lies strictly above the mean
    ([2.0, 2.0, 2.0, 2.0], 3, 1.0, ((0, 1, 2), (3, 4))),  # depth ends a block
    ([2.0, 2.0, 2.0, 2.0], 1, 0.0, ((0,), (1,), (2,), (3,), (4,))),
    ([0.0, 5.0, 0.0, 5.0], 3, 2.4, ((0,), (1, 2, 3), (4,))),  # (5 + 0) / 2 = 2.5 > 2.4
    ([0.0, 5.0, 0.0, 5.0], 3, 2.5, ((0,), (1, 2), (3, 4))),  # 2.5 is not above 2.5
    ([], 3, None, ((0,),)),
]


@pytest.mark.parametrize(("scores", "depth", "h0", "blocks"), CUTS)
def test_greedy_partition(
    scores: list[float], depth: int, h0: float | None, blocks: entropy.Partition
) -> None:
    assert entropy.greedy_partition(scores, depth, h0) == blocks


@given(st.lists(st.floats(0, 5), max_size=20), st.integers(1, 4), st.integers(0, 9))
def test_partitions_cover_all_layers(scores: list[float], depth: int, seed: int) -> None:
    layers = len(scores) + 1
    greedy = entropy.greedy_partition(scores, depth)
    shuffled = entropy.random_partition(greedy, seed)
    for blocks in (greedy, entropy.fixed_partition(layers, depth), shuffled):
        assert [i for block in blocks for i in block] == list(range(layers))
        assert max(len(block) for block in blocks) <= depth
    assert sorted(map(len, shuffled)) == sorted(map(len, greedy))
    assert shuffled == entropy.random_partition(greedy, seed)


def test_fixed_partition() -> None:
    assert entropy.fixed_partition(7, 3) == ((0, 1, 2), (3, 4, 5), (6,))
    assert entropy.fixed_partition(2, 1) == ((0,), (1,))
    with pytest.raises(RecipeError, match="depth 0"):
        entropy.fixed_partition(4, 0)
