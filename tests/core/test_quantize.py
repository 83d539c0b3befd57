"""Proves the driver: the same run gives the same bytes, an interrupted and resumed one too, nothing half-written is
left under the final name, and what cannot be applied is refused before work begins.

Run: python -m pytest tests/core/test_quantize.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from tiny_source import tiny_questions, write_tiny_source

from qvlm import methods
from qvlm.capture import Stream, linear_inputs
from qvlm.checkpoint import Checkpoint
from qvlm.errors import CalibrationError, CheckpointError, QvlmError, RecipeError
from qvlm.methods import rtn
from qvlm.methods.method import Block, BlockResult, Context, State
from qvlm.plan import plan
from qvlm.quantize import quantize
from qvlm.recipe import FORMATS, RECIPES, LayerRule, Recipe, component_recipe
from qvlm.source import open_source

QUESTIONS = tiny_questions()
STATIC = component_recipe("w8a8-static", "w8a8-static", "w8a8-static", "w8a8-static")


def run(source: Path, output: Path, recipe: Recipe, **options: Any) -> Path:
    return quantize(str(source), output, recipe, questions=QUESTIONS, goldens=1, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


class Pairs(rtn.RoundToNearest):
    """Round to nearest in blocks of two layers, with something to prepare; can stop like a pulled plug."""

    options: Mapping[str, Any] = {"depth": 2}

    def __init__(self, blocks: int = 99) -> None:
        self.blocks = blocks
        self.prepared = 0

    def check(self, recipe: Recipe) -> None:
        """Takes anything."""

    def prepare(self, context: Context) -> State:
        self.prepared += 1
        assert set(context.formats) == {"vision", "projector", "text", "head"}
        return {"ids": context.samples[0].input_ids.numpy()}

    def partition(self, stream: Stream, recipe: Recipe, state: State) -> list[tuple[int, int]]:
        count = len(stream.layers)
        return [(i, min(i + 2, count)) for i in range(0, count, 2)]

    def quantize_block(self, block: Block, recipe: Recipe, state: State) -> BlockResult:
        if self.blocks == 0:
            raise KeyboardInterrupt
        self.blocks -= 1
        assert state["ids"].dtype == np.int64
        linears = {}
        hidden = block.quant_inputs
        for index in range(block.start, block.stop):
            ranges = rtn.input_ranges(block, index, hidden)
            for name, linear in block.layer_linears(index).items():
                linears[name] = rtn.round_to_nearest(
                    linear.weight, block.formats[name], ranges[name]
                )
            hidden = [block.stream.forward(index, h, i) for i, h in enumerate(hidden)]
        return BlockResult(linears, {"error": float(block.stop)})


def test_the_same_run_gives_the_same_bytes(tiny_source: Path, tmp_path: Path) -> None:
    first, second = (run(tiny_source, tmp_path / name, STATIC) for name in "ab")
    assert contents(first) == contents(second)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    recipe = replace(STATIC, method="pairs", options={"depth": 2})
    monkeypatch.setitem(methods.METHODS, "pairs", Pairs())
    whole = contents(run(tiny_source, tmp_path / "whole", recipe))
    monkeypatch.setitem(methods.METHODS, "pairs", Pairs(blocks))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_source, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"out.partial: an interrupted run .* --resume"):
        run(tiny_source, tmp_path / "out", recipe)
    again = Pairs(99)
    monkeypatch.setitem(methods.METHODS, "pairs", again)
    assert contents(run(tiny_source, tmp_path / "out", recipe, resume=True)) == whole
    # 1 vision block (two live layers), projector, text, head; the finished ones are not made again.
    assert again.blocks == 99 - (4 - blocks) and again.prepared == 0


def test_a_damaged_block_is_named(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(methods.METHODS, "pairs", Pairs(1))
    recipe = replace(STATIC, method="pairs")
    with pytest.raises(KeyboardInterrupt):
        run(tiny_source, tmp_path / "out", recipe)
    block = tmp_path / "out.partial" / "vision.000-002.npz"
    block.write_bytes(block.read_bytes()[:500])
    with pytest.raises(
        CheckpointError, match=r"vision.000-002.npz: not readable .* Remove this file"
    ):
        run(tiny_source, tmp_path / "out", recipe, resume=True)


def test_resume_refuses_other_arguments(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(methods.METHODS, "pairs", Pairs(1))
    recipe = replace(STATIC, method="pairs")
    with pytest.raises(KeyboardInterrupt):
        run(tiny_source, tmp_path / "out", recipe)
    with pytest.raises(
        CheckpointError, match="begun with another model, recipe or calibration set"
    ):
        run(tiny_source, tmp_path / "out", replace(recipe, seed=1), resume=True)


def test_a_failing_disk_leaves_nothing_under_the_final_name(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qvlm.quantize.write_goldens", full)
    with pytest.raises(OSError, match="No space left"):
        run(tiny_source, tmp_path / "out", RECIPES["w8a8"])
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run(tiny_source, tmp_path / "out", RECIPES["w8a8"], resume=True).is_dir()


def test_a_full_disk_under_the_weights_is_one_line(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(CheckpointError, match=r"not written .*No space left.* with --resume"):
        run(tiny_source, tmp_path / "out", RECIPES["w8a8"])
    assert not (tmp_path / "out").exists()


def test_resume_leaves_what_is_not_its_own(tiny_source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    for resume in (True, False):
        with pytest.raises(CheckpointError, match=r"out.partial: holds no state.json"):
            run(tiny_source, tmp_path / "out", RECIPES["w8a8"], resume=resume)
    assert mine.read_text() == "mine"
    # What a run leaves that ended before it wrote its state is its own.
    mine.unlink()
    (tmp_path / "out.partial" / "state.json.partial").touch()
    with pytest.raises(CheckpointError, match="Continue it with --resume"):
        run(tiny_source, tmp_path / "out", RECIPES["w8a8"])
    assert run(tiny_source, tmp_path / "out", RECIPES["w8a8"], resume=True).is_dir()
    (tmp_path / "file.partial").touch()
    with pytest.raises(CheckpointError, match=r"file.partial: holds no state.json"):
        run(tiny_source, tmp_path / "file", RECIPES["w8a8"], resume=True)


def test_an_output_that_exists_is_left_alone(tiny_source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out: exists"):
        run(tiny_source, tmp_path / "out", RECIPES["w8a8"])
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_static_ranges_are_the_quantized_models_own(tiny_source: Path, tmp_path: Path) -> None:
    """The scale of each input covers exactly what the quantized model feeds it on the calibration samples."""
    from qvlm.capture import capture_stream
    from qvlm.evaluate import load_quantized
    from qvlm.models import ADAPTERS
    from qvlm.quantize import build_samples

    output = run(tiny_source, tmp_path / "out", STATIC)
    checkpoint, loaded = Checkpoint(output), load_quantized(output)
    answered = [replace(q, answer=q.answer or "x") for q in QUESTIONS if q.answer]
    samples = build_samples(loaded, ADAPTERS["llava"], answered)
    stream = capture_stream(loaded.model, ADAPTERS["llava"], "text", samples)
    name = "model.language_model.layers.1.mlp.down_proj"
    largest = 0.0
    for i, hidden in enumerate(stream.inputs):
        with torch.no_grad():
            hidden = stream.forward(0, hidden, i)
        seen, _ = linear_inputs(stream, 1, {name: loaded.model.get_submodule(name)}, hidden, i)
        largest = max(largest, float(seen[name].abs().max()))
    linear = checkpoint.linear(name)
    assert linear is not None and linear.input_scale is not None
    # Three of four questions: their maximum is at most the calibrated one. The float layer's own
    # inputs made the range, its quantized siblings make these: they differ by the INT8 weights of
    # gate and up, a few percent.
    assert largest <= float(linear.input_scale[0]) * 127 * 1.05


def test_the_report_lists_every_block(tiny_checkpoint: Path) -> None:
    report = Checkpoint(tiny_checkpoint).method_report
    assert report["name"] == "rtn"
    assert {c: len(rows) for c, rows in report["components"].items()} == {
        "vision": 2,
        "projector": 1,
        "text": 2,
    }


def test_the_weights_are_the_rounded_weights(tiny_source: Path, tiny_checkpoint: Path) -> None:
    from qvlm.source import load

    model = load(open_source(str(tiny_source))).model
    checkpoint = Checkpoint(tiny_checkpoint)
    for name, entry in checkpoint.linears.items():
        expected = rtn.round_to_nearest(
            model.get_parameter(f"{name}.weight"), FORMATS[entry["format"]]
        )
        found = checkpoint.linear(name)
        assert found is not None
        assert np.array_equal(found.integers, expected.integers)
        assert np.array_equal(found.scale, expected.scale)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in checkpoint.linears:
            assert np.array_equal(checkpoint.float_tensor(name), parameter.numpy())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float_tensors_keep_the_sources_type(tmp_path: Path, dtype: str) -> None:
    from safetensors.torch import load_file, save_file

    source = write_tiny_source(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    narrow = {n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}
    save_file(narrow, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    checkpoint = Checkpoint(run(source, tmp_path / "out", RECIPES["w4a16"]))
    name = "model.language_model.norm.weight"
    assert checkpoint.tensor(name).dtype.name == dtype
    stored = next(
        n
        for n in narrow
        if n.endswith(("language_model.norm.weight", "language_model.model.norm.weight"))
    )
    assert checkpoint.float_tensor(name).tolist() == narrow[stored].float().tolist()


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    source = write_tiny_source(tmp_path / "source", tie_word_embeddings=True)
    config = json.loads((source / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    with pytest.raises(RecipeError, match="lm_head: shares its weight with the embedding"):
        run(source, tmp_path / "out", STATIC)
    checkpoint = Checkpoint(run(source, tmp_path / "out", RECIPES["w8a8"]))
    assert "lm_head.weight" not in checkpoint
    from qvlm.evaluate import load_quantized

    model = load_quantized(tmp_path / "out").model
    assert torch.equal(
        model.get_parameter("lm_head.weight"),
        model.get_parameter("model.language_model.embed_tokens.weight"),
    )


BAD: dict[str, tuple[Recipe, str]] = {
    "group": (
        component_recipe("w4a16", "w4a16", "w8a8"),
        r"vision_tower.encoder.layers.0.self_attn.k_proj: group_size 128 does not divide in_features 96. "
        r"Use group_size 32",
    ),
    "method": (replace(RECIPES["w4a16"], method="magic"), "method 'magic' is unknown. Known: rtn"),
    "option": (RECIPES["w4a16"].with_options(depth=3), "unknown option 'depth'. Known: scales"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_recipe_that_cannot_be_applied(tiny_source: Path, tmp_path: Path, name: str) -> None:
    recipe, message = BAD[name]
    with pytest.raises(RecipeError, match=message):
        plan(open_source(str(tiny_source)), recipe)
    with pytest.raises(RecipeError, match=message):
        run(tiny_source, tmp_path / "out", recipe)
    assert not list(tmp_path.iterdir())


def test_images_are_needed_for_goldens(tiny_source: Path, tmp_path: Path) -> None:
    texts = [replace(question, images=()) for question in QUESTIONS]
    with pytest.raises(CalibrationError, match="no calibration sample has an image"):
        quantize(str(tiny_source), tmp_path / "out", RECIPES["w8a8"], questions=texts)


def test_a_partition_with_a_hole_is_refused(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hole(Pairs):
        def partition(self, stream: Stream, recipe: Recipe, state: State) -> list[tuple[int, int]]:
            return [(1, len(stream.layers))]

    monkeypatch.setitem(methods.METHODS, "pairs", Hole())
    with pytest.raises(QvlmError, match=r"blocks \[\(1, 2\)\] do not cover 2 layers"):
        run(tiny_source, tmp_path / "out", replace(STATIC, method="pairs"))


def test_part_of_a_component_can_stay_float(tiny_source: Path, tmp_path: Path) -> None:
    recipe = Recipe((LayerRule("text.*layers.1.mlp*", FORMATS["w4a16"]),))
    checkpoint = Checkpoint(run(tiny_source, tmp_path / "out", recipe))
    assert sorted(name.rpartition(".")[2] for name in checkpoint.linears) == [
        "down_proj",
        "gate_proj",
        "up_proj",
    ]
    assert len(checkpoint.float_linears) == 12 + 2 + 11 + 1


def test_the_plan_equals_what_is_written(tiny_source: Path, tiny_checkpoint: Path) -> None:
    planned = {
        c.component: c for c in plan(open_source(str(tiny_source)), RECIPES["w4a16"]).components
    }
    checkpoint = Checkpoint(tiny_checkpoint)
    for component in ("vision", "projector", "text"):
        linears = [
            checkpoint.linear(name)
            for name, entry in checkpoint.linears.items()
            if entry["component"] == component
        ]
        assert planned[component].nbytes == sum(linear.nbytes() for linear in linears if linear)
        assert planned[component].linears == len(linears)
    assert planned["head"].formats == {"float": 1} and planned["head"].bits_per_weight == 16
