"""Signed gradient descent: starts exactly at its start, moves by autograd's signs, never ends worse on held-out data.

python -m pytest tests/core/test_signed_rounding.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from problems import error, problem

from qvlm import affine
from qvlm.affine import QuantizedWeight
from qvlm.descent import coordinate_optima
from qvlm.recipe import WeightScheme
from qvlm.scales import search_scales
from qvlm.signed_rounding import EDGE, Loss, Settings, SoftWeight, sign_descent

SCHEMES = (
    WeightScheme(2, "group", 16),
    WeightScheme(4, "tensor", None),
    WeightScheme(3, "group", 16, symmetric=False),
)
PLAN = Settings(steps=60, batch=1, rate=1 / 60, scale_rate=1e-3, every=10)


def soft_weight(scheme: WeightScheme) -> tuple[SoftWeight, torch.Tensor]:
    weight, _, _, hessian, _ = problem()
    begin = affine.quantize_weight(weight, scheme)
    optima = coordinate_optima(begin, weight.double(), hessian)  # far from the integers in places
    return SoftWeight(begin, optima, scheme.bits), hessian


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_starts_at_its_start(scheme: WeightScheme) -> None:
    soft, _ = soft_weight(scheme)
    assert torch.equal(soft.weight(), affine.dequantize(soft.start))
    found = soft.quantized()
    assert torch.equal(found.integers, soft.start.integers)
    assert torch.equal(found.scale, soft.start.scale)
    assert found.zero_point is soft.start.zero_point


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_follows_the_signs_of_autograd(scheme: WeightScheme) -> None:
    soft, _ = soft_weight(scheme)
    out, columns = soft.base.shape

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(columns // x.shape[1], 1).expand(out, columns)

    offset = soft.offset.clone().requires_grad_(True)
    stretch = soft.stretch.clone().requires_grad_(True)
    qmin, qmax = affine.integer_range(scheme.bits)
    zero = spread(soft.zero)
    scale = affine.ste_float16(soft.start.scale * (1 + stretch))
    free = zero + (soft.base - zero) * spread(soft.start.scale / scale) + offset
    integers = affine.ste_round(free).clamp(qmin, qmax)
    gradient = torch.randn(out, columns, generator=torch.Generator().manual_seed(3))
    (gradient * spread(scale) * (integers - zero)).sum().backward()
    soft.step(gradient, 0.25, 0.125)
    assert offset.grad is not None and stretch.grad is not None
    # On the edge of the grid clamp passes a gradient and rounding beyond it none: leave those out.
    edge = (integers == qmin) | (integers == qmax)
    assert torch.equal(
        (soft.offset + 0.25 * torch.sign(offset.grad))[~edge], torch.zeros(int((~edge).sum()))
    )
    if not bool(edge.any()):
        assert torch.equal(soft.stretch, -0.125 * torch.sign(stretch.grad))


def test_a_negative_scale_is_the_mirror_image() -> None:
    """Scale -s and gradient -G move roundings and scales as s and G do; the weight is the negative."""
    soft, _ = soft_weight(SCHEMES[0])
    other = SoftWeight(QuantizedWeight(soft.start.integers, -soft.start.scale), soft.base, 2)
    gradient = torch.randn(soft.base.shape, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        soft.step(gradient, 0.25, 0.125)
        other.step(-gradient, 0.25, 0.125)
    assert torch.equal(soft.offset, other.offset) and torch.equal(soft.stretch, other.stretch)
    assert torch.equal(soft.weight(), -other.weight()) and bool(soft.offset.any())
    assert torch.equal(soft.quantized().integers, other.quantized().integers)
    assert torch.equal(soft.quantized().scale, -other.quantized().scale)


def test_one_weight_by_hand() -> None:
    """s = 0.5, q = 2, b = 2.4: uphill gradients lower v until 2.4 + v rounds to 1."""
    begin = QuantizedWeight(torch.tensor([[2]], dtype=torch.int8), torch.tensor([[0.5]]))
    soft = SoftWeight(begin, torch.tensor([[2.4]]), 4)
    soft.step(torch.tensor([[1.0]]), 0.5, 0.0)
    assert soft.quantized().integers.item() == 2  # 1.9
    for _ in range(3):
        soft.step(torch.tensor([[1.0]]), 0.5, 0.0)
    assert float(soft.offset) == -0.5  # no further than half a step
    # Downhill in W, and W = s q with q = 2 lies below b s0 = 1.2: dW/da = s0 (q - b) < 0, so s shrinks.
    soft.step(torch.tensor([[-1.0]]), 0.0, 0.25)
    assert soft.quantized().scale.item() == 0.375
    assert soft.quantized().integers.item() == 3  # 2.4 * 0.5 / 0.375 - 0.5 = 2.7
    assert SoftWeight(begin, torch.tensor([[9.0]]), 4).base.item() == pytest.approx(2 + EDGE)


def test_a_saturated_weight_by_hand() -> None:
    """s = 0.5, two bits, q = 1 at the end of the grid: beyond it v moves nothing, and W = s q grows with s."""
    begin = QuantizedWeight(torch.tensor([[1]], dtype=torch.int8), torch.tensor([[0.5]]))
    soft = SoftWeight(begin, torch.tensor([[1.4]]), 2)
    soft.step(torch.tensor([[-1.0]]), 0.5, 0.0)
    assert float(soft.offset) == 0.5 and soft.quantized().integers.item() == 1  # 1.9, clipped
    soft.step(torch.tensor([[1.0]]), 0.5, 0.25)
    assert float(soft.offset) == 0.5
    assert (
        soft.quantized().scale.item() == 0.375
    )  # dW/da = s0 q > 0; inside the grid s0 (q - b) < 0


def quadratic(weight: torch.Tensor, parts: list[torch.Tensor]) -> Loss:
    """Output error of one linear on a sample of tokens."""

    def loss(weights: Mapping[str, torch.Tensor], sample: int) -> torch.Tensor:
        return (parts[sample] @ (weights["w"] - weight).T).square().mean()

    return loss


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_round_to_nearest_on_new_tokens(bits: int) -> None:
    scheme = WeightScheme(bits, "group", 16)
    weight, f, *_ = problem(rows=32, tokens=3000)
    x = f.float()
    parts, held = list(x[:2000].split(100)), x[2000:].double().T @ x[2000:].double()
    # At two bits the full range leaves a step so long that nearly all integers are 0: the best step for the weights.
    scale = search_scales(weight, scheme, torch.ones(48)) if bits == 2 else None
    nearest = affine.quantize_weight(weight, scheme, scale)
    soft = {"w": SoftWeight(nearest, weight / nearest.scale.repeat_interleave(16, 1), bits)}
    found = sign_descent(
        soft, quadratic(weight, parts), range(16), range(16, 20), replace(PLAN, batch=4)
    )
    after = float(error(found.weights["w"], weight.double(), held).sum())
    before = float(error(nearest, weight.double(), held).sum())
    assert after < before


def test_an_exact_start_stays_and_the_best_state_is_kept() -> None:
    """The weight is on the grid: every move is worse, so the start is the result, bit for bit."""
    weight, f, *_ = problem()
    begin = affine.quantize_weight(weight, WeightScheme(4, "group", 16))
    exact = affine.dequantize(begin)
    soft = {"w": SoftWeight(begin, begin.integers.double(), 4)}
    parts = list(f.float().split(100))
    found = sign_descent(soft, quadratic(exact, parts), [0, 1], [2], replace(PLAN, rate=0.5))
    assert found.losses[0] == (0, 0.0) and found.weights["w"] is begin
    # Far too large steps for the scales: the last state is worse than the start and is not taken.
    rough = {"w": SoftWeight(begin, begin.integers.double(), 4)}
    found = sign_descent(
        rough, quadratic(weight, parts), [0, 1], [2], replace(PLAN, scale_rate=0.3)
    )
    assert found.losses[-1][1] > found.losses[0][1]
    values = quadratic(weight, parts)({"w": affine.dequantize(found.weights["w"])}, 2)
    assert float(values) == min(value for _, value in found.losses)


def test_no_rate_is_the_start_and_a_seed_is_a_result() -> None:
    weight, f, *_ = problem()
    begin = affine.quantize_weight(weight, WeightScheme(3, "group", 16))
    parts = list(f.float().split(50))

    def run(**changes: float) -> QuantizedWeight:
        soft = {"w": SoftWeight(begin, weight / begin.scale.repeat_interleave(16, 1), 3)}
        plan = replace(PLAN, **changes)  # type: ignore[arg-type]
        return sign_descent(soft, quadratic(weight, parts), range(4), [4, 5], plan).weights["w"]

    still = run(rate=0.0, scale_rate=0.0)
    assert torch.equal(still.integers, begin.integers) and torch.equal(still.scale, begin.scale)
    first, again = run(seed=1), run(seed=1)
    assert torch.equal(first.integers, again.integers) and torch.equal(first.scale, again.scale)
    assert not torch.equal(first.integers, begin.integers)
