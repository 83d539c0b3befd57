"""Signed gradient descent on rounding: which way each weight of a block rounds, and its scales, by the block's loss.

    W(v, a) = s (clip(round(z + (b - z) s0 / s + v)) - z),   s = float16(s0 (1 + a)),   v in [-1/2, 1/2]

b is where each weight would like to be on the start's grid, s0 the start's scales. With v = 0 and a = 0 this is the
start, exactly: b is moved to within half a step of the start's integer.

1. Gradient G = dL/dW of the block's loss over a few samples, one forward and backward pass each.
2. Rounding passes the gradient straight through: dL/dv = s G where the weight is not saturated, and
   dL/da = s0 sum over the group of G (q - z - [not saturated] (b - z) s0 / s).
3. v -= rate sign(dL/dv), a -= scale_rate sign(dL/da); both rates fall linearly to 0. With rate 1/steps a v travels
   at most half a step in all, so the weights change first whose b lies near the middle of two integers.
4. The loss on held-out samples, every so many steps and at the end; the best state is the result, the start included.

Solver of AutoRound (Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", arXiv 2309.05516). What we
do differently: it starts at integers that other methods found instead of round to nearest; b comes from the layer's
own objective (``descent.coordinate_optima``), which tells it where changing an integer is cheap; scales multiply a
start that was searched; the best state is judged on samples that gave no gradient.

Cost: ``steps`` times ``batch`` forward and backward passes of the block, and three numbers per weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qvlm import affine
from qvlm.affine import QuantizedWeight

# How far b may be from its integer: below a half, so that v = 0 rounds to the start whatever float32 does.
EDGE = 0.499
# Bound on |v|.
REACH = 0.5

# (weights by name, sample) -> the block's loss on it, differentiable in the weights.
Loss = Callable[[Mapping[str, Tensor], int], Tensor]


@dataclass(frozen=True)
class Settings:
    """steps: updates; batch: samples of each; rate and scale_rate: of v and a at the first step; every: steps between
    held-out losses."""

    steps: int
    batch: int
    rate: float
    scale_rate: float
    every: int
    seed: int = 0


class SoftWeight:
    """One weight whose rounding and scales can move. ``optima`` is b [out, in], in integers of ``start``'s grid."""

    def __init__(self, start: QuantizedWeight, optima: Tensor, bits: int) -> None:
        self.start, self.bits = start, bits
        integers = start.integers.float()
        self.base = optima.float().clamp(integers - EDGE, integers + EDGE)
        self.offset = torch.zeros_like(integers)  # v
        self.stretch = torch.zeros_like(start.scale)  # a
        zero = start.zero_point
        self.zero = torch.zeros_like(start.scale) if zero is None else zero.float()

    def _spread(self, x: Tensor) -> Tensor:
        """A value per scale as one per weight [out, in]."""
        out, columns = self.base.shape
        return x.repeat_interleave(columns // x.shape[1], 1).expand(out, columns)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scales like the start's, (b - z) s0 / s [out, in] and the integers, all float32."""
        qmin, qmax = affine.integer_range(self.bits)
        scale = affine.ste_float16(self.start.scale * (1 + self.stretch))
        signs = self.start.scale.sign()
        scale = (scale * signs).clamp(min=affine.SMALLEST_SCALE) * signs
        zero = self._spread(self.zero)
        position = (self.base - zero) * self._spread(self.start.scale / scale)
        return scale, position, torch.round(zero + position + self.offset).clamp(qmin, qmax)

    def weight(self) -> Tensor:
        """W(v, a) float32 [out, in]."""
        scale, _, integers = self._parts()
        return self._spread(scale) * (integers - self._spread(self.zero))

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """Steps 2 and 3 with G [out, in]."""
        qmin, qmax = affine.integer_range(self.bits)
        _, position, integers = self._parts()
        zero = self._spread(self.zero)
        free = zero + position + self.offset
        inside = ((free > qmin - 0.5) & (free < qmax + 0.5)).to(gradient.dtype)
        slope = gradient * (integers - zero - inside * position)
        if self.start.scale.shape[0] == 1:
            total = slope.sum().reshape(1, 1)
        else:
            total = slope.reshape(*self.start.scale.shape, -1).sum(-1)
        signs = self.start.scale.sign()
        moved = self.offset - rate * torch.sign(gradient * inside) * self._spread(signs)
        self.offset = moved.clamp(-REACH, REACH)
        self.stretch = self.stretch - scale_rate * torch.sign(total) * signs

    def stretched(self, ratio: float) -> SoftWeight:
        """A copy with every scale ``ratio`` times the start's and nothing else moved."""
        other = SoftWeight(self.start, self.base, self.bits)
        other.stretch = torch.full_like(self.stretch, ratio - 1)
        return other

    def quantized(self) -> QuantizedWeight:
        """Integers and scales of W(v, a)."""
        scale, _, integers = self._parts()
        return QuantizedWeight(integers.to(torch.int8), scale, self.start.zero_point)


@dataclass(frozen=True)
class Found:
    """The best state by held-out loss; losses: (step, held-out loss), step 0 the start."""

    weights: dict[str, QuantizedWeight]
    losses: list[tuple[int, float]]


def sign_descent(
    soft: Mapping[str, SoftWeight],
    loss: Loss,
    fit: Sequence[int],
    held: Sequence[int],
    settings: Settings,
) -> Found:
    """Steps 1 to 4. fit: samples for gradients, visited in random order by seed; held: samples to judge by."""

    def judged() -> float:
        weights = {name: s.weight() for name, s in soft.items()}
        with torch.no_grad():
            return sum(float(loss(weights, i)) for i in held) / len(held)

    losses = [(0, judged())]
    best, found = losses[0][1], {name: s.start for name, s in soft.items()}
    generator = torch.Generator().manual_seed(settings.seed)
    queue: list[int] = []
    for step in range(settings.steps):
        weights = {name: s.weight().requires_grad_(True) for name, s in soft.items()}
        gradients = [torch.zeros_like(w) for w in weights.values()]
        for _ in range(settings.batch):
            if not queue:
                queue = [fit[j] for j in torch.randperm(len(fit), generator=generator).tolist()]
            with torch.enable_grad():
                value = loss(weights, queue.pop())
            # Of the weights alone: the model's own parameters get no gradient.
            for total, part in zip(
                gradients, torch.autograd.grad(value, list(weights.values())), strict=True
            ):
                total += part
        left = 1 - step / settings.steps
        for s, gradient in zip(soft.values(), gradients, strict=True):
            s.step(gradient, settings.rate * left, settings.scale_rate * left)
        if (step + 1) % settings.every == 0 or step + 1 == settings.steps:
            losses.append((step + 1, judged()))
            if losses[-1][1] < best:
                best, found = losses[-1][1], {name: s.quantized() for name, s in soft.items()}
    return Found(found, losses)
