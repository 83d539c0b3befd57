"""VLMQ: each projection solved with its own factors, the candidates, and its limit cases as equalities.

python -m pytest tests/core/test_vlmq.py
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny_blocks import attention_of, attention_outputs, tiny_block, tiny_stream

from qvlm import importance, modality
from qvlm.affine import dequantize, quantize_weight
from qvlm.errors import RecipeError
from qvlm.fakequant import FakeQuantLinear, substituted
from qvlm.hessian import Statistics
from qvlm.importance import Attention
from qvlm.methods import METHODS, gptq, vlmq
from qvlm.methods.gptq import gptq_matrix
from qvlm.methods.method import Block, State
from qvlm.methods.stages import StagedLayer
from qvlm.recipe import Recipe, WeightScheme, component_recipe

NOTHING: State = {}


def recipe(method: str, format_name: str = "w3a16", **options: Any) -> Recipe:
    return component_recipe(format_name, format_name, format_name, method=method, options=options)


def quantized(block: Block, method: str, **options: Any) -> Any:
    return METHODS[method].quantize_block(block, recipe(method, **options), NOTHING)


@pytest.fixture(scope="module")
def text_block() -> Block:
    return tiny_block(tiny_stream("text", 3), "w3a16", error=0.1)


def test_the_output_projection_is_weighed_behind_quantized_inputs(
    text_block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4: its factors see q, k and v as integers, so rounding those moves them."""
    seen: list[tuple[set[str], list[torch.Tensor]]] = []
    output_factors = vlmq.AttentionSolver._output_factors

    def spy(solver: vlmq.AttentionSolver, layer: StagedLayer) -> list[torch.Tensor]:
        seen.append((set(layer.results), output_factors(solver, layer)))
        return seen[-1][1]

    monkeypatch.setattr(vlmq.AttentionSolver, "_output_factors", spy)
    settings = vlmq.Settings.of(recipe("vlmq"))
    solver = vlmq.AttentionSolver(StagedLayer(text_block), attention_of(text_block), settings)
    solver.solve("token", range(3))
    ((finished, factors),) = seen
    assert finished == set(solver.inputs)
    assert not torch.equal(factors[0], output_factors(solver, solver.layer)[0])


def test_factors_are_local(text_block: Block) -> None:
    """One backward pass leaves no gradient on any weight and no function on any linear."""
    block = text_block
    for linear in block.linears.values():
        linear.weight.requires_grad_(True)
    quantized(block, "vlmq")
    for linear in block.linears.values():
        assert linear.weight.grad is None and "forward" not in linear.__dict__
        linear.weight.requires_grad_(False)


def test_equal_importance_is_gptaq(text_block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(value: float) -> Any:
        def run(stream: Any, index: int, attention: Any, linears: Any, hidden: Any, target: Any,
                sample: int, scope: str) -> Any:  # fmt: skip
            with torch.no_grad():
                output = importance.attention_output(stream, index, attention, hidden, sample)
            return {n: torch.full((hidden.shape[1],), value) for n in linears}, output

        return run

    plain = quantized(text_block, "gptaq")
    for value in (1.0, 0.375):
        monkeypatch.setattr(importance, "input_importance", constant(value))
        monkeypatch.setattr(
            importance, "output_importance", lambda o, t, v=value: torch.full((o.shape[1],), v)
        )
        for rule in ("token", "blend"):
            found = quantized(text_block, "vlmq", candidates=[rule], exponent=2)
            assert found.linears.keys() == plain.linears.keys()
            for name, q in plain.linears.items():
                assert np.array_equal(found.linears[name].integers, q.integers), name
                assert np.array_equal(found.linears[name].scale, q.scale), name


def test_uniform_rule_is_gptaq(text_block: Block) -> None:
    plain = quantized(text_block, "gptaq")
    found = quantized(text_block, "vlmq", candidates=["uniform"])
    for name, q in plain.linears.items():
        assert np.array_equal(found.linears[name].integers, q.integers), name


def test_equal_streams_are_gptq_for_q_k_v() -> None:
    """U = F: no loss, so no importance and no D: the first layer of a model. (o then sees q, k, v quantized.)"""
    block = tiny_block(tiny_stream("text", 3), "w3a16")
    plain = quantized(block, "gptq")
    for candidates in (["token"], ["uniform", "token", "blend"]):
        found = quantized(block, "vlmq", candidates=candidates)
        for key in "qkv":
            name = f"{block.names[0]}.self_attn.{key}_proj"
            assert np.array_equal(found.linears[name].integers, plain.linears[name].integers)
            assert np.array_equal(found.linears[name].scale, plain.linears[name].scale)


def test_factors_differ_between_projections_and_move_integers(text_block: Block) -> None:
    attention = attention_of(text_block)
    solver = vlmq.AttentionSolver(
        StagedLayer(text_block), attention, vlmq.Settings.of(recipe("vlmq"))
    )
    q, k, v = (torch.cat(solver.factors[name]) for name in attention.inputs)
    assert not torch.equal(q, k) and not torch.equal(k, v)
    assert float(torch.cat([q, k, v]).min()) >= np.float32(importance.FLOOR)
    plain, token = (
        quantized(text_block, "vlmq", candidates=[rule], exponent=2)
        for rule in ("uniform", "token")
    )
    # Three tiny samples hold fewer tokens than 4 per channel: the guard weighs all alike.
    for name, q_ in plain.linears.items():
        assert np.array_equal(q_.integers, token.linears[name].integers)
        if "self_attn" in name:
            assert token.report["linears"][name]["temperature"] == 0.0
    importance_only = pytest.MonkeyPatch()
    with importance_only.context() as patch:
        patch.setattr(importance, "TOKENS_PER_CHANNEL", 0.01)
        weighted = quantized(text_block, "vlmq", candidates=["token"], exponent=2)
    for key in "qkvo":
        name = f"{text_block.names[0]}.self_attn.{key}_proj"
        assert not np.array_equal(weighted.linears[name].integers, plain.linears[name].integers)


def factors_by_autograd(
    block: Block, name: str, others: Any, forward: Any, target: torch.Tensor
) -> torch.Tensor:
    """Relative factors of one linear: the gradient of |forward() - target|^2 at its output, ``others`` in place."""
    linear, leaves = block.linears[name], list[torch.Tensor]()

    def run(x: torch.Tensor) -> torch.Tensor:
        z = torch.nn.functional.linear(x, linear.weight, linear.bias)
        leaves.append(z.detach().requires_grad_())
        return leaves[0]

    with torch.enable_grad(), substituted(block.linears, {**others, name: run}):
        gradient = torch.autograd.grad((forward() - target).square().sum(), leaves[0])[0]
    return importance.relative(gradient.abs().mean(-1).reshape(-1))


def own_weights(block: Block, attention: Attention) -> dict[str, list[torch.Tensor]]:
    """Factors of q, k and v by autograd of the loss as it is written, one projection at a time, as weights of p = 2."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in attention.inputs}
    for sample in range(len(block.quant_inputs)):
        _, target = attention_outputs(block, attention, sample)
        for name in attention.inputs:
            hidden = block.quant_inputs[sample]
            forward = partial(
                importance.attention_output, block.stream, block.start, attention, hidden, sample
            )
            found[name].append(factors_by_autograd(block, name, {}, forward, target).pow(2))
    return found


@pytest.mark.parametrize("method", ["vlmq", "fused"])
def test_each_projection_is_solved_with_its_own_factors(
    text_block: Block, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """q, k and v: GPTAQ on H and D weighted by the factors of that projection, not of another one's."""
    monkeypatch.setattr(importance, "TOKENS_PER_CHANNEL", 0.01)
    block, attention = text_block, attention_of(text_block)
    weights, settings = own_weights(block, attention), gptq.Settings()
    if method == "vlmq":
        found = quantized(block, "vlmq", candidates=["token"], exponent=2, alpha=0.5)
    else:  # its exponent is 1; all else that it adds is off
        weights = {name: [c.sqrt() for c in found] for name, found in weights.items()}
        off = {"scales": "max", "sweeps": 0, "shrinkage": 0.0, "solver": "none"}
        settings, state = gptq.Settings(scales="max"), {"partition": np.array([[0, 1]])}
        plan = recipe("fused", weights="vlmq", start="gptaq", alpha=0.5, **off)
        found = METHODS["fused"].quantize_block(block, plan, state)
    for name in attention.inputs:
        linear = block.linears[name]
        solved = {}
        for source in attention.inputs:
            sums = StagedLayer(block).statistics(
                [name], asymmetric=True, weights={name: weights[source]}
            )[name]
            solved[source] = gptq_matrix(
                linear.weight,
                sums.hessian,
                WeightScheme(3, "group", 128),
                settings,
                cross=sums.cross,
                alpha=0.5,
            ).quantized
        assert np.array_equal(found.linears[name].integers, solved[name].integers.numpy()), name
        others = [q.integers for source, q in solved.items() if source != name]
        assert not any(torch.equal(solved[name].integers, other) for other in others)


def test_scope_layer_looks_at_the_whole_layer(text_block: Block) -> None:
    """q, k, v, and o behind quantized q, k, v: the gradient of |Layer(F) - Layer(U)|^2 by autograd on the module."""
    block, attention = text_block, attention_of(text_block)
    settings = vlmq.Settings.of(recipe("vlmq", scope="layer"))
    solver = vlmq.AttentionSolver(StagedLayer(block), attention, settings)
    behind = solver.layer.fork()
    solver._solve_stage(behind, solver.inputs, solver.factors, "uniform", range(3), {})
    integers = {
        name: FakeQuantLinear.from_quantized(q, block.linears[name].bias).forward
        for name, q in behind.results.items()
    }
    assert integers.keys() == set(attention.inputs)
    with torch.no_grad():
        target = block.run(block.float_inputs[1], 1)
    found = {**solver.factors, attention.output: solver._output_factors(behind)}
    for name, factors in found.items():
        others = integers if name == attention.output else {}
        forward = partial(block.run, block.quant_inputs[1], 1)
        expected = factors_by_autograd(block, name, others, forward, target)
        assert torch.equal(factors[1], expected), name
    narrow = vlmq.AttentionSolver(StagedLayer(block), attention, vlmq.Settings.of(recipe("vlmq")))
    assert not any(torch.equal(narrow.factors[n][1], solver.factors[n][1]) for n in solver.inputs)


def test_beats_round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method itself, weights on: the float block's output from the quantized stream, on samples it has not seen."""
    monkeypatch.setattr(importance, "TOKENS_PER_CHANNEL", 0.1)
    whole = tiny_block(tiny_stream("text", 12), "w3a16", error=0.1)
    seen = replace(whole, float_inputs=whole.float_inputs[:8], quant_inputs=whole.quant_inputs[:8])
    errors = {}
    for method, options in (("rtn", {}), ("vlmq", {"candidates": ["token"]})):
        found = quantized(seen, method, **options)
        functions = {
            name: FakeQuantLinear.from_quantized(q, whole.linears[name].bias).forward
            for name, q in found.linears.items()
        }
        with torch.no_grad():
            wanted = [whole.run(whole.float_inputs[i], i) for i in range(8, 12)]
            with substituted(whole.linears, functions):
                got = [whole.run(whole.quant_inputs[i], i) for i in range(8, 12)]
        errors[method] = sum(
            float((g - w).double().square().sum()) for g, w in zip(got, wanted, strict=True)
        )
    assert errors["vlmq"] < errors["rtn"]


def test_a_stream_that_differs_by_rounding_weighs_all_tokens_alike() -> None:
    """Deviations of a few ulps have a pattern over tokens, and it means nothing."""
    exact = tiny_block(tiny_stream("text", 3), "w3a16")
    generator = torch.Generator().manual_seed(0)

    def moved(share: float) -> Block:
        inputs = [
            h * (1 + share * torch.randn(h.shape, generator=generator)) for h in exact.float_inputs
        ]
        return replace(exact, quant_inputs=inputs)

    attention, settings = attention_of(exact), vlmq.Settings.of(recipe("vlmq"))
    for share, even in ((2.0**-23, True), (2.0**-8, False)):
        solver = vlmq.AttentionSolver(StagedLayer(moved(share)), attention, settings)
        every = {**solver.factors, attention.output: solver._output_factors(solver.layer)}
        for factors in every.values():
            assert all(torch.equal(g, torch.ones_like(g)) == even for g in factors)


@pytest.mark.parametrize("exponent", [1, 2])
def test_the_exponent_is_applied_to_the_factors(text_block: Block, exponent: int) -> None:
    settings = vlmq.Settings.of(recipe("vlmq", exponent=exponent))
    solver = vlmq.AttentionSolver(StagedLayer(text_block), attention_of(text_block), settings)
    factors = solver.factors[solver.inputs[0]]
    assert float(torch.cat(factors).std()) > 0.1
    for g, token, blend in zip(
        factors, solver._weights(factors, "token"), solver._weights(factors, "blend"), strict=True
    ):
        assert torch.equal(token, g**exponent)
        assert torch.equal(blend, 0.5 + 0.5 * g**exponent)


def test_bits_and_mix_reach_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    bits: list[int] = []
    mixes: list[float] = []
    tempered, balanced = importance.tempered, modality.balanced

    def spy_tempered(weights: Any, channels: int, of: int, samples: Any) -> Any:
        bits.append(of)
        return tempered(weights, channels, of, samples)

    def spy_balanced(image: torch.Tensor, mix: float) -> torch.Tensor:
        mixes.append(mix)
        return balanced(image, mix)

    monkeypatch.setattr(importance, "tempered", spy_tempered)
    monkeypatch.setattr(modality, "balanced", spy_balanced)
    for name, expected in (("w2a16", 2), ("w3a16", 3)):
        bits.clear()
        block = tiny_block(tiny_stream("text", 2), name, error=0.1)
        plan = recipe("vlmq", name, candidates=["modality"], mix=0.25)
        METHODS["vlmq"].quantize_block(block, plan, NOTHING)
        assert set(bits) == {expected} and set(mixes) == {0.25}


def test_weighted_statistics_win_where_the_weights_say() -> None:
    """With importance c, the c-weighted output error on held-out tokens falls against uniform sums."""
    generator = torch.Generator().manual_seed(3)
    mixes = [torch.randn(64, 64, generator=generator) for _ in range(2)]
    scales = [torch.logspace(0, -1.5, 64), torch.logspace(-1.5, 0, 64)]
    u = torch.cat(
        [
            torch.randn(2000, 64, generator=generator) * s @ m
            for s, m in zip(scales, mixes, strict=True)
        ]
    )
    weight = torch.randn(48, 64, generator=generator)
    c = torch.cat([torch.full((2000,), 1.0), torch.full((2000,), 0.1)])
    scheme = WeightScheme(3, "group", 32)
    errors = {}
    for name, weights in (("uniform", None), ("weighted", c[::2])):
        sums = Statistics(64)
        sums.add(u[::2], weights=weights)
        solved = dequantize(gptq_matrix(weight, sums.hessian, scheme).quantized)
        errors[name] = float((c[1::2, None] * (u[1::2] @ (solved - weight).T).square()).sum())
    nearest = dequantize(quantize_weight(weight, scheme))
    errors["rtn"] = float((c[1::2, None] * (u[1::2] @ (nearest - weight).T).square()).sum())
    assert errors["weighted"] < 0.95 * errors["uniform"]
    assert errors["weighted"] < 0.5 * errors["rtn"]


def test_keeps_the_best_candidate() -> None:
    """The winner has the least held-out error of all, is solved on every sample, and is reported."""
    block = tiny_block(tiny_stream("text", 12), "w3a16", error=0.1)
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(importance, "TOKENS_PER_CHANNEL", 0.1)
        rules = list(vlmq.RULES)
        found = quantized(block, "vlmq", candidates=rules)
        report = found.report["attention"]
        assert list(report["held_out_error"]) == rules
        assert len(set(report["held_out_error"].values())) == len(rules)
        assert report["rule"] == min(rules, key=lambda rule: report["held_out_error"][rule])
        alone = quantized(block, "vlmq", candidates=[report["rule"]])
    for name, q in alone.linears.items():
        assert np.array_equal(q.integers, found.linears[name].integers)
    tokens = sum(hidden[..., 0].numel() for hidden in block.quant_inputs)
    assert all(row["tokens"] == tokens for row in found.report["linears"].values())


@pytest.mark.parametrize(
    ("component", "format_name"),
    [("text", "w4a16"), ("text", "w8a8-static"), ("vision", "w8a8"), ("projector", "w8a8")],
)
def test_block_is_complete_float_and_repeatable(component: str, format_name: str) -> None:
    block = tiny_block(tiny_stream(component, 3), format_name, error=0.05)
    before = {name: linear.weight.clone() for name, linear in block.linears.items()}
    results = [quantized(block, "vlmq", format_name=format_name) for _ in range(2)]
    assert list(results[0].linears) and results[0].linears.keys() == block.linears.keys()
    assert results[0].report["linears"].keys() == block.linears.keys()
    for name, linear in block.linears.items():
        assert torch.equal(linear.weight, before[name])
        assert np.array_equal(results[0].linears[name].integers, results[1].linears[name].integers)


def test_only_some_linears_of_the_attention() -> None:
    block = tiny_block(tiny_stream("text", 2), "w4a16", error=0.05)
    for part in (("k_proj",), ("o_proj", "up_proj"), ("gate_proj", "down_proj")):
        linears = {n: m for n, m in block.linears.items() if n.endswith(part)}
        found = quantized(replace(block, linears=linears), "vlmq", format_name="w4a16")
        assert found.linears.keys() == linears.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exponent": 3}, "option exponent: 3, expected 1 or 2"),
        ({"scope": "model"}, "option scope: 'model', expected one of attention, layer"),
        ({"candidates": []}, "expected a list out of uniform, token"),
        ({"candidates": ["best"]}, "expected a list out of uniform, token"),
        ({"alpha": -1}, "option alpha"),
    ],
)
def test_bad_options_are_refused(text_block: Block, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quantized(text_block, "vlmq", **options)
