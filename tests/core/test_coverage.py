"""Proves that tokens which no calibration sample holds are found, put into samples and seen by the methods that ask for
them: what they compute on such a token is then closer to the float model.

Run: python -m pytest tests/core/test_coverage.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from qvlm.job import quantized
from tiny_blocks import tiny_context
from tiny_models import IMAGE_TOKEN
from tiny_source import tiny_questions

from qvlm.checkpoint import Checkpoint
from qvlm.coverage import LENGTH, covering, unseen_tokens, with_coverage
from qvlm.errors import RecipeError
from qvlm.methods import Context
from qvlm.plan import resolve
from qvlm.quantize import build_samples, quantize
from qvlm.recipe import Recipe, component_recipe
from qvlm.source import load, open_source


def recipe(method: str, text: str = "w3a16", **options: object) -> Recipe:
    vision = "float" if text != "float" else "w8a8"
    return component_recipe(text, vision, "float", method=method, options=options)


def tokens(context: Context) -> set[int]:
    return {int(number) for sample in context.samples for number in sample.input_ids.flatten()}


def test_unseen_tokens_are_the_rest_of_the_vocabulary() -> None:
    context = tiny_context(recipe("gptq"))
    config = context.model.config
    named = {config.image_token_index, config.text_config.bos_token_id}
    named |= {config.text_config.eos_token_id, config.text_config.pad_token_id} - {None}
    wanted = set(range(333)) - tokens(context) - named
    found = unseen_tokens(context.model, context.samples).tolist()
    assert set(found) == wanted and found == sorted(found)
    assert IMAGE_TOKEN not in found


def test_each_unseen_token_stands_once_behind_the_first_token() -> None:
    context = tiny_context(recipe("gptq"))
    made = covering(context.model, context.samples, 100.0, 0)
    first = context.samples[0].input_ids[0, 0]
    ids = [number for sample in made for number in sample.input_ids[0, 1:].tolist()]
    assert sorted(ids) == unseen_tokens(context.model, context.samples).tolist()
    assert [sample.input_ids.shape[1] for sample in made[:-1]] == [LENGTH + 1] * (len(made) - 1)
    for sample in made:
        assert sample.input_ids[0, 0] == first and sample.pixel_values is None
        assert not sample.answer_mask.any() and not sample.image_mask.any()
    again, other = (covering(context.model, context.samples, 100.0, seed) for seed in (0, 1))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(made, again, strict=True))
    assert not torch.equal(made[0].input_ids, other[0].input_ids)


def test_the_share_bounds_them_and_nothing_unseen_adds_nothing() -> None:
    context = tiny_context(recipe("gptq"))
    seen = sum(sample.input_ids.numel() for sample in context.samples)
    made = covering(context.model, context.samples, 0.5, 0)
    assert sum(sample.input_ids.numel() - 1 for sample in made) == seen // 2
    everything = [*context.samples, *covering(context.model, context.samples, 100.0, 0)]
    assert covering(context.model, everything, 100.0, 0) == []
    assert covering(context.model, context.samples, 0.0, 0) == []


def test_methods_get_them_by_option() -> None:
    plain = tiny_context(recipe("gptq"))
    assert with_coverage(plain) is plain
    for asked in (recipe("gptq", coverage=0.5), recipe("fused")):
        found = with_coverage(replace(plain, recipe=asked))
        assert found.samples[: len(plain.samples)] == plain.samples
        assert len(found.samples) > len(plain.samples)
    none = replace(plain, recipe=recipe("fused", coverage=0))
    assert with_coverage(none) is none
    vision = tiny_context(recipe("fused", "float"))
    assert with_coverage(vision) is vision
    with pytest.raises(RecipeError, match="option coverage: -1, expected 0 or more"):
        quantized(replace(plain, recipe=recipe("fused", coverage=-1)))


def test_a_token_that_calibration_never_showed_is_kept_better() -> None:
    """Error of the first layer's q on every unseen token's embedding, with and without them in the calibration."""
    errors = {}
    for share in (0.0, 100.0):
        context = tiny_context(recipe("gptq", coverage=share))
        job = quantized(context)
        model = context.model.model.language_model
        ids = unseen_tokens(context.model, context.samples)
        layer = model.layers[0]
        with torch.no_grad():
            x = layer.input_layernorm(model.embed_tokens(ids))
            wanted = layer.self_attn.q_proj(x)
            found = job.model.get_submodule("model.language_model.layers.0.self_attn.q_proj")(x)
        errors[share] = float((found - wanted).square().sum() / wanted.square().sum())
    assert errors[100.0] < 0.8 * errors[0.0]


def test_the_driver_gives_what_the_job_gives(tiny_source: Path, tmp_path: Path) -> None:
    asked = recipe("gptq", "w4a16", coverage=100.0)
    source = open_source(str(tiny_source))
    loaded = load(source)
    questions = tiny_questions()
    samples = build_samples(loaded, source.adapter, questions)
    formats = resolve(loaded.model, source.adapter, asked)
    job = quantized(Context(loaded.model, source.adapter, samples, asked, formats))
    written = Checkpoint(
        quantize(str(tiny_source), tmp_path / "out", asked, questions=questions, goldens=1)
    )
    plain = asked.with_options(coverage=0.0)
    without = Checkpoint(
        quantize(str(tiny_source), tmp_path / "no", plain, questions=questions, goldens=1)
    )
    differ = 0
    for name in formats["text"]:
        one, other = written.linear(name), without.linear(name)
        assert one is not None and other is not None
        values = one.dequantize()
        assert np.array_equal(values, job.model.get_submodule(name).weight.numpy())
        differ += not np.array_equal(values, other.dequantize())
    assert differ
