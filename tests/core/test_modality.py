"""Proves the format w8a8-split: its arithmetic against loops, two ranges where static has one, the right kind of token
in streams and whole models, less lost than with one range where the kinds differ, every method; refused elsewhere.

Run: python -m pytest tests/core/test_modality.py
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_blocks import tiny_block, tiny_context, tiny_stream
from tiny_source import tiny_questions

from qvlm import affine, modality
from qvlm.capture import Sample, capture_inputs, linear_inputs
from qvlm.checkpoint import Checkpoint
from qvlm.errors import RecipeError
from qvlm.evaluate import load_quantized
from qvlm.generate import golden_side
from qvlm.methods import METHODS
from qvlm.models import ADAPTERS
from qvlm.plan import plan, resolve
from qvlm.quantize import quantize
from qvlm.recipe import (
    FORMATS,
    RECIPES,
    ActivationScheme,
    LayerRule,
    Recipe,
    component_recipe,
    named_format,
)
from qvlm.source import open_source
from qvlm.trials.job import Job

SCHEME = ActivationScheme(8, "modality")
LAYER = "model.language_model.layers.0"


def recipe(format_name: str, method: str = "rtn") -> Recipe:
    return Recipe((LayerRule("text.*", named_format(format_name)),), method)


def test_the_arithmetic_against_loops() -> None:
    rng = np.random.default_rng(0)
    x = (3 * rng.normal(size=(1, 6, 5))).astype(np.float32)
    image = np.array([[False, True, True, False, True, False]])
    scales = np.array([0.01, 0.05], np.float16).astype(np.float32)
    found = affine.fake_quantize_activation(
        torch.tensor(x), SCHEME, torch.tensor(scales), image=torch.tensor(image)
    ).numpy()
    step = np.float32(1) / np.float32(127)
    for n in range(6):
        m = np.float32(127) * scales[int(image[0, n])]
        for c in range(5):
            q = min(max(round(float(x[0, n, c] / m / step)), -128), 127)
            # two float32 products
            assert abs(found[0, n, c] - q * float(step) * float(m)) <= 2.0**-22 * abs(q) * step * m
    assert np.abs(found[0, 0]).max() <= 1.29 < np.abs(found[0, 1:3]).max()


def test_one_scale_for_both_is_the_static_format() -> None:
    """At a power of two every product is exact, so the two forms agree bit for bit."""
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    image = torch.arange(9)[None] % 2 == 0
    scale = torch.tensor([2.0**-5])
    split = affine.fake_quantize_activation(x, SCHEME, scale.repeat(2), image=image)
    integers = torch.round(x / scale).clamp(-128, 127)
    # x / m / (1/127) rounds where x / scale does not: away from a boundary the integers are the same.
    safe = ((x / scale) % 1 - 0.5).abs() > 1e-4
    assert torch.equal(torch.round(split / scale)[safe], integers[safe])
    assert bool(safe.float().mean() > 0.99)


def test_ranges_are_those_of_each_kind() -> None:
    x = torch.tensor([[[1.0, -2.0], [5.0, 30.0], [0.5, 3.0]]])
    image = torch.tensor([[False, True, False]])
    found = affine.activation_range(x, SCHEME, image)
    assert found.low.tolist() == [-2, 5] and found.high.tolist() == [3, 30]
    text = affine.activation_range(x, SCHEME, torch.zeros(1, 3, dtype=torch.bool))
    assert text.low.tolist() == [-2, torch.inf] and text.high.tolist() == [30, -torch.inf]
    both = text.union(found)
    assert both.low.tolist() == [-2, 5] and both.high.tolist() == [30, 30]
    scale, zero = affine.activation_parameters(found.low, found.high, SCHEME)
    assert zero is None and scale.tolist() == [np.float16(3 / 127), np.float16(30 / 127)]
    alone, _ = affine.activation_parameters(text.low, text.high, SCHEME)
    assert alone.tolist() == [np.float16(30 / 127)] * 2  # a kind never seen takes the other's
    for call in (
        lambda: affine.activation_range(x, SCHEME),
        lambda: affine.fake_quantize_activation(x, SCHEME, scale),
    ):
        with pytest.raises(ValueError, match="image tokens"):
            call()
    with pytest.raises(RecipeError, match="'modality' is symmetric only"):
        ActivationScheme(8, "modality", symmetric=False)


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq", "vlmq"])
def test_scales_cover_each_kind_on_the_quantized_stream(method: str) -> None:
    block = tiny_block(tiny_stream("text", 2), "w8a8-split", error=0.05)
    found = METHODS[method].quantize_block(block, recipe("w8a8-split", method), {}).linears
    name = f"{LAYER}.self_attn.q_proj"
    largest = [0.0, 0.0]
    for i, hidden in enumerate(block.quant_inputs):
        seen, _ = linear_inputs(block.stream, 0, {name: block.linears[name]}, hidden, i)
        for token, image in enumerate(block.image_masks[i][0].tolist()):
            high = float(seen[name][0, token].abs().max())
            largest[int(image)] = max(largest[int(image)], high)
    expected = [float(np.float16(np.float32(high) / np.float32(127))) for high in largest]
    assert found[name].input_scale is not None and found[name].input_scale.tolist() == expected


def test_a_stream_and_a_model_tell_the_same_tokens_apart() -> None:
    context = tiny_context(recipe("w8a8-split"), 2)
    job = Job.begin(context)
    job.run_component("text", METHODS["rtn"], {})
    stream = job.streams["text"]
    behind = job.model.get_submodule("model.language_model.norm")
    through_model = capture_inputs(job.model, behind, context.samples)
    with torch.no_grad():
        for i, hidden in enumerate(stream.inputs):
            assert torch.equal(stream.run(0, 2, hidden, i), through_model[i])
            flipped = copy.copy(stream)
            flipped.image_masks = [~mask for mask in stream.image_masks]
            assert not torch.equal(flipped.run(0, 2, hidden, i), through_model[i])
    with pytest.raises(
        RuntimeError, match=r"image tokens known for None, asked for .*\(1, 4, 384\)"
    ):
        job.model.get_submodule(f"{LAYER}.self_attn.q_proj")(torch.ones(1, 4, 384))


def test_following_twice_is_following_once() -> None:
    model = torch.nn.Linear(2, 2)
    for _ in range(2):
        modality.follow(model, 7)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1


def test_the_smaller_kind_loses_less_than_with_one_range() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40, 64, generator=generator)
    image = torch.arange(40)[None] >= 20
    x[image] *= 20
    errors = {}
    for scheme in (SCHEME, ActivationScheme(8, "tensor")):
        found = affine.activation_range(x, scheme, image)
        scale, zero = affine.activation_parameters(found.low, found.high, scheme)
        rounded = affine.fake_quantize_activation(x, scheme, scale, zero, image)
        errors[scheme.granularity] = float((rounded - x)[~image].square().mean())
    # Rounding errors are uniform over a step, so they go with its square: 20^2, less where extremes differ.
    assert errors["modality"] < errors["tensor"] / 200


def test_checkpoint_simulation_and_goldens_agree(tiny_source: Path, tmp_path: Path) -> None:
    chosen = replace(RECIPES["w8a8-split"], method="awq").with_options(grid=2, clip="max")
    folder = quantize(
        str(tiny_source), tmp_path / "out", chosen, questions=tiny_questions(1), goldens=1
    )
    checkpoint = Checkpoint(folder)
    scale = checkpoint.tensor(f"{LAYER}.mlp.down_proj.input_scale")
    assert scale.shape == (2,) and scale[0] != scale[1]
    vision = checkpoint.tensor("model.vision_tower.encoder.layers.0.mlp.fc1.input_scale")
    assert vision.shape == (1,)
    (golden,) = checkpoint.goldens()
    model = load_quantized(folder).model
    ids = torch.tensor(golden.inputs["input_ids"])[None]
    image = torch.tensor(golden.inputs["image_index"] >= 0)
    sample = Sample(
        ids, torch.tensor(golden.inputs["pixel_values"]), image, torch.zeros_like(image)
    )
    forced = torch.tensor(golden.inputs["tokens"])[None]
    _, again = golden_side(model, ADAPTERS["llava"], sample, forced.shape[1], forced)
    for key, expected in golden.outputs["quant"].items():
        assert np.array_equal(again[key], expected), key


def test_it_is_for_the_decoder(tiny_source: Path) -> None:
    for component in ("vision", "projector", "head"):
        wrong = component_recipe(*("float",) * 3, head="float")
        rules = (LayerRule(f"{component}.*", FORMATS["w8a8-split"]), *wrong.rules)
        with pytest.raises(RecipeError, match=rf"in component '{component}' all tokens are of one"):
            plan(open_source(str(tiny_source)), Recipe(rules))
    context = tiny_context(recipe("w8a8-split"), 1)
    with pytest.raises(RecipeError, match="q-vlm searches one range per input"):
        METHODS["q-vlm"].prepare(replace(context, recipe=recipe("w8a8-split", "q-vlm")))
    assert resolve(context.model, context.adapter, RECIPES["w8a8-split"])["text"]


def test_modality_weights_balance() -> None:
    image = torch.tensor([True] * 6 + [False] * 2)
    found = modality.balanced(image)
    assert found[image].sum() == found[~image].sum() == 4
    assert torch.equal(modality.balanced(torch.ones(4, dtype=torch.bool)), torch.ones(4))
    # The share that the tokens have by their number is no weight at all.
    assert torch.equal(modality.balanced(image, float(image.float().mean())), torch.ones(8))
    assert modality.balanced(image, 0.125)[image].sum() == 1
