"""fused: with stages switched off it is the methods it is made of; with them on it beats them; never below its start.

python -m pytest tests/core/test_fused.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_blocks import block_error, tiny_block, tiny_stream
from tiny_models import IMAGE_TOKEN, prompts, tiny_llava

from qvlm import affine
from qvlm.capture import Sample, Stream, capture_stream
from qvlm.checkpoint import QuantizedLinear
from qvlm.errors import RecipeError
from qvlm.fakequant import FakeQuantLinear, substituted
from qvlm.methods import METHODS, Context
from qvlm.methods.block_rounding import RATIOS, BlockLoss, grid_solver
from qvlm.methods.held_out import split
from qvlm.methods.method import Block, State
from qvlm.models import ADAPTERS
from qvlm.plan import resolve
from qvlm.recipe import Recipe, component_recipe
from qvlm.signed_rounding import SoftWeight
from qvlm.trials.job import Job

NOTHING: State = {}
# Every stage off: scales by the maximum, integers by ``start`` alone.
BARE: dict[str, Any] = {
    "weights": "uniform", "shrinkage": 0, "scales": "max", "sweeps": 0, "solver": "none",
}  # fmt: skip
QUICK: dict[str, Any] = {"steps": 4, "batch": 1, "every": 2, "sweeps": 1}
# A start that costs nothing, for what the solver does behind it.
NEAREST: dict[str, Any] = {"start": "nearest", "scales": "max", "sweeps": 0}


def recipe(method: str, format_name: str = "w3a16", **options: Any) -> Recipe:
    return component_recipe(format_name, format_name, format_name, method=method, options=options)


def quantized(block: Block, method: str, format_name: str = "w3a16", **options: Any) -> Any:
    return METHODS[method].quantize_block(block, recipe(method, format_name, **options), NOTHING)


def same(a: dict[str, QuantizedLinear], b: dict[str, QuantizedLinear]) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[n].integers, b[n].integers) and np.array_equal(a[n].scale, b[n].scale)
        for n in a
    )


def samples(count: int, model: Any) -> list[Sample]:
    """Prompts whose last three tokens are the answer."""
    found: list[Sample] = []
    for seed in range(1, count + 1):
        for ids, pixels in prompts(model, seed)[: count - len(found)]:
            tokens = torch.tensor([ids])
            answer = torch.arange(len(ids)) >= len(ids) - 3
            found.append(Sample(tokens, pixels, tokens[0] == IMAGE_TOKEN, answer))
    return found


def two_layers(format_name: str = "w3a16", count: int = 5) -> Block:
    """Both decoder layers as one block, with answers, behind a disturbed stream."""
    model = tiny_llava()
    stream = capture_stream(model, ADAPTERS["llava"], "text", samples(count, model))
    first, second = (tiny_block(stream, format_name, error=0.05, layer=i) for i in (0, 1))
    return replace(
        first,
        stop=2,
        linears={**first.linears, **second.linears},
        formats={**first.formats, **second.formats},
    )


@pytest.mark.parametrize(
    ("start", "method", "options"),
    [("nearest", "rtn", {}), ("gptq", "gptq", {"scales": "max"}), ("gptaq", "gptaq", {"scales": "max"})],
)  # fmt: skip
def test_bare_it_is_the_method_it_starts_with(
    start: str, method: str, options: dict[str, Any]
) -> None:
    block = tiny_block(tiny_stream("text", 3), "w3a16", error=0.1)
    bare = quantized(block, "fused", start=start, **BARE).linears
    assert same(bare, quantized(block, method, **options).linears)


def test_residual_differs_from_gptaq_and_is_gptq_without_drift() -> None:
    stream = tiny_stream("text", 3)
    drifted, still = tiny_block(stream, "w3a16", error=0.1), tiny_block(stream, "w3a16")
    residual = quantized(drifted, "fused", start="residual", **BARE).linears
    assert not same(residual, quantized(drifted, "fused", start="gptaq", **BARE).linears)
    name = f"{still.names[0]}.self_attn.q_proj"  # later stages see what the first ones did
    results = [
        quantized(still, "fused", start=start, **BARE).linears[name].integers
        for start in ("residual", "gptq")
    ]
    assert np.array_equal(*results)


@pytest.mark.parametrize(
    ("component", "format_name"),
    [("text", "w2a16"), ("text", "w8a8-static"), ("vision", "w8a8-static"), ("projector", "w8a8")],
)  # fmt: skip
def test_beats_round_to_nearest_and_leaves_the_model_alone(
    component: str, format_name: str
) -> None:
    block = tiny_block(tiny_stream(component, 3), format_name)
    before = {name: linear.weight.clone() for name, linear in block.linears.items()}
    found = quantized(block, "fused", format_name, solver_bits=8, **QUICK)
    nearest = quantized(block, "rtn", format_name)
    assert found.linears.keys() == block.linears.keys() == set(found.report["linears"])
    assert block_error(block, found.linears) < block_error(block, nearest.linears)
    for name, linear in block.linears.items():
        assert torch.equal(linear.weight, before[name]) and linear.weight.grad is None
        assert "forward" not in linear.__dict__ and not linear._forward_pre_hooks
    again = quantized(block, "fused", format_name, solver_bits=8, **QUICK)
    assert same(found.linears, again.linears)


@pytest.mark.parametrize("loss", ["output", "answers", "both"])
def test_the_solver_never_loses_to_its_start_on_held_out_samples(loss: str) -> None:
    block = two_layers()
    start = quantized(block, "fused", solver="none", **NEAREST).linears
    options = {**QUICK, **NEAREST, "rate": 0.05, "scale_rate": 0.05}
    found = quantized(block, "fused", loss=loss, **options)
    losses = [value for _, value in found.report["solver"]["held_out"]]
    # One unit per term at the start.
    assert losses[0] == pytest.approx(2.0 if loss == "both" else 1.0, rel=1e-5)
    with torch.no_grad():
        targets = [block.run(h, i) for i, h in enumerate(block.float_inputs)]
    judge = BlockLoss(block, start, targets, None, loss)
    weights = [
        {n: torch.from_numpy(q.dequantize()) for n, q in r.items()} for r in (start, found.linears)
    ]
    _, held = split(len(block.quant_inputs))
    judge.start_at(weights[0], held)
    with torch.no_grad():
        values = [sum(float(judge(w, i)) for i in held) / len(held) for w in weights]
    assert values[1] <= values[0] * (1 + 1e-6)
    # What was judged best is what came out, through the checkpoint's float16 scales and all.
    assert values[1] == pytest.approx(min(losses), rel=1e-4)


def test_answers_loss_is_the_models_own_divergence() -> None:
    """The block's loss through the layers behind it equals KL between whole models' logits."""
    model = tiny_llava()
    asked = samples(2, model)
    stream = capture_stream(model, ADAPTERS["llava"], "text", asked)
    block = tiny_block(stream, "w3a16")  # the first of two layers
    results = quantized(block, "rtn").linears
    with torch.no_grad():
        targets = [block.run(h, i) for i, h in enumerate(block.float_inputs)]
        loss = BlockLoss(block, results, targets, None, "answers")
        weights = {n: torch.from_numpy(q.dequantize()) for n, q in results.items()}
        found = [float(loss(weights, i)) for i in range(2)]
        wanted = []
        for sample in asked:
            rows = sample.answer_mask[1:]
            p = model(**sample.model_inputs()).logits[0, :-1][rows].log_softmax(-1)
            with substituted(block.linears, loss.functions(weights)):
                q = model(**sample.model_inputs()).logits[0, :-1][rows].log_softmax(-1)
            wanted.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert min(wanted) > 0
    # The same float32 operations on the same numbers; the mask's kernel may differ.
    assert found == pytest.approx(wanted, rel=1e-3)


def test_grid_solver_searches_scales_and_keeps_the_better() -> None:
    block = tiny_block(tiny_stream("text", 3), "w3a16", error=0.05)
    found = quantized(block, "fused", solver="grid", **NEAREST)
    before, after = found.report["solver"]["held_out"]
    start = quantized(block, "fused", solver="none", **NEAREST).linears
    assert same(found.linears, start) == (after >= before)
    # A grid 1.4 times as coarse as the largest weight needs: a finer one is better for every layer.
    coarse = {}
    for name, linear in block.linears.items():
        scheme = block.formats[name].weights
        assert scheme is not None
        scale, _ = affine.weight_scales(linear.weight, scheme, 1.4)
        optima = linear.weight / scale.repeat_interleave(128, 1)
        coarse[name] = SoftWeight(
            affine.quantize_weight(linear.weight, scheme, scale), optima, scheme.bits
        )
    with torch.no_grad():
        targets = [block.run(h, i) for i, h in enumerate(block.float_inputs)]
    loss = BlockLoss(block, start, targets, None, "output")
    chosen, report = grid_solver(loss, coarse)
    assert RATIOS[report["choice"][0]] < 1 and report["held_out"][1] < report["held_out"][0]
    for name, soft in coarse.items():
        assert bool((chosen[name].scale < soft.start.scale).all())


def test_one_sample_is_quantized_and_not_refined() -> None:
    block = two_layers(count=1)
    found = quantized(block, "fused", **{**QUICK, **NEAREST})
    assert found.report["solver"]["note"] == "one sample: nothing to judge"
    assert same(found.linears, quantized(block, "fused", solver="none", **NEAREST).linears)


@pytest.mark.parametrize("weights", ["curvature", "modality", "vlmq"])
def test_token_weights_change_the_integers(weights: str) -> None:
    model = tiny_llava()
    context_samples = samples(3, model)
    options = {"weights": weights, "solver": "none", "partition": "fixed", "depth": 2, "sweeps": 0}
    plan = component_recipe("w4a16", "float", "float", method="fused", options=options)
    formats = resolve(model, ADAPTERS["llava"], plan)
    context = Context(model, ADAPTERS["llava"], context_samples, plan, formats)
    state = METHODS["fused"].prepare(context)
    stream = capture_stream(model, ADAPTERS["llava"], "text", context_samples)
    assert METHODS["fused"].partition(stream, plan, state) == [(0, 2)]
    block = two_layers(count=3)
    result = METHODS["fused"].quantize_block(block, plan, state)
    assert result.report["partition"] == [[0, 2]]  # what the report draws
    weighted = result.linears
    uniform = quantized(block, "fused", solver="none", sweeps=0).linears
    # VLMQ's guard: 72 tokens for 384 channels carry no weights, so they stay equal.
    assert same(weighted, uniform) == (weights == "vlmq")


def test_whole_model_on_every_component() -> None:
    model = tiny_llava()
    plan = component_recipe("w3a16", "w8a8", "w8a8", method="fused", options=QUICK)
    formats = resolve(model, ADAPTERS["llava"], plan)
    context = Context(model, ADAPTERS["llava"], samples(4, model), plan, formats)
    method = METHODS["fused"]
    state = method.prepare(context)
    assert state["entropy"].shape == (2,) and state["dependency"].shape == (1,)
    job = Job.begin(context)
    for component in formats:
        job.run_component(component, method, state)
    left = {
        name
        for component in formats
        for name in formats[component]
        if not isinstance(job.model.get_submodule(name), FakeQuantLinear)
    }
    assert not left
    assert torch.isfinite(job.model(**context.samples[0].model_inputs()).logits).all()


def test_vision_has_no_answers_to_look_at() -> None:
    stream: Stream = tiny_stream("vision", 2)
    assert stream.logits is None and not stream.answer_masks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "awq"}, "option start: 'awq', expected one of gptq"),
        ({"loss": "mse"}, "option loss: 'mse', expected one of output"),
        ({"steps": 0}, "option steps: 0, expected at least 1"),
        ({"passes": float("nan")}, "option passes: nan, expected at least 1"),
        ({"alpha": 2}, "option alpha: 2, expected auto or a number"),
        ({"damping": 0}, "option damping: 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    block = tiny_block(tiny_stream("projector", 1), "w8a8")
    with pytest.raises(RecipeError, match=message):
        quantized(block, "fused", "w8a8", **options)


@pytest.mark.parametrize(
    ("format_name", "signed_bits", "expected"),
    [
        ("w2a16", 2, True),
        ("w2a16", 1, False),
        ("w3a16", 2, False),
        ("w3a16", 3, True),
        ("w4a16", 4, False),
    ],
)
def test_scales_have_either_sign_at_few_bits_where_no_engine_runs_the_format(
    format_name: str, signed_bits: int, expected: bool
) -> None:
    block = tiny_block(tiny_stream("text", 3), format_name, error=0.1)
    # 2 is the default.
    options: dict[str, Any] = {} if signed_bits == 2 else {"signed_bits": signed_bits}
    found = quantized(block, "fused", solver="none", **options).linears
    negative = np.mean([float((q.scale < 0).mean()) for q in found.values()])
    # Either tail of a group is the longer one as often as not.
    assert 0.3 < negative < 0.7 if expected else negative == 0
    for name, one in found.items():
        simulated = FakeQuantLinear.from_quantized(one, block.linears[name].bias)
        assert np.array_equal(simulated.weight.numpy(), one.dequantize())
