"""GPTQ and GPTAQ against a textbook elimination in float64, against round to nearest, and in their limit cases.

python -m pytest tests/core/test_gptq.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_blocks import block_error, tiny_block, tiny_stream

from qvlm import affine
from qvlm.errors import CalibrationError, RecipeError
from qvlm.fakequant import FakeQuantLinear, substituted
from qvlm.hessian import Statistics
from qvlm.methods import METHODS
from qvlm.methods.gptaq import tied_alpha
from qvlm.methods.gptq import Settings, gptq_matrix
from qvlm.methods.method import State
from qvlm.methods.stages import StagedLayer
from qvlm.recipe import Recipe, WeightScheme, component_recipe

SCHEMES = (
    WeightScheme(4, "group", 8),
    WeightScheme(3, "channel", None),
    WeightScheme(4, "tensor", None),
    WeightScheme(3, "group", 8, symmetric=False),
)
PLAIN = Settings(scales="max", act_order=False)
NOTHING: State = {}


def correlated(
    rows: int, columns: int, tokens: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, inputs of the float stream whose channels are correlated and of unequal size, and of the quantized."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    mix = torch.logspace(0, -1.5, columns)[:, None] * mix
    f = torch.randn(tokens, columns, generator=generator) @ mix
    u = f + 0.1 * f.std() * torch.randn(tokens, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), f, u


def statistics(f: torch.Tensor, u: torch.Tensor) -> Statistics:
    found = Statistics(u.shape[1], asymmetric=True)
    found.add(u, f)
    return found


def textbook(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    cross: torch.Tensor | None,
    alpha: float,
    scheme: WeightScheme,
    order: list[int],
) -> np.ndarray[Any, Any]:
    """Optimal brain quantization, one weight row and one column at a time, inverses by numpy.

    Column q is rounded; the columns left solve the least-squares problem that remains exactly:
    delta = (a / B_qq) B e_q + (H_left)^-1 c with B the inverse of the Hessian of q and the columns left.
    """
    scale, zero = (
        None if t is None else t.double().numpy() for t in affine.weight_scales(weight, scheme)
    )
    assert scale is not None
    qmin, qmax = affine.integer_range(scheme.bits)
    w, h = weight.double().numpy().copy(), hessian.numpy().copy()
    h += 0.01 * h.diagonal().mean() * np.eye(len(h))
    groups, columns = scale.shape[1], len(h)
    result = np.zeros(w.shape, np.int8)
    for row in range(len(w)):
        left = list(order)
        line = min(row, scale.shape[0] - 1)
        while left:
            q, rest = left[0], left[1:]
            s = scale[line, q * groups // columns]
            z = 0.0 if zero is None else zero[line, q * groups // columns]
            integer = np.clip(np.rint(w[row, q] / s) + z, qmin, qmax)
            result[row, q] = integer
            inverse = np.linalg.inv(h[np.ix_(left, left)])
            move = ((integer - z) * s - w[row, q]) / inverse[0, 0] * inverse[1:, 0]
            if cross is not None and rest:
                c = w[row, q] * cross.numpy()[q, rest]
                move = move + alpha * np.linalg.inv(h[np.ix_(rest, rest)]) @ c
            w[row, rest] += move
            left = rest
    return result


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("alpha", [None, 0.25, 1.0])
@pytest.mark.parametrize("act_order", [False, True])
def test_kernel_is_the_textbook(scheme: WeightScheme, alpha: float | None, act_order: bool) -> None:
    weight, f, u = correlated(5, 24, 60)
    found = statistics(f, u)
    cross = None if alpha is None else found.cross
    order = list(range(24))
    if act_order:
        order.sort(key=lambda i: -float(found.hessian[i, i]))
    solved = gptq_matrix(
        weight,
        found.hessian,
        scheme,
        replace(PLAIN, act_order=act_order, columns=7),
        cross=cross,
        alpha=alpha or 0.0,
    )
    expected = textbook(weight, found.hessian, cross, alpha or 0.0, scheme, order)
    np.testing.assert_array_equal(solved.quantized.integers.numpy(), expected)


def test_block_of_columns_does_not_matter() -> None:
    weight, f, u = correlated(7, 48, 200)
    found = statistics(f, u)
    scheme = WeightScheme(3, "group", 16)
    for cross in (None, found.cross):
        results = [
            gptq_matrix(weight, found.hessian, scheme, Settings(columns=c), cross=cross).quantized
            for c in (1, 13, 48, 128)
        ]
        for other in results[1:]:
            assert torch.equal(other.integers, results[0].integers)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_uncorrelated_inputs_give_round_to_nearest(scheme: WeightScheme) -> None:
    weight, _, _ = correlated(6, 24, 1)
    hessian = torch.diag(torch.rand(24, dtype=torch.float64) + 0.1)
    solved = gptq_matrix(weight, hessian, scheme, PLAIN).quantized
    expected = affine.quantize_weight(weight, scheme)
    assert torch.equal(solved.integers, expected.integers)
    assert torch.equal(solved.scale, expected.scale)


def test_equal_streams_give_gptq() -> None:
    weight, _, u = correlated(6, 24, 90)
    found = statistics(u, u)
    assert found.cross is not None and not found.cross.any()
    scheme = WeightScheme(3, "group", 8)
    asymmetric = gptq_matrix(weight, found.hessian, scheme, cross=found.cross, alpha=1.0)
    symmetric = gptq_matrix(weight, found.hessian, scheme)
    assert torch.equal(asymmetric.quantized.integers, symmetric.quantized.integers)


def test_zero_alpha_gives_gptq() -> None:
    weight, f, u = correlated(6, 24, 90)
    found = statistics(f, u)
    scheme = WeightScheme(3, "group", 8)
    none = gptq_matrix(weight, found.hessian, scheme, cross=found.cross, alpha=0.0)
    assert torch.equal(
        none.quantized.integers, gptq_matrix(weight, found.hessian, scheme).quantized.integers
    )


def test_scaled_statistics_give_the_same_integers() -> None:
    weight, f, u = correlated(6, 24, 90)
    found = statistics(f, u)
    assert found.cross is not None
    scheme = WeightScheme(3, "group", 8)
    # A power of two changes no mantissa, so the integers must be equal and not only close.
    once = gptq_matrix(weight, found.hessian, scheme, cross=found.cross, alpha=0.5)
    twice = gptq_matrix(weight, 1024 * found.hessian, scheme, cross=1024 * found.cross, alpha=0.5)
    assert torch.equal(once.quantized.integers, twice.quantized.integers)


def output_error(
    weight: torch.Tensor, solved: torch.Tensor, f: torch.Tensor, u: torch.Tensor
) -> float:
    wanted = f @ weight.T
    return float((u @ solved.T - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_round_to_nearest(bits: int) -> None:
    scheme = WeightScheme(bits, "group", 32)
    for seed in range(3):
        weight, f, _ = correlated(48, 64, 2000, seed)
        half = f[:1000]
        found = statistics(half, half)
        held = f[1000:]
        nearest = affine.dequantize(affine.quantize_weight(weight, scheme))
        solved = affine.dequantize(gptq_matrix(weight, found.hessian, scheme).quantized)
        # Held-out error at most half: the inputs' 64 channels span 1.5 decades, so compensation has room.
        assert output_error(weight, solved, held, held) < 0.5 * output_error(
            weight, nearest, held, held
        )


def test_asymmetric_beats_symmetric_on_a_drifted_stream() -> None:
    """A quantized stream that lost a tenth of some channels: the later ones can make up for it."""
    scheme = WeightScheme(4, "group", 32)
    for seed in range(3):
        weight, f, _ = correlated(48, 64, 4000, seed)
        u = f.clone()
        u[:, ::3] *= 0.9
        found = statistics(f[:3000], u[:3000])
        symmetric = gptq_matrix(weight, found.hessian, scheme).quantized
        asymmetric = gptq_matrix(
            weight, found.hessian, scheme, cross=found.cross, alpha=tied_alpha("auto", found)
        ).quantized
        errors = [
            output_error(weight, affine.dequantize(q), f[3000:], u[3000:])
            for q in (symmetric, asymmetric)
        ]
        assert errors[1] < 0.8 * errors[0]


def test_search_of_scales_lowers_the_error() -> None:
    scheme = WeightScheme(3, "group", 32)
    weight, f, _ = correlated(48, 64, 2000)
    found = statistics(f[:1000], f[:1000])
    errors = {
        scales: output_error(
            weight,
            affine.dequantize(
                gptq_matrix(weight, found.hessian, scheme, Settings(scales=scales)).quantized
            ),
            f[1000:],
            f[1000:],
        )
        for scales in ("search", "max")
    }
    assert errors["search"] < errors["max"]


def test_dead_columns_are_rounded_and_inert() -> None:
    weight, _, u = correlated(6, 24, 90)
    u[:, [3, 17]] = 0
    found = statistics(u, u)
    scheme = WeightScheme(4, "group", 8)
    solved = gptq_matrix(weight, found.hessian, scheme, PLAIN)
    assert solved.dead == 2
    nearest = affine.quantize_weight(weight, scheme).integers
    assert torch.equal(solved.quantized.integers[:, [3, 17]], nearest[:, [3, 17]])
    # The other columns do not see them: other dead weights (too small to set a scale) change nothing else.
    live = [i for i in range(24) if i not in (3, 17)]
    results = []
    for size in (0.1, -0.2):
        weight[:, [3, 17]] = size
        results.append(gptq_matrix(weight, found.hessian, scheme, PLAIN).quantized.integers)
    assert torch.equal(results[0][:, live], results[1][:, live])
    assert not torch.equal(results[0], results[1])


def test_indefinite_hessian_raises_damping_then_fails() -> None:
    weight, _, _ = correlated(3, 4, 9)
    scheme = WeightScheme(4, "channel", None)
    hessian = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05], dtype=torch.float64))
    assert gptq_matrix(weight, hessian, scheme, PLAIN).damping == pytest.approx(0.1, rel=1e-15)
    hessian[3, 3] = -0.9
    with pytest.raises(CalibrationError, match="not positive definite"):
        gptq_matrix(weight, hessian, scheme, PLAIN)


def test_alpha_follows_the_tokens() -> None:
    shares = []
    for tokens in (12, 36, 144):
        found = Statistics(4, asymmetric=True)
        for _ in range(tokens):
            found.add(torch.randn(4, 4), torch.randn(4, 4))
        shares.append(tied_alpha("auto", found))
    assert shares == [0.25, 0.5, 0.8]
    assert tied_alpha(0.1, found) == 0.1


def recipe(method: str, format_name: str, **options: Any) -> Recipe:
    return component_recipe(format_name, format_name, format_name, method=method, options=options)


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
@pytest.mark.parametrize(
    ("component", "format_name"),
    [("text", "w4a16"), ("text", "w3a16"), ("text", "w8a8"), ("text", "w8a8-static"),
     ("vision", "w8a8-static"), ("projector", "w8a8")],
)  # fmt: skip
def test_block_beats_round_to_nearest_and_stays_float(
    method: str, component: str, format_name: str
) -> None:
    block = tiny_block(tiny_stream(component, 6), format_name)
    before = {name: linear.weight.clone() for name, linear in block.linears.items()}
    found = METHODS[method].quantize_block(block, recipe(method, format_name), NOTHING)
    nearest = METHODS["rtn"].quantize_block(block, recipe("rtn", format_name), NOTHING)
    assert found.linears.keys() == block.linears.keys() == set(found.report["linears"])
    assert block_error(block, found.linears) < block_error(block, nearest.linears)
    for name, linear in block.linears.items():
        assert torch.equal(linear.weight, before[name])
        assert "forward" not in linear.__dict__ and not linear._forward_pre_hooks
    again = METHODS[method].quantize_block(block, recipe(method, format_name), NOTHING)
    for name, q in found.linears.items():
        assert np.array_equal(q.integers, again.linears[name].integers)
        assert np.array_equal(q.scale, again.linears[name].scale)


def test_statistics_see_what_the_quantized_model_sees() -> None:
    """down_proj's H comes from gate and up as quantized, and from its own input as quantized."""
    block = tiny_block(tiny_stream("text", 3), "w8a8-static", error=0.1)
    found = METHODS["gptq"].quantize_block(block, recipe("gptq", "w8a8-static"), NOTHING)
    name = f"{block.names[0]}.mlp.down_proj"
    others = {
        key: FakeQuantLinear.from_quantized(q, block.linears[key].bias).forward
        for key, q in found.linears.items()
        if key != name
    }
    seen: list[torch.Tensor] = []
    hook = block.linears[name].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad(), substituted(block.linears, others):
        for i, hidden in enumerate(block.quant_inputs):
            block.run(hidden, i)
    hook.remove()
    low = min(float(x.min()) for x in seen)
    high = max(float(x.max()) for x in seen)
    scheme = block.formats[name].activations
    assert scheme is not None
    scale, zero = affine.activation_parameters(torch.tensor([low]), torch.tensor([high]), scheme)
    sums = Statistics(block.linears[name].in_features)
    for x in seen:
        sums.add(affine.fake_quantize_activation(x, scheme, scale, zero))
    weights = block.formats[name].weights
    assert weights is not None
    expected = gptq_matrix(block.linears[name].weight, sums.hessian, weights).quantized
    assert np.array_equal(found.linears[name].integers, expected.integers.numpy())
    assert found.linears[name].input_scale == scale.numpy()


def test_what_linears_share_is_made_once_and_given_to_its_own() -> None:
    layer = StagedLayer(tiny_block(tiny_stream("text", 2), "w4a16"))
    one, other = Statistics(4), Statistics(4)
    made: list[Statistics] = []

    def make(sums: Statistics) -> int:
        made.append(sums)
        return len(made)

    assert layer.per_inputs({"q": one, "k": other, "v": one}, make) == {"q": 1, "k": 2, "v": 1}
    assert made == [one, other]

    def fail(sums: Statistics) -> int:
        raise CalibrationError("H is not positive definite")

    with pytest.raises(CalibrationError, match="q: H is not positive definite"):
        layer.per_inputs({"q": one}, fail)


def test_gptaq_of_equal_streams_is_gptq_in_the_first_stage() -> None:
    block = tiny_block(tiny_stream("text", 4), "w3a16")
    gptq = METHODS["gptq"].quantize_block(block, recipe("gptq", "w3a16"), NOTHING).linears
    gptaq = METHODS["gptaq"].quantize_block(block, recipe("gptaq", "w3a16"), NOTHING).linears
    for key in ("q_proj", "k_proj", "v_proj"):
        name = f"{block.names[0]}.self_attn.{key}"
        assert np.array_equal(gptq[name].integers, gptaq[name].integers)
    name = f"{block.names[0]}.mlp.down_proj"
    assert not np.array_equal(gptq[name].integers, gptaq[name].integers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": "mse"}, "option scales: 'mse', expected search or max"),
        ({"damping": 0}, "option damping: 0"),
        ({"columns": 0}, "option columns: 0"),
        ({"alpha": 2}, "option alpha: 2, expected auto or a number"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    block = tiny_block(tiny_stream("projector", 1), "w8a8")
    with pytest.raises(RecipeError, match=message):
        METHODS["gptaq"].quantize_block(block, recipe("gptaq", "w8a8", **options), NOTHING)
