"""Proves the shared arithmetic: integers, scales and zero points equal a loop-by-loop oracle for every scheme, what
is on the grid stays there, gradients pass where they should.

Run: python -m pytest tests/core/test_affine.py
"""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm import affine
from qvlm.errors import CheckpointError, RecipeError
from qvlm.recipe import ActivationScheme, WeightScheme

# Half the spacing of float32 numbers, relative.
UNIT = 2.0**-24


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, WeightScheme]:
    granularity = draw(st.sampled_from(["tensor", "channel", "group"]))
    size = draw(st.sampled_from([1, 4, 16])) if granularity == "group" else None
    columns = (size or draw(st.integers(1, 6))) * draw(st.integers(1, 3))
    rows = draw(st.integers(1, 5))
    scheme = WeightScheme(draw(st.integers(2, 8)), granularity, size, draw(st.booleans()))
    spread = draw(st.sampled_from([1e-6, 0.02, 1.0, 300.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = (rng.standard_normal((rows, columns)) * spread).astype(np.float32)
    if draw(st.booleans()):
        weight[draw(st.integers(0, rows - 1))] = 0.0
    return torch.from_numpy(weight), scheme


@settings(max_examples=150, deadline=None)
@given(cases())
def test_quantization_equals_the_oracle(case: tuple[torch.Tensor, WeightScheme]) -> None:
    weight, scheme = case
    integers, scales, zeros = oracles.quantize(
        weight.numpy(),
        scheme.bits,
        scheme.group_size,
        scheme.symmetric,
        scheme.granularity == "tensor",
    )
    found = affine.quantize_weight(weight, scheme)
    assert found.scale.numpy().tolist() == scales.tolist()
    assert found.integers.dtype == torch.int8
    assert found.integers.numpy().tolist() == integers.tolist()
    if scheme.symmetric:
        assert found.zero_point is None
    else:
        assert found.zero_point is not None
        assert found.zero_point.numpy().tolist() == zeros.tolist()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_dequantized_equals_fake_quantized_and_the_error_is_half_a_step(
    case: tuple[torch.Tensor, WeightScheme],
) -> None:
    weight, scheme = case
    quantized = affine.quantize_weight(weight, scheme)
    values = affine.dequantize(quantized)
    assert torch.equal(values, affine.fake_quantize_weight(weight, scheme))
    # Half a step; rounding the scale to float16 moves the end of the range by 2^-11 of it, at most
    # 2^-11 * 255 steps, and a zero point rounded on its own by half a step more.
    steps = 0.5 + 2.0**-11 * 2**scheme.bits + (0.0 if scheme.symmetric else 0.5)
    groups = affine.grouped((weight - values).abs(), scheme)
    assert bool((groups <= quantized.scale[..., None] * steps * (1 + 4 * UNIT)).all())


@settings(max_examples=100, deadline=None)
@given(cases())
def test_values_on_the_grid_come_back(case: tuple[torch.Tensor, WeightScheme]) -> None:
    weight, scheme = case
    first = affine.quantize_weight(weight, scheme)
    again = affine.quantize_weight(
        affine.dequantize(first),
        scheme,
        first.scale,
        None if first.zero_point is None else first.zero_point,
    )
    assert torch.equal(first.integers, again.integers)


def test_scales_are_normal_float16_numbers() -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-7, 0.0], [3.0, -2.0]])
    for symmetric in (True, False):
        scale, _ = affine.weight_scales(weight, WeightScheme(8, "channel", None, symmetric))
        assert torch.equal(scale, scale.half().float())
        assert bool((scale >= 2.0**-14).all())


def test_one_group_over_all_columns_is_per_channel() -> None:
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    group = affine.quantize_weight(weight, WeightScheme(4, "group", 24))
    channel = affine.quantize_weight(weight, WeightScheme(4, "channel", None))
    assert torch.equal(group.integers, channel.integers)
    assert torch.equal(group.scale, channel.scale)


def test_clip_narrows_the_range_and_saturates() -> None:
    weight = torch.tensor([[1.0, -1.0, 0.25, 0.1]])
    scheme = WeightScheme(4, "channel", None)
    quantized = affine.quantize_weight(weight, scheme, clip=0.5)
    assert quantized.scale.item() == np.float16(0.5 / 7)
    assert quantized.integers.tolist() == [[7, -8, 4, 1]]
    per_group = affine.weight_scales(
        weight, WeightScheme(4, "group", 2), torch.tensor([[1.0, 0.5]])
    )
    assert per_group[0].tolist() == [[float(np.float16(1 / 7)), float(np.float16(0.125 / 7))]]


def test_a_given_range_replaces_the_weights_own() -> None:
    weight = torch.tensor([[1.0, -0.5]])
    scale, _ = affine.weight_scales(
        weight,
        WeightScheme(8, "channel", None),
        low_high=(torch.tensor([[-2.0]]), torch.tensor([[1.0]])),
    )
    assert scale.item() == np.float16(2 / 127)


def test_a_weight_beyond_float16_scales_is_refused() -> None:
    with pytest.raises(CheckpointError, match="beyond float16"):
        affine.weight_scales(torch.tensor([[1e6, 0.0]]), WeightScheme(4, "channel", None))


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(RecipeError, match="group_size 16 does not divide in_features 24"):
        affine.quantize_weight(torch.zeros(2, 24), WeightScheme(4, "group", 16))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-6, 1.0, 1e3]))
def test_token_normalised_input_equals_the_oracle(bits: int, seed: int, spread: float) -> None:
    x = (np.random.default_rng(seed).standard_normal((3, 7)) * spread).astype(np.float32)
    integers, values = oracles.token_normalised(x, bits)
    found = affine.fake_quantize_activation(torch.from_numpy(x), ActivationScheme(bits, "token"))
    # Two float32 products, each rounded once.
    assert np.abs(found.numpy() - values).max() <= 2 * UNIT * np.abs(values).max()
    step = np.float32(1) / np.float32(2 ** (bits - 1) - 1)
    maximum = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-4))
    assert np.rint(found.numpy() / maximum / step).astype(int).tolist() == integers.tolist()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_static_input_equals_the_oracle(granularity: str, symmetric: bool, bits: int) -> None:
    x = np.random.default_rng(bits).standard_normal((6, 5)).astype(np.float32) + 0.5
    scheme = ActivationScheme(bits, granularity, symmetric)  # type: ignore[arg-type]
    found_range = affine.activation_range(torch.from_numpy(x), scheme)
    scale, zero = affine.activation_parameters(found_range.low, found_range.high, scheme)
    found = affine.fake_quantize_activation(torch.from_numpy(x), scheme, scale, zero).numpy()
    qmin, qmax = affine.integer_range(bits)
    for c in range(x.shape[1]):
        column = x if granularity == "tensor" else x[:, c]
        s, z = oracles.parameters(float(column.min()), float(column.max()), bits, symmetric)
        for t in range(x.shape[0]):
            q = min(max(oracles.round_half_even(float(x[t, c] / np.float32(s))) + z, qmin), qmax)
            assert found[t, c] == np.float32((q - z) * s)


def test_static_input_needs_a_scale() -> None:
    with pytest.raises(ValueError, match="calibrated scale"):
        affine.fake_quantize_activation(torch.ones(1, 2), ActivationScheme(8, "tensor"))


def test_ranges_union() -> None:
    scheme = ActivationScheme(8, "channel")
    first = affine.activation_range(torch.tensor([[1.0, -1.0]]), scheme)
    second = affine.activation_range(torch.tensor([[-3.0, 2.0]]), scheme)
    union = first.union(second)
    assert union.low.tolist() == [-3.0, -1.0] and union.high.tolist() == [1.0, 2.0]


def test_gradients_pass_straight_through_rounding_and_stop_at_saturation() -> None:
    weight = torch.tensor([[1.0, -0.3, 0.2]], requires_grad=True)
    clip = torch.tensor([[0.5]], requires_grad=True)
    values = affine.fake_quantize_weight(weight, WeightScheme(4, "channel", None), clip=clip)
    values.sum().backward()
    assert weight.grad is not None and clip.grad is not None
    # Inside the range d value / d weight = 1 (the scale's own share aside, carried by the largest
    # element); the saturated first element gives the scale's gradient only.
    assert weight.grad[0, 1:].tolist() == [1.0, 1.0]
    # d/dclip of 7 * clip/7 (saturated) + the rounding errors (q - w/s) * ds/dclip of the others.
    scale = float(np.float16(0.5 / 7))
    errors = sum(round(w / scale) - w / scale for w in (-0.3, 0.2))
    assert clip.grad.item() == pytest.approx((7 + errors) / 7, abs=1e-5)


def test_ste_round_is_half_to_even_with_identity_gradient() -> None:
    x = torch.tensor([0.5, 1.5, -2.5, 0.49], requires_grad=True)
    y = affine.ste_round(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 2.0, -2.0, 0.0]
    assert x.grad is not None and x.grad.tolist() == [1.0] * 4
