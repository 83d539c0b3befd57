"""Proves the numbers of the report: errors are those of the block alone with image and text tokens apart, ranges name
the channel that was made an outlier, and the driver records both.

Run: python -m pytest tests/core/test_block_report.py -q
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llava
from tiny_source import tiny_processor, tiny_questions

from qvlm import fakequant
from qvlm.block_report import describe
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
    job = begun(RECIPES["w8a8"])
    stream = job.streams["text"]
    block = job.block("text", 0, 2, stream.inputs, stream.inputs)
    ranges = describe(block, {}, job.context.recipe)["ranges"]
    assert [row["layer"] for row in ranges] == [0, 1]
    first = ranges[0]["text"]
    tokens = torch.cat([h[~m] for h, m in zip(stream.inputs, stream.image_masks, strict=True)])
    largest = tokens.abs().amax(0)
    assert first["channels"][0] == [OUTLIER, float(largest[OUTLIER])]
    assert (
        first["largest"]
        == float(largest.max())
        > 10 * first["median"]
        == 10 * float(largest.median())
    )
    # Image tokens do not come from the table.
    assert ranges[0]["image"]["largest"] < 0.5 * first["largest"]
    assert (
        "text"
        not in describe(
            job.block("vision", 0, 1, job.streams["vision"].inputs, job.streams["vision"].inputs),
            {},
            job.context.recipe,
        )["errors"]["final"]
    )


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
            assert [r["layer"] for r in measured["ranges"]] == list(range(*row["layers"]))
    assert set(report["versions"]) == {"qvlm", "numpy", "torch", "transformers"}
    assert report["versions"]["torch"] == pytest.importorskip("torch").__version__
