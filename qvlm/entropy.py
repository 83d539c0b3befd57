"""Q-VLM's cross-layer dependency and the partition it gives; arrays and numbers only, no model.

The dependency of two consecutive layers is the conditional entropy of their quantized activations
(Eq. 4),

    D(k, k+1) = - sum_{m, m'} P[m, m'] log( P[m, m'] / sum_m' P[m, m'] ),

P the joint probability of rounding point m in layer k and m' in layer k+1. Rounding is made
differentiable by the soft assignment of Eq. 5: p(x -> q_m) is proportional to exp(-(x - q_m)^2 /
Delta^2).

What the paper leaves open, and the reading taken here:

* The exponent of Eq. 5 is printed as (x - q_m)^2 / Delta, which depends on the unit of x.
  ``exponent=2`` divides by Delta^2 (default, dimensionless); ``exponent=1`` is the printed form.
  The report logs which was used.
* Eq. 5 gives marginals only. The joint table pairs the same token and the same channel of two
  hidden states: the residual stream has one width everywhere, so "layer" means decoder layer and
  its activation the hidden state entering it.
* Rounding points are the 2^bits levels between each channel's own minimum and maximum over the
  calibration set (the paper quantizes decoder activations per channel). One range for all channels
  would let a single outlier channel put all others on one point, and every entropy would be zero.
* Eq. 6 sums one term more than Eq. 7 divides by. Here a block ks..kr holds its kr - ks inner pairs,
  and their mean must exceed h0 (Eq. 7). h0 is not given: the mean of all D by default. The paper
  names no algorithm for the cut: greedy from the first layer, blocks do not overlap.

Source: Q-VLM (NeurIPS 2024, arXiv 2410.08119v3), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qvlm.errors import RecipeError

Partition = tuple[tuple[int, ...], ...]

# Soft assignments computed per hidden state (elements x levels) at most; beyond it elements are
# strided.
ASSIGNMENTS = 1 << 26
# Soft assignments in memory at a time: 16 MiB of float32.
CHUNK = 1 << 22
# Keeps log finite where the soft assignment underflows: 1e-30 log(1e-30) is below any rounding.
TINY = 1e-30


@dataclass(frozen=True)
class Dependency:
    """Of two consecutive hidden states: D(k, k+1) and the plain entropies H(k), H(k+1), in nats."""

    conditional: float
    entropy_before: float
    entropy_after: float


def channel_ranges(hidden: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Minimum and maximum [channels] over all samples and tokens of hidden states [...,
    channels].
    """
    low = torch.stack([h.reshape(-1, h.shape[-1]).amin(0) for h in hidden]).amin(0)
    high = torch.stack([h.reshape(-1, h.shape[-1]).amax(0) for h in hidden]).amax(0)
    return low, high


def soft_assignment(x: Tensor, low: Tensor, high: Tensor, levels: int, exponent: int = 2) -> Tensor:
    """Eq. 5: probability [..., levels] that each x [...] rounds to each of ``levels`` points from
    low to high.

    low and high broadcast against x. A range of width zero counts as one point (the first level).
    Differentiable in x.
    """
    spacing = (high - low) / (levels - 1)
    safe = torch.where(spacing > 0, spacing, torch.ones_like(spacing))
    position = (x - low) / safe  # in levels: point m is at m
    points = torch.arange(levels, dtype=x.dtype, device=x.device)
    distance = (position[..., None] - points).square()  # (x - q_m)^2 / Delta^2
    if exponent == 1:
        distance = distance * safe[..., None]  # (x - q_m)^2 / Delta
    return torch.softmax(-distance, dim=-1)


def joint_counts(
    before: Tensor,
    after: Tensor,
    ranges: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    levels: int,
    exponent: int = 2,
) -> Tensor:
    """Sum over elements of a_k[m] a_{k+1}[m'] as [levels, levels]; before and after [tokens,
    channels].
    """
    (low, high), (low_after, high_after) = ranges
    first = soft_assignment(before, low, high, levels, exponent).reshape(-1, levels)
    second = soft_assignment(after, low_after, high_after, levels, exponent).reshape(-1, levels)
    return first.T @ second


def conditional_entropy(joint: Tensor) -> Tensor:
    """Eq. 4 of an unnormalised joint table [m, m']: entropy of m' given m, nats. Differentiable."""
    table = (joint / joint.sum()).clamp_min(TINY)
    return -(table * (table / table.sum(1, keepdim=True)).log()).sum()


def entropy(counts: Tensor) -> Tensor:
    """Entropy of an unnormalised distribution, nats."""
    p = (counts / counts.sum()).clamp_min(TINY)
    return -(p * p.log()).sum()


def dependency(
    before: Sequence[Tensor], after: Sequence[Tensor], bits: int, exponent: int = 2
) -> Dependency:
    """Eq. 4 over a calibration set: one hidden state [..., channels] per sample, entering layers k
    and k+1.

    One pass, memory bounded by ``CHUNK``. If all elements would need more than ``ASSIGNMENTS`` soft
    assignments, every stride-th token is used, the same in both states.
    """
    levels = 1 << bits
    if len(before) != len(after) or any(
        a.shape != b.shape for a, b in zip(before, after, strict=True)
    ):
        raise RecipeError("dependency: the two layers' hidden states must have the same shapes")
    ranges = (channel_ranges(before), channel_ranges(after))
    total = sum(h.numel() for h in before) * levels
    stride = -(-total // ASSIGNMENTS)
    table = torch.zeros(levels, levels, dtype=torch.float64)
    for b, a in zip(before, after, strict=True):
        rows = b.reshape(-1, b.shape[-1])[::stride]
        step = max(1, CHUNK // (rows.shape[1] * levels))
        others = a.reshape(-1, a.shape[-1])[::stride]
        for start in range(0, rows.shape[0], step):
            part = slice(start, start + step)
            table += joint_counts(rows[part], others[part], ranges, levels, exponent).double().cpu()
    return Dependency(
        float(conditional_entropy(table)),
        float(entropy(table.sum(1))),
        float(entropy(table.sum(0))),
    )


def greedy_partition(
    scores: Sequence[float], depth: int, threshold: float | None = None
) -> Partition:
    """Eq. 7 on scores[k] = D(k, k+1) of ``len(scores) + 1`` layers: consecutive blocks of at most
    ``depth`` layers.

    From the first layer on, a block takes the next layer while the mean score of its inner pairs
    would stay strictly above ``threshold`` (h0; None: the mean of all scores).
    """
    if depth < 1:
        raise RecipeError(f"partition: depth {depth}, expected at least 1")
    h0 = threshold if threshold is not None else (sum(scores) / len(scores) if scores else 0.0)
    blocks: list[tuple[int, ...]] = []
    block, inside = [0], 0.0
    for k, score in enumerate(scores):
        pairs = len(block)  # inner pairs if layer k+1 joins
        if pairs < depth and (inside + score) / pairs > h0:
            block, inside = [*block, k + 1], inside + score
        else:
            blocks.append(tuple(block))
            block, inside = [k + 1], 0.0
    return (*blocks, tuple(block))


def fixed_partition(layers: int, depth: int) -> Partition:
    """Blocks of ``depth`` layers, the last one shorter if it does not divide; depth 1 is the
    layer-wise search.
    """
    if depth < 1:
        raise RecipeError(f"partition: depth {depth}, expected at least 1")
    return tuple(tuple(range(i, min(i + depth, layers))) for i in range(0, layers, depth))


def random_partition(like: Partition, seed: int) -> Partition:
    """The block sizes of ``like`` in random order: same histogram, hence same search cost, no
    information.
    """
    sizes = np.random.default_rng(seed).permutation([len(block) for block in like])
    ends = np.cumsum(sizes)
    return tuple(
        tuple(range(end - size, end))
        for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)
    )
