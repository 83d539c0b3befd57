"""Q-VLM's visual-encoder step: gradients as analysis and differences say, its objective never
rises, Eq. 8-10.

Run: python -m pytest tests/core/test_visual_encoder.py -q
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import IMAGE_TOKEN, prompts, tiny_llava
from torch import Tensor, nn

from qvlm import affine, entropy, visual_objective
from qvlm import visual_encoder as veo
from qvlm.affine import ActivationRange
from qvlm.capture import Sample, capture_stream
from qvlm.models import ADAPTERS
from qvlm.ranges import Rounding
from qvlm.recipe import ActivationScheme, Format, WeightScheme

ADAPTER = ADAPTERS["llava"]
WEIGHT_ONLY = Format("w3", WeightScheme(3, "channel", None), deployable=False)
STATIC = Format(
    "w4a8",
    WeightScheme(4, "group", 32),
    ActivationScheme(8, "tensor", symmetric=False),
    deployable=False,
)


def make_samples(model: Any, count: int, dtype: torch.dtype = torch.float32) -> list[Sample]:
    """Prompts with one or two images; the last four tokens count as the answer."""
    found: list[Sample] = []
    for seed in range(count):
        ids, pixels = prompts(model, seed)[seed % 2]
        tokens = torch.tensor([ids])
        answer = torch.arange(len(ids)) >= len(ids) - 4
        found.append(Sample(tokens, pixels.to(dtype), tokens[0] == IMAGE_TOKEN, answer))
    return found


def make_ranges(model: nn.Module, format_: Format, clip: float) -> dict[str, veo.Ranges]:
    """Every vision linear at ``clip`` times its own range."""
    ranges = {}
    for name, linear in ADAPTER.linears(model, "vision").items():
        assert format_.weights is not None
        ones = torch.ones_like(affine.weight_range(linear.weight.detach(), format_.weights)[0])
        inputs = None
        if format_.activations is not None:
            inputs = ActivationRange(torch.tensor([-1.5]), torch.tensor([2.0]))
        ranges[name] = veo.Ranges.at(linear, format_, Rounding(clip * ones, inputs))
    return ranges


def test_gradient_of_a_rounded_weight_is_the_analytical_one() -> None:
    """d w_q / d log s = w_q - w inside the range (straight through), w_q where saturated."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 6).double()
    scheme = WeightScheme(4, "group", 8)
    one = veo.Ranges.at(
        linear, Format("w4", scheme), Rounding(torch.full((6, 3), 0.7, dtype=torch.float64))
    )
    one.weight.requires_grad_(True)
    rounded = one.fake_weight()
    coefficients = torch.randn(6, 24, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((rounded * coefficients).sum(), one.weight)
    weight = linear.weight.detach()
    scale, _ = affine.weight_scales(weight, scheme, clip=one.start.clip)
    integers = torch.round(affine.grouped(weight, scheme) / scale[..., None])
    saturated = (integers < -8) | (integers > 7)
    assert bool(saturated.any()) and not bool(saturated.all())
    grouped = affine.grouped(rounded.detach(), scheme)
    slope = torch.where(saturated, grouped, grouped - affine.grouped(weight, scheme))
    expected = (slope * affine.grouped(coefficients, scheme)).sum(-1)
    # The scale was rounded to float16 (relative 2^-11) after the factor it is differentiated by.
    torch.testing.assert_close(
        gradient, expected, rtol=0, atol=float(expected.abs().max()) * 2**-10
    )


def _norm(module: Any, x: Tensor) -> Tensor:
    scaled: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * scaled


def test_step_gradients_agree_with_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every weight is saturated and scales are not rounded, the objective is smooth in the
    log factors.
    """
    monkeypatch.setattr(affine, "ste_float16", lambda x: x)
    model = tiny_llava(vision_num_hidden_layers=2, vision_feature_layer=-1).double()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = functools.partial(_norm, module)  # transformers' own falls to float32
    samples = make_samples(model, 2, torch.float64)
    wrapped = visual_objective.Model(model, ADAPTER)
    settings = visual_objective.Settings(entropy=0.3, error=0.7, eta=0.5)
    # A hundredth of the range: all weights but those near zero saturate; those are pushed out.
    ranges = make_ranges(model, WEIGHT_ONLY, 0.01)
    for r in ranges.values():
        with torch.no_grad():
            r.linear.weight.copy_(r.linear.weight.sign() * r.linear.weight.abs().clamp(min=5e-2))
    targets = visual_objective.reference_pass(wrapped, samples)
    gradients = veo.step_gradients(wrapped, samples, [0, 1], targets, ranges, settings)

    def value() -> float:
        weights = {name: r.fake_weight() for name, r in ranges.items()}
        with torch.no_grad(), veo.quantized(ranges, weights):
            return sum(
                float(visual_objective.objective(wrapped.run(s), t, targets, settings)["total"]) / 2
                for s, t in zip(samples, targets.references, strict=True)
            )

    step = 1e-4
    for (name, r), gradient in zip(ranges.items(), gradients, strict=True):
        direction = gradient.sign()
        r.weight += step * direction
        above = value()
        r.weight -= 2 * step * direction
        below = value()
        r.weight += step * direction
        slope = (above - below) / (2 * step)
        # Central differences in float64: step^2 times the third derivative, and 1e-15 / step.
        assert slope == pytest.approx(float(gradient.abs().sum()), rel=1e-5, abs=1e-9), name
    assert sum(float(g.abs().sum()) > 1e-3 for g in gradients) >= 4


@pytest.mark.parametrize("format_", [WEIGHT_ONLY, STATIC])
def test_objective_falls_and_never_rises(format_: Format) -> None:
    model = tiny_llava()
    samples = make_samples(model, 8)
    wrapped = visual_objective.Model(model, ADAPTER)
    targets = visual_objective.reference_pass(wrapped, samples)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    # A random model's labels are noise, so the error term leads.
    settings = visual_objective.Settings(epochs=4, batch=2, rate=0.02, held_out=0.25, error=30.0)
    ranges = make_ranges(model, format_, 0.6)
    found = veo.optimise(wrapped, samples, targets, ranges, settings)
    totals = [terms["total"] for terms in found.objective]
    assert found.objective[found.best]["total"] == min(totals)
    # A start at 0.6 of the range is bad enough that a few steps must gain a tenth of the error.
    start, end = found.objective[0], found.objective[found.best]
    assert end["total"] < start["total"] and end["error"] < 0.9 * start["error"]
    moved = sum(float((r.weight != 0).float().mean()) for r in ranges.values()) / len(ranges)
    assert moved > 0.9
    if format_.activations is not None:
        assert all(
            r.inputs is not None and float(r.inputs.abs().max()) > 0 for r in ranges.values()
        )
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all("forward" not in r.linear.__dict__ for r in ranges.values())


def test_a_diverging_run_keeps_the_start() -> None:
    model = tiny_llava()
    samples = make_samples(model, 4)
    wrapped = visual_objective.Model(model, ADAPTER)
    targets = visual_objective.reference_pass(wrapped, samples)
    ranges = make_ranges(model, Format("w8", WeightScheme(8, "channel", None)), 1.0)
    found = veo.optimise(
        wrapped, samples, targets, ranges, visual_objective.Settings(epochs=2, rate=3.0)
    )
    assert found.best == 0
    assert all(torch.equal(r.clip, torch.ones_like(r.clip)) for r in found.roundings.values())


def test_same_seed_same_ranges() -> None:
    model = tiny_llava()
    samples = make_samples(model, 4)
    wrapped = visual_objective.Model(model, ADAPTER)
    targets = visual_objective.reference_pass(wrapped, samples)
    settings = visual_objective.Settings(epochs=1, batch=2)
    clips = []
    for _ in range(2):
        ranges = make_ranges(model, WEIGHT_ONLY, 0.8)
        veo.optimise(wrapped, samples, targets, ranges, settings)
        clips.append([r.weight for r in ranges.values()])
    assert all(torch.equal(a, b) for a, b in zip(*clips, strict=True))


def test_importance_is_the_jacobian_norm() -> None:
    """Against a second way to the same gradient: the decoder run layer by layer from each hidden
    state.
    """
    model = tiny_llava(text_num_hidden_layers=3)
    samples = make_samples(model, 3)
    wrapped = visual_objective.Model(model, ADAPTER)
    torch.manual_seed(1)
    with torch.no_grad():
        last = [wrapped.run(s).hidden[-1] for s in samples]
    last = [x + 0.1 * torch.randn_like(x) for x in last]
    stream = capture_stream(model, ADAPTER, "text", samples)
    sums = torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        hidden = stream.inputs[i]
        for k in range(3):
            leaf = hidden.detach().requires_grad_()
            error = (stream.run(k, 3, leaf, i) - last[i]).norm()
            sums[k] += float(torch.autograd.grad(error, leaf)[0].norm())
            with torch.no_grad():
                hidden = stream.forward(k, hidden, i)
    found = visual_objective.layer_importance(wrapped, samples, last)
    assert sum(found) == pytest.approx(1.0, abs=1e-12)
    # Two float32 backward passes over the same operations, summed in another order.
    assert found == pytest.approx((sums / sums.sum()).tolist(), rel=1e-5)


def test_equal_importance_without_gradient() -> None:
    model = tiny_llava()
    samples = make_samples(model, 1)
    wrapped = visual_objective.Model(model, ADAPTER)
    with torch.no_grad():
        exact = [wrapped.run(samples[0]).hidden[-1]]
    assert visual_objective.layer_importance(wrapped, samples, exact) == pytest.approx([0.5, 0.5])


def test_entropy_term_is_the_weighted_sum_of_eq_4() -> None:
    hidden = [torch.randn(1, 9, 16).double() for _ in range(4)]
    ranges = [entropy.channel_ranges([h]) for h in hidden]
    weights = [0.5, 0.3, 0.2]
    pairs = [entropy.dependency([a], [b], 3).conditional for a, b in itertools.pairwise(hidden)]
    expected = sum(w * d for w, d in zip(weights, pairs, strict=True))
    # Same float64 sums in another order; positive, that is with the minus Eq. 8 lacks.
    assert float(visual_objective.entropy_loss(hidden, ranges, weights, 3)) == pytest.approx(
        expected, abs=1e-12
    )
    assert expected > 0


def test_objective_is_the_sum_of_its_terms() -> None:
    model = tiny_llava()
    samples = make_samples(model, 1)
    wrapped = visual_objective.Model(model, ADAPTER)
    targets = visual_objective.reference_pass(wrapped, samples)
    settings = visual_objective.Settings(entropy=0.25, error=3.0, eta=2.0)
    with torch.no_grad():
        exact = visual_objective.objective(
            wrapped.run(samples[0]), targets.references[0], targets, settings
        )
        ranges = make_ranges(model, WEIGHT_ONLY, 1.0)
        with veo.quantized(ranges, {n: r.fake_weight() for n, r in ranges.items()}):
            seen = wrapped.run(samples[0])
    # The root's 1e-20 alone, times eta.
    assert float(exact["error"]) == pytest.approx(0.0, abs=1e-9)
    terms = {
        k: float(v)
        for k, v in visual_objective.objective(
            seen, targets.references[0], targets, settings
        ).items()
    }
    reference = targets.references[0]
    assert seen.vision is not None and reference.vision is not None
    error = float((seen.vision - reference.vision).norm() / reference.vision.norm())
    error += 2.0 * float((seen.hidden[-1] - reference.last).norm() / reference.last.norm())
    # float32 norms of a few thousand elements.
    assert terms["error"] == pytest.approx(error, rel=1e-5)
    total = terms["regression"] + 0.25 * terms["entropy"] + 3.0 * terms["error"]
    assert terms["total"] == pytest.approx(total, rel=1e-6)


def test_labels() -> None:
    model = tiny_llava()
    sample = make_samples(model, 1)[0]
    logits = torch.randn(sample.input_ids.shape[1], 333)
    positions, tokens = visual_objective.labels(sample, logits)
    count = sample.input_ids.shape[1]
    assert positions.tolist() == [count - 5, count - 4, count - 3, count - 2]
    assert tokens.tolist() == sample.input_ids[0, -4:].tolist()
    without = replace(sample, answer_mask=torch.zeros(count, dtype=torch.bool))
    positions, tokens = visual_objective.labels(without, logits)
    assert (positions.tolist(), tokens.tolist()) == ([count - 1], [int(logits[-1].argmax())])


def test_text_only_batches_have_no_gradient() -> None:
    model = tiny_llava()
    wrapped = visual_objective.Model(model, ADAPTER)
    ids = torch.arange(20, 40)[None]
    answer = torch.arange(20) >= 16
    text = Sample(ids, None, torch.zeros(20, dtype=torch.bool), answer)
    targets = visual_objective.reference_pass(wrapped, [text])
    ranges = make_ranges(model, WEIGHT_ONLY, 0.8)
    gradients: list[Tensor] = veo.step_gradients(
        wrapped, [text], [0], targets, ranges, visual_objective.Settings()
    )
    assert all(not bool(g.any()) for g in gradients)
