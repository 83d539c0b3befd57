"""Proves that embeddings survive quantization: rows of a table are rounded to half a step of their own, the patch
projection beats round to nearest on real patches and equals its convolution, and a checkpoint opens as what was made.

Run: python -m pytest tests/core/test_embedding.py -q
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_llava
from tiny_source import tiny_processor, tiny_questions, write_tiny_source
from torch import nn

from qvlm import embedding
from qvlm.capture import Sample
from qvlm.checkpoint import Checkpoint
from qvlm.errors import CalibrationError, RecipeError
from qvlm.evaluate import load_quantized, sizes
from qvlm.methods.rtn import round_to_nearest
from qvlm.models import ADAPTERS
from qvlm.plan import plan, resolve
from qvlm.quantize import build_samples, quantize
from qvlm.recipe import FORMATS, LayerRule, Recipe, component_recipe
from qvlm.source import Loaded, open_source

ADAPTER = ADAPTERS["llava"]
TABLE, PATCHES = ADAPTER.embeddings
# 3 channels of 8 x 8 pixels are 192 columns: groups of 64.
RULES = (
    LayerRule(f"embedding.{TABLE}", FORMATS["w8a16"]),
    LayerRule(f"embedding.{PATCHES}", FORMATS["w4a16-g64"]),
)
RECIPE = replace(
    component_recipe("w8a8", "w8a8", "w8a8"),
    rules=(*component_recipe("w8a8", "w8a8", "w8a8").rules, *RULES),
)


def samples(model: nn.Module) -> list[Sample]:
    return build_samples(Loaded(model, tiny_processor()), ADAPTER, tiny_questions())


def test_rows_of_a_table_are_rounded_to_their_own_grid() -> None:
    model = tiny_llava().requires_grad_(False)
    weight = model.get_parameter(f"{TABLE}.weight")
    with torch.no_grad():
        weight[5] *= 100.0  # another row's outlier must not matter
    found = embedding.quantize(model, {TABLE: FORMATS["w8a16"]}, [])[TABLE]
    error = np.abs(found.dequantize() - weight.numpy())
    # Half a step; saturation adds what rounding the scale down to float16 cuts off: 127 * 2^-11 of it.
    assert (error <= found.scale * (0.5 + 127 * 2.0**-11)).all()
    assert found.scale.shape == (333, 1)


def test_the_patch_projection_beats_round_to_nearest_on_its_patches() -> None:
    model = tiny_llava().requires_grad_(False)
    module = model.get_submodule(PATCHES)
    assert isinstance(module, nn.Conv2d)
    seen = samples(model)
    format_ = FORMATS["w4a16-g64"]
    rows = torch.cat([embedding.patches(module, s) for s in seen]).double()
    weight = module.weight.flatten(1).double()

    def error(dequantized: np.ndarray) -> float:  # type: ignore[type-arg]
        return float((rows @ (torch.from_numpy(dequantized).double() - weight).T).square().sum())

    solved = error(embedding.quantize(model, {PATCHES: format_}, seen)[PATCHES].dequantize())
    rounded = error(round_to_nearest(module.weight.flatten(1), format_).dequantize())
    assert solved < 0.5 * rounded


def test_patches_are_what_the_convolution_sees() -> None:
    model = tiny_llava().requires_grad_(False)
    module = model.get_submodule(PATCHES)
    assert isinstance(module, nn.Conv2d)
    sample = samples(model)[0]
    assert sample.pixel_values is not None
    expected = module(sample.pixel_values).flatten(2).transpose(1, 2).reshape(-1, 96)
    found = embedding.patches(module, sample) @ module.weight.flatten(1).T
    # Sums of 192 float32 products in two orders.
    torch.testing.assert_close(found, expected, rtol=0, atol=192 * 2.0**-24 * 192)


def test_a_checkpoint_holds_them_and_opens_as_what_was_made(
    tiny_source: Path, tmp_path: Path
) -> None:
    questions = tiny_questions()
    directory = quantize(str(tiny_source), tmp_path / "out", RECIPE, questions=questions, goldens=1)
    checkpoint = Checkpoint(directory)
    assert checkpoint.linears[TABLE] == {"component": "embedding", "format": "w8a16"}
    model = load_quantized(directory).model
    for name in (TABLE, PATCHES):
        linear = checkpoint.linear(name)
        assert linear is not None
        weight = model.get_parameter(f"{name}.weight")
        assert np.array_equal(weight.flatten(1).numpy(), linear.dequantize())
    golden = checkpoint.goldens()[0]
    ids = torch.from_numpy(golden.inputs["input_ids"])[None]
    pixels = torch.from_numpy(golden.inputs["pixel_values"])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits[0, -1].numpy()
    # The goldens come from a cached forward, whose sums have another order; measured 1e-6 of the
    # largest. A lost embedding moves logits by 1e-2 of it.
    expected = golden.outputs["quant"]["logits"][0]
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    planned = plan(open_source(str(tiny_source)), RECIPE)
    by_component = {row.component: row.nbytes for row in planned.components}
    stored = {row.component: row.nbytes for row in sizes(checkpoint)}
    assert stored["embedding"] == by_component["embedding"]
    assert stored["total"] == sum(by_component.values()) + planned.other_bytes
    total = next(row for row in sizes(checkpoint) if row.component == "total")
    assert planned.bits_per_weight == pytest.approx(total.bits_per_weight, rel=1e-12)


def test_a_rule_for_everything_means_the_linears() -> None:
    model = tiny_llava().requires_grad_(False)
    assert not embedding.resolve(model, ADAPTER, Recipe((LayerRule("*", FORMATS["w8a8"]),)))


def test_formats_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    model = tiny_llava().requires_grad_(False)
    for name, format_name in ((TABLE, "w4a16"), (PATCHES, "w8a8"), (PATCHES, "w4a16")):
        recipe = Recipe((LayerRule(f"embedding.{name}", FORMATS[format_name]),))
        with pytest.raises(RecipeError, match=name.rsplit(".", 1)[-1]):
            embedding.resolve(model, ADAPTER, recipe)
    with pytest.raises(RecipeError, match="is for token tables"):
        resolve(model, ADAPTER, Recipe((LayerRule("text.*", FORMATS["w8a16"]),)))
    tied = open_source(
        str(
            write_tiny_source(
                tmp_path / "t", tie_word_embeddings=True, text_tie_word_embeddings=True
            )
        )
    )
    with pytest.raises(RecipeError, match="shares its weight with the head"):
        plan(tied, Recipe(RULES))
    with pytest.raises(CalibrationError, match="no sample has an image"):
        embedding.quantize(model, {PATCHES: FORMATS["w4a16-g64"]}, [])


@pytest.mark.parametrize(("known", "like"), [(ADAPTER.embeddings, "embedding."), ((), "vision.")])
def test_a_misspelt_embedding_is_shown_a_name(known: tuple[str, ...], like: str) -> None:
    recipe = Recipe((LayerRule("embedding.*tabel", FORMATS["w8a16"]),))
    with pytest.raises(RecipeError, match=f"matches 'embedding.*on names like .{like}"):
        resolve(tiny_llava(), replace(ADAPTER, embeddings=known), recipe)
