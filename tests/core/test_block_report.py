"""Proves the numbers of the report: errors are those of the block alone with image and text tokens apart, ranges name
the channel that was made an outlier, and the driver records both.

Run: python -m pytest tests/core/test_block_report.py -q
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llava
from tiny_source import tiny_processor, tiny_questions

from qvlm import fakequant
from qvlm.block_report import describe
from qvlm.capture import linear_inputs
from qvlm.checkpoint import Checkpoint
from qvlm.methods import METHODS, Context
from qvlm.models import ADAPTERS
from qvlm.plan import resolve
from qvlm.quantize import build_samples, quantize
from qvlm.recipe import RECIPES, Recipe
from qvlm.source import Loaded
from qvlm.trials.job import Job

ADAPTER = ADAPTERS["llava"]
OUTLIER = 17


def begun(recipe: Recipe) -> Job:
    model = tiny_llava().requires_grad_(False)
    model.get_parameter("model.language_model.embed_tokens.weight")[:, OUTLIER] *= 100.0
    samples = build_samples(Loaded(model, tiny_processor()), ADAPTER, tiny_questions())
    return Job.begin(Context(model, ADAPTER, samples, recipe, resolve(model, ADAPTER, recipe)))


def test_errors_are_the_blocks_own() -> None:
    """By hand: the block's simulation in place, sums over the tokens of one kind."""
    recipe = RECIPES["w4a16"]
    job = begun(recipe)
    stream = job.streams["text"]
    # A quantized stream that differs, so that errors of what came before count.
    quants = [h + 0.01 * torch.ones_like(h) for h in stream.inputs]
    block = job.block("text", 0, 1, stream.inputs, quants)
    linears = METHODS["gptq"].quantize_block(block, recipe, {}).linears
    found = describe(block, linears, recipe)
    with torch.no_grad():
        floats = [block.run(h, i) for i, h in enumerate(stream.inputs)]
        fakequant.apply(job.model, linears)
        outputs = [block.run(h, i) for i, h in enumerate(quants)]
    for kind in ("image", "text"):
        masks = [m if kind == "image" else ~m for m in block.image_masks]
        pairs = [
            (q[m].double(), f[m].double()) for q, f, m in zip(outputs, floats, masks, strict=True)
        ]
        error = sum(float((q - f).square().sum()) for q, f in pairs)
        norm = sum(float(f.square().sum()) for _, f in pairs)
        assert found["errors"]["final"][kind] == error / norm > 0
    assert found["errors"]["final"]["text"] < found["errors"]["nearest"]["text"]


def test_ranges_name_the_outlier_channel() -> None:
    """Of each input that linears share; a gain of the norm in front makes the outlier, no hidden state has it."""
    job = begun(RECIPES["w8a8"])
    gain = job.model.get_parameter("model.language_model.layers.1.input_layernorm.weight")
    gain[OUTLIER] *= 1000.0
    stream = job.streams["text"]
    block = job.block("text", 0, 2, stream.inputs, stream.inputs)
    ranges = describe(block, {}, job.context.recipe)["ranges"]
    inputs = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert [(row["layer"], row["linear"]) for row in ranges] == [
        (layer, linear) for layer in (0, 1) for linear in inputs
    ]
    key = next(name for name in block.linears if name.endswith("layers.1.self_attn.k_proj"))
    read = []
    with torch.no_grad():
        for i, hidden in enumerate(stream.inputs):
            hidden = stream.forward(0, hidden, i)
            read.append(linear_inputs(stream, 1, {key: block.linears[key]}, hidden, i)[0][key])
    for kind in ("image", "text"):
        masks = [m if kind == "image" else ~m for m in stream.image_masks]
        largest = torch.cat([x[m] for x, m in zip(read, masks, strict=True)]).abs().amax(0)
        found = ranges[4][kind]
        assert found["channels"][0] == [OUTLIER, float(largest[OUTLIER])]
        assert found["largest"] == float(largest.max()) > 100 * found["median"]
        assert found["median"] == float(largest.median())
        # The feed-forward has a norm of its own.
        assert ranges[6][kind]["largest"] < 50 * ranges[6][kind]["median"]
    vision = job.streams["vision"].inputs
    tower = describe(job.block("vision", 0, 1, vision, vision), {}, job.context.recipe)
    assert "text" not in tower["errors"]["final"]
    assert all("image" in row and "text" not in row for row in tower["ranges"])


def test_nearest_does_not_take_the_methods_options() -> None:
    """gptq's "scales" is no option of the round to nearest that stands beside it."""
    plain = RECIPES["w4a16"]
    job = begun(plain)
    stream = job.streams["text"]
    block = job.block("text", 0, 1, stream.inputs, stream.inputs)
    searched = replace(plain, method="gptq", options={"scales": "search"})
    assert describe(block, {}, searched) == describe(block, {}, plain)


def test_nearest_of_a_long_block_is_rtn_layer_by_layer() -> None:
    """Static scales of the second layer come from the first one's rounded outputs."""
    recipe = RECIPES["w8a8-static"]
    job = begun(recipe)
    stream = job.streams["text"]
    whole = job.block("text", 0, 2, stream.inputs, stream.inputs)
    found = describe(whole, {}, recipe)["errors"]["nearest"]
    with torch.no_grad():
        floats = [whole.run(h, i) for i, h in enumerate(stream.inputs)]
    job.run_component("text", METHODS["rtn"], {})
    with torch.no_grad():
        outputs = [
            job.streams["text"].run(0, 2, h, i) for i, h in enumerate(job.streams["text"].inputs)
        ]
    masks = whole.image_masks
    error = sum(
        float((q[m].double() - f[m].double()).square().sum())
        for q, f, m in zip(outputs, floats, masks, strict=True)
    )
    norm = sum(float(f[m].double().square().sum()) for f, m in zip(floats, masks, strict=True))
    assert found["image"] == error / norm > 0


def test_a_float_block_has_no_error() -> None:
    job = begun(RECIPES["w8a8"])
    inputs = job.streams["projector"].inputs
    block = job.block("projector", 0, 1, inputs, inputs)
    errors = describe(block, {}, job.context.recipe)["errors"]
    assert errors["final"] == {"image": 0.0} and errors["nearest"]["image"] > 0


def test_the_driver_records_them(tiny_source: Path, tmp_path: Path) -> None:
    output = quantize(
        str(tiny_source), tmp_path / "out", RECIPES["w8a8"], questions=tiny_questions(), goldens=1
    )
    report = Checkpoint(output).method_report
    for component, layers in (("vision", 2), ("projector", 1), ("text", 2)):
        rows = report["components"][component]
        assert len(rows) == layers
        for row in rows:
            measured = row["measured"]
            # The method is round to nearest.
            assert measured["errors"]["nearest"] == measured["errors"]["final"]
            assert {r["layer"] for r in measured["ranges"]} == set(range(*row["layers"]))
    assert set(report["versions"]) == {"qvlm", "numpy", "torch", "transformers"}
    assert report["versions"]["torch"] == pytest.importorskip("torch").__version__
