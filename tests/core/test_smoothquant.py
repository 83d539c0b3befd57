"""Proves SmoothQuant: its scales against loops in float64, smaller error than round to nearest where channels stand
out, round to nearest itself where every scale is one.

Run: python -m pytest tests/core/test_smoothquant.py
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_blocks import tiny_context, with_outliers
from tiny_source import tiny_questions

from qvlm.capture import capture_stream, linear_inputs
from qvlm.checkpoint import Checkpoint
from qvlm.errors import CalibrationError
from qvlm.methods import METHODS, TRANSFORMS
from qvlm.methods.smoothquant import Smoothing, smoothing_scale
from qvlm.progress import silent
from qvlm.quantize import quantize
from qvlm.recipe import LayerRule, Recipe, component_recipe, named_format
from qvlm.trials.job import Job

LAYER = "model.language_model.layers.0"
NORM = f"{LAYER}.input_layernorm"


def recipe(
    format_name: str = "w8a8-static", method: str = "smoothquant", component: str = "text"
) -> Recipe:
    return Recipe((LayerRule(f"{component}.*", named_format(format_name)),), method)


def test_scales_against_loops() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.exponential(size=7), rng.exponential(size=7)
    x[2] = w[4] = 0
    found = smoothing_scale(torch.tensor(x), torch.tensor(w), 0.7)
    for j in range(7):
        expected = 1.0 if j in (2, 4) else x[j] ** 0.7 / w[j] ** (1 - 0.7)
        # one rounding to float32
        assert abs(float(found[j]) - expected) <= 2.0**-24 * expected


def test_statistics_are_those_of_the_inputs_and_columns() -> None:
    context = tiny_context(recipe(), 3)
    state = Smoothing().find(context, silent)
    stream = capture_stream(context.model, context.adapter, "text", context.samples)
    value = context.model.get_submodule(f"{LAYER}.self_attn.v_proj")
    output = context.model.get_submodule(f"{LAYER}.self_attn.o_proj")
    assert isinstance(value, torch.nn.Linear) and isinstance(output, torch.nn.Linear)
    largest: dict[int, float] = {}
    for i, hidden in enumerate(stream.inputs):
        seen, _ = linear_inputs(stream, 0, {"o": output}, hidden, i)
        for head in range(6):
            for d in range(64):
                channel, column = (head // 3) * 64 + d, head * 64 + d
                high = float(seen["o"][..., column].abs().max())
                largest[channel] = max(largest.get(channel, 0.0), high)
    found = state[f"{LAYER}.self_attn.v_proj"]
    assert found.shape == (value.out_features,)
    for channel, x in largest.items():
        heads = range(channel // 64 * 3, channel // 64 * 3 + 3)
        w = max(float(output.weight[:, h * 64 + channel % 64].abs().max()) for h in heads)
        assert abs(float(found[channel]) - (x / w) ** 0.5) <= 2.0**-23 * (x / w) ** 0.5


@pytest.mark.parametrize("component", ["text", "vision"])
@pytest.mark.parametrize("format_name", ["w8a8-static", "w8a8"])
def test_outlier_channels_cost_less_than_with_round_to_nearest(
    format_name: str, component: str
) -> None:
    errors = {}
    for method in ("rtn", "smoothquant"):
        context = tiny_context(recipe(format_name, method, component), 3)
        job = Job.begin(with_outliers(context, component))
        job.run_component(component, METHODS[method], {})
        inputs = context.samples[0].model_inputs()
        with torch.no_grad():
            moved = job.model(**inputs).logits - context.model(**inputs).logits
        errors[method] = float(moved.square().mean())
    assert errors["smoothquant"] < 0.25 * errors["rtn"]


def test_equal_maxima_are_round_to_nearest() -> None:
    """max|x_j| = max|W_j| gives s = 1 at alpha 1/2: nothing moves, and integers and scales are rtn's."""
    context = tiny_context(recipe(), 2)
    stream = capture_stream(context.model, context.adapter, "text", context.samples)
    names = [f"{LAYER}.self_attn.{p}_proj" for p in "qkv"]
    linears = {name: context.model.get_submodule(name) for name in names}
    high = torch.zeros(384)
    for i, hidden in enumerate(stream.inputs):
        seen, _ = linear_inputs(stream, 0, linears, hidden, i)
        high = torch.maximum(high, seen[names[0]].abs().reshape(-1, 384).amax(0))
    for linear in linears.values():
        linear.weight.clamp_(-high, high)
        linear.weight[0] = high
    formats = {"text": {name: context.formats["text"][name] for name in names}}
    context = replace(context, formats=formats)
    before = copy.deepcopy(context.model.state_dict())
    state = Smoothing().find(context, silent)
    assert list(state) == [NORM] and bool((state[NORM] == 1).all())
    Smoothing().apply(context, state)
    assert all(torch.equal(t, before[n]) for n, t in context.model.state_dict().items())


def test_weight_only_linears_are_left_alone_and_others_are_named() -> None:
    context = tiny_context(replace(recipe("w4a16"), transforms=("smoothquant",)), 1)
    assert Smoothing().find(context, silent) == {}
    everything = component_recipe("w8a8", "w8a8", "w8a8", method="smoothquant")
    context = tiny_context(everything, 1)
    report = Smoothing().apply(context, Smoothing().find(context, silent))
    assert len(report["spread"]) == 2 * 3 + 2 * 4
    projector = [name for name in report["unfolded"] if "projector" in name]
    assert len(projector) == 2 and len(report["unfolded"]) == 4


def test_a_component_that_no_sample_reaches_is_named() -> None:
    context = tiny_context(component_recipe("w8a8", "w8a8", "w8a8", method="smoothquant"), 1)
    text_only = [
        replace(s, pixel_values=None, input_ids=s.input_ids[:, :3]) for s in context.samples
    ]
    for name in ("smoothquant", "awq"):
        with pytest.raises(CalibrationError, match=r"layers.0: no calibration sample reaches it"):
            TRANSFORMS[name].find(replace(context, samples=text_only), silent)


def test_a_checkpoint_holds_the_folded_model(tiny_source: Path, tmp_path: Path) -> None:
    recipes = component_recipe("w8a8", "w8a8", "w8a8", method="smoothquant")
    arguments = {"questions": tiny_questions(1), "goldens": 1}
    folder = quantize(str(tiny_source), tmp_path / "smooth", recipes, **arguments)  # type: ignore[arg-type]
    plain = quantize(
        str(tiny_source), tmp_path / "rtn", replace(recipes, method="rtn"), **arguments
    )  # type: ignore[arg-type]
    found, other = Checkpoint(folder), Checkpoint(plain)
    name = f"{NORM}.weight"
    assert not np.array_equal(found.tensor(name), other.tensor(name))
    assert found.method_report["transforms"]["smoothquant"]["spread"][NORM] > 1
    assert "transforms" not in other.method_report
    (mine,), (its,) = found.goldens(), other.goldens()
    for key in ("logits", "key"):  # what the original model said
        assert np.array_equal(mine.outputs["float"][key], its.outputs["float"][key])
    assert not np.array_equal(mine.outputs["float"]["value"], its.outputs["float"]["value"])
