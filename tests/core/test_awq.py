"""Proves AWQ and MBQ: the search's error is that of a model really folded and rounded, it picks the smallest, the
result loses less than round to nearest, without a search it is round to nearest; MBQ's gradients against differences.

Run: python -m pytest tests/core/test_awq.py
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tiny_blocks import tiny_context, with_outliers
from torch import Tensor, nn

from qvlm import affine, ranges
from qvlm.capture import capture_stream, linear_inputs
from qvlm.errors import CalibrationError, RecipeError
from qvlm.fold import fold_scale, points
from qvlm.methods import METHODS, TRANSFORMS
from qvlm.methods.awq import channel_scale, weighted_error
from qvlm.methods.mbq import gradient_ratios, output_gradients, raised_to_median
from qvlm.methods.method import Context
from qvlm.plan import resolve
from qvlm.progress import silent
from qvlm.recipe import LayerRule, Recipe, component_recipe, named_format
from qvlm.trials.job import Job

LAYER = "model.language_model.layers.0"


def recipe(
    format_name: str = "w4a16", method: str = "awq", component: str = "text", **options: Any
) -> Recipe:
    rule = LayerRule(f"{component}.*", named_format(format_name))
    return Recipe((rule,), method, options=options)


def quantized(context: Context) -> Job:
    job = Job.begin(context)
    for component in context.formats:
        job.run_component(component, METHODS[context.recipe.method], {})
    return job


def logits_error(context: Context, job: Job) -> float:
    total = 0.0
    with torch.no_grad():
        for sample in context.samples:
            inputs = sample.model_inputs()
            moved = job.model(**inputs).logits - context.model(**inputs).logits
            total += float(moved.square().mean())
    return total


def test_scales_against_loops() -> None:
    mean = np.random.default_rng(0).exponential(size=9)
    mean[4] = 0.0
    found = channel_scale(torch.tensor(mean), 0.35)
    raw = [max(m**0.35, 1e-4) for m in mean]
    middle = (max(raw) * min(raw)) ** 0.5
    for j in range(9):
        assert abs(float(found[j]) - raw[j] / middle) <= 2.0**-24 * raw[j] / middle
    assert channel_scale(torch.tensor(mean), 0.0).tolist() == [1.0] * 9


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_weighted_error_against_loops(power: float) -> None:
    rng = np.random.default_rng(1)
    a, b, c = rng.normal(size=(1, 5, 3)), rng.normal(size=(1, 5, 3)), rng.exponential(size=5)
    expected = sum(c[n] * abs(a[0, n, k] - b[0, n, k]) ** power for n in range(5) for k in range(3))
    found = weighted_error(*(torch.tensor(z) for z in (a, b, c)), power)
    assert abs(found - expected) <= 100 * 2.0**-53 * expected


@cache
def outliers(format_name: str, method: str) -> tuple[Context, Any]:
    """One decoder layer with outlier channels, and what the transform decided on it."""
    chosen = recipe(format_name, method, grid=5, clip="max")
    context = with_outliers(tiny_context(chosen, 2, text_num_hidden_layers=1))
    return context, TRANSFORMS[method].find(context, silent)


def folded_error(context: Context, source: str, exponent: float, ratio: float, p: float) -> float:
    """The objective of one point on a copy that is folded and whose targets hold rounded weights."""
    model = copy.deepcopy(context.model)
    stream = capture_stream(model, context.adapter, "text", context.samples)
    formats = context.formats["text"]
    (point,) = (x for x in points(model, context.adapter, "text", formats) if x.source == source)

    def outputs() -> list[Tensor]:
        """What the owner gives when its layer gets the float model's input."""
        found: list[Tensor] = []

        def record(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        hook = model.get_submodule(point.owner).register_forward_hook(record)
        for i, hidden in enumerate(stream.inputs):
            stream.forward(0, hidden, i)
        hook.remove()
        return found

    before = outputs()
    target = {"t": model.get_submodule(point.targets[0])}
    rows = []
    for i, hidden in enumerate(stream.inputs):
        seen, _ = linear_inputs(stream, 0, target, hidden, i)
        rows.append(seen["t"].reshape(-1, seen["t"].shape[-1]).abs().double())
    mean = point.gathered(torch.cat(rows).mean(0)).mean(1)
    fold_scale(model, point, channel_scale(mean, exponent))
    for name in point.targets:
        weight = model.get_parameter(f"{name}.weight")
        scheme = formats[name].weights
        assert scheme is not None
        weight.data = affine.fake_quantize_weight(weight.data, scheme)
    total = 0.0
    for i, (old, new) in enumerate(zip(before, outputs(), strict=True)):
        mask = stream.image_masks[i].reshape(-1)
        size = (new - old).double().abs().pow(p).sum(-1).reshape(-1)
        total += float((size * torch.where(mask, ratio, 1.0)).sum())
    return total


@pytest.mark.parametrize("method", ["awq", "mbq"])
@pytest.mark.parametrize(
    "source", ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]
)
def test_the_chosen_exponent_is_the_best_of_really_folded_models(method: str, source: str) -> None:
    context, state = outliers("w4a16", method)
    branch = "self_attn" if source in ("input_layernorm", "self_attn.v_proj") else "mlp"
    ratio = float(state[f"ratio/{LAYER}.{branch}"]) if method == "mbq" else 1.0
    p = 1.0 if method == "mbq" else 2.0
    grid = [k / 5 for k in range(5)]
    errors = [folded_error(context, f"{LAYER}.{source}", t, ratio, p) for t in grid]
    chosen = float(state[f"exponent/{LAYER}.{source}"])
    # The two compute the same sums in different orders: equal up to float32 rounding of the outputs.
    assert errors[grid.index(chosen)] <= min(errors) * (1 + 1e-5)
    assert max(errors) > 1.05 * min(errors)


@pytest.mark.parametrize("method", ["awq", "mbq"])
@pytest.mark.parametrize("format_name", ["w4a16", "w8a8-static"])
def test_less_is_lost_than_by_round_to_nearest(method: str, format_name: str) -> None:
    """On the linears that read outlier channels; the others would blur both alike."""
    context, state = outliers(format_name, method)
    behind = [
        name for name in context.formats["text"] if not name.endswith(("o_proj", "down_proj"))
    ]
    formats = {"text": {name: context.formats["text"][name] for name in behind}}
    context = replace(context, formats=formats)
    found = logits_error(context, quantized(context))
    plain = replace(context, recipe=recipe(format_name, "rtn"))
    assert found < 0.5 * logits_error(plain, quantized(plain))
    assert float(state[f"exponent/{LAYER}.input_layernorm"]) > 0


@pytest.mark.parametrize("method", ["awq", "mbq"])
def test_less_is_lost_in_the_vision_tower_too(method: str) -> None:
    """On all of its linears, the clip search on: nothing but image tokens, so nothing to balance."""
    chosen = recipe("w8a8-static", method, "vision", grid=5)
    context = with_outliers(tiny_context(chosen, 2), "vision")
    found = logits_error(context, quantized(context))
    plain = replace(context, recipe=replace(chosen, method="rtn", options={}))
    assert found < 0.25 * logits_error(plain, quantized(plain))


@pytest.mark.parametrize("format_name", ["w4a16", "w8a8", "w8a8-static"])
def test_without_a_search_it_is_round_to_nearest(format_name: str) -> None:
    options = {"grid": 1, "clip": "max"}
    context = tiny_context(recipe(format_name, **options), 1)
    plain = replace(context, recipe=recipe(format_name, "rtn"))
    found, expected = (quantized(c).model.state_dict() for c in (context, plain))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_scale_of_one_leaves_the_clip_search() -> None:
    context = tiny_context(recipe(grid=1), 1)
    names = [f"{LAYER}.self_attn.{p}_proj" for p in "vo"]
    formats = {"text": {name: context.formats["text"][name] for name in names}}
    job = Job.begin(replace(context, formats=formats))
    stream = job.streams["text"]
    block = job.block("text", 0, 1, stream.inputs, stream.inputs)
    found = METHODS["awq"].quantize_block(block, context.recipe, {}).linears
    seen, _ = linear_inputs(stream, 0, block.linears, stream.inputs[0], 0)
    for name, linear in block.linears.items():
        x = seen[name].reshape(-1, linear.in_features)
        scheme = context.formats["text"][name].weights
        assert scheme is not None
        clip = ranges.output_clip(linear.weight, scheme, x.T @ x)
        expected = affine.quantize_weight(linear.weight, scheme, clip=clip)
        assert np.array_equal(found[name].integers, expected.integers.numpy())
        assert float(clip.min()) < 1


def test_every_component_is_searched_and_what_cannot_fold_is_named() -> None:
    everything = component_recipe("w8a8", "w8a8", "w8a8", "w8a8", method="awq", options={"grid": 2})
    context = tiny_context(everything, 1)
    transform = TRANSFORMS["awq"]
    report = transform.apply(context, transform.find(context, silent))
    assert len(report["exponents"]) == 2 * 3 + 2 * 4 + 1
    assert sum("projector" in name for name in report["unfolded"]) == 2
    job = quantized(context)
    assert (
        "FakeQuant"
        in type(job.model.get_submodule("model.multi_modal_projector.linear_1")).__name__
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 0}, "option grid: 0, expected an integer of at least 1"),
        ({"search_samples": -1}, "option search_samples"),
        ({"balance": "equal"}, "option balance: 'equal', expected none or gradient"),
        ({"clip": 1}, "option clip: 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    context = tiny_context(recipe(), 1)
    with pytest.raises(RecipeError, match=message):
        resolve(context.model, context.adapter, recipe(**options))


# -- MBQ


def test_gradients_against_differences() -> None:
    context = tiny_context(recipe(method="mbq"), 1)
    model, (sample,) = context.model.double(), context.samples
    assert sample.pixel_values is not None
    sample = replace(sample, pixel_values=sample.pixel_values.double())
    stream = capture_stream(model, context.adapter, "text", [sample])
    names = dict.fromkeys([f"{LAYER}.self_attn", f"{LAYER}.mlp"])
    found = output_gradients(model, stream, names, sample)
    generator = torch.Generator().manual_seed(0)
    step = 1e-2  # of an output whose norm is near a hundred
    for name in names:
        gradient = found[name].double()
        for spread in (torch.ones(gradient.shape), torch.rand(gradient.shape, generator=generator)):
            direction = gradient * spread / (gradient * spread).norm()
            losses = []
            for sign in (1, -1):

                def shift(
                    module: nn.Module, args: Any, output: Any, move: Tensor = sign * direction
                ) -> Any:
                    out = output[0] if isinstance(output, tuple) else output
                    moved = out + step * move
                    return (moved, *output[1:]) if isinstance(output, tuple) else moved

                hook = model.get_submodule(name).register_forward_hook(shift)
                logits = model(**sample.model_inputs()).logits[0].double()
                hook.remove()
                wanted = sample.answer_mask.nonzero()[:, 0]
                picked = logits.log_softmax(-1)[wanted - 1, sample.input_ids[0, wanted]]
                losses.append(-float(picked.mean()))
            difference = (losses[0] - losses[1]) / (2 * step)
            expected = float((gradient * direction).sum())
            # Norms and softmax of the model round to float32: 2^-24 of the loss, some ten times.
            assert abs(difference - expected) <= 10 * 2.0**-24 * losses[0] / step
            assert expected > 100 * 10 * 2.0**-24 * losses[0] / step


def test_ratios_are_mean_gradients_raised_to_the_median() -> None:
    context = tiny_context(recipe(method="mbq"), 2)
    stream = capture_stream(context.model, context.adapter, "text", context.samples)
    names = [f"model.language_model.layers.{i}.{b}" for i in range(2) for b in ("self_attn", "mlp")]
    image: dict[str, list[float]] = {name: [] for name in names}
    text: dict[str, list[float]] = {name: [] for name in names}
    for sample in context.samples:
        gradients = output_gradients(context.model, stream, dict.fromkeys(names), sample)
        for name, gradient in gradients.items():
            for token, is_image in enumerate(sample.image_mask.tolist()):
                (image if is_image else text)[name].append(float(gradient[0, token].abs().mean()))
    raw = {name: np.mean(image[name]) / np.mean(text[name]) for name in names}
    found = gradient_ratios(context, silent)
    for kind in ("self_attn", "mlp"):
        ours = [name for name in names if name.endswith(kind)]
        middle = np.median([raw[name] for name in ours])
        for name in ours:
            # means of at most some hundred float32 numbers
            assert found[name] == pytest.approx(max(raw[name], middle), rel=100 * 2.0**-24)
    assert raised_to_median({"a.mlp": 1.0, "b.mlp": 3.0, "a.self_attn": 9.0}) == {
        "a.mlp": 2.0,
        "b.mlp": 3.0,
        "a.self_attn": 9.0,
    }


def test_nothing_to_balance_is_said() -> None:
    context = tiny_context(recipe(method="mbq"), 1)
    (sample,) = context.samples
    silent_sample = replace(sample, answer_mask=torch.zeros_like(sample.answer_mask))
    with pytest.raises(CalibrationError, match="no calibration sample has an image and an answer"):
        gradient_ratios(replace(context, samples=[silent_sample]), silent)
