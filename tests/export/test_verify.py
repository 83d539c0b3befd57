"""Proves that verify accepts a correct export of every format, and refuses one that is slightly
wrong, unfused, or not the checkpoint's.

Run: python -m pytest tests/export/test_verify.py
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qvlm.checkpoint import Checkpoint
from qvlm.errors import VerificationError
from qvlm.progress import silent
from qvlm_export import verify
from qvlm_export.bounds import relative_error
from qvlm_export.build import build, image_spec, model_spec
from qvlm_export.package import add_runtime_files, write_manifest
from qvlm_export.targets import named_target
from qvlm_export.verify import FUSED, verify_folder, verify_graphs, verify_target

RECIPES = ("float", "w4a16", "w4a16-g64", "w8a8", "w8a8-static", "w8a8-split")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("target", ["ort", "jetpack6"])
def test_a_correct_export_passes(built: Callable[..., Any], recipe: str, target: str) -> None:
    folder, spec, checkpoint = built(recipe, target)
    result = verify_target(folder, spec, checkpoint, silent)
    assert result.positions == sum(len(g.inputs["tokens"]) for g in checkpoint.goldens())
    assert all(row.passed for row in result)
    compared = {(row.graph, row.output, row.tokens) for row in result if row.graph != "fused"}
    assert ("vision", "image_features", "image") in compared
    for graph in ("decoder", "end to end"):
        assert {(graph, "key", "image"), (graph, "value", "text")} <= compared
        assert {(graph, "logits", "prompt"), (graph, "logits", "generated")} <= compared
    if recipe == "float" and target == "ort":
        assert result.agree == result.positions
        assert max(row.largest for row in result) < 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_quantized_linear_runs_on_integers(built: Callable[..., Any], recipe: str) -> None:
    folder, spec, checkpoint = built(recipe, "ort")
    rows = [r for r in verify_target(folder, spec, checkpoint, silent) if r.graph == "fused"]
    formats = [entry["format"] for entry in checkpoint.linears.values()]
    found = {op: sum(r.largest for r in rows if r.output == op) for op in FUSED.values()}
    # q/k/v and gate/up of one kind are one product.
    vision_layers, text_layers, projector = 2, 2, 2
    assert found["MatMulNBits"] == (text_layers * 4 if recipe.startswith("w4") else 0)
    merged = vision_layers * 4 + projector if "w8a8" in formats or "w8a8-static" in formats else 0
    merged += text_layers * 4 if recipe.startswith("w8") else 0
    assert found["MatMulIntegerToFloat"] == merged


def _copy(built: Callable[..., Any], recipe: str, tmp_path: Path) -> Any:
    folder, spec, checkpoint = built(recipe, "ort")
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", spec, checkpoint


@pytest.mark.parametrize("stem", ["vision", "decoder"])
def test_one_changed_norm_gain_is_found(
    built: Callable[..., Any], tmp_path: Path, stem: str
) -> None:
    folder, spec, checkpoint = _copy(built, "w4a16", tmp_path)
    path = folder / spec.graphs[stem]
    name = {
        "vision": "model.vision_tower.encoder.layers.1.layer_norm2.weight",
        "decoder": "model.language_model.layers.1.post_attention_layernorm.weight",
    }[stem]
    model = onnx.load(str(path), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    width = tensor.dims[0]
    if tensor.raw_data:
        changed = np.frombuffer(tensor.raw_data, np.float32) * np.float32(1.5)
        tensor.raw_data = changed.tobytes()
        path.write_bytes(model.SerializeToString())
    else:
        offset = int({e.key: e.value for e in tensor.external_data}["offset"])
        data = np.memmap(path.with_name(path.name + ".data"), np.float32, "r+", offset, (width,))
        data *= 1.5
        data.flush()
    with pytest.raises(VerificationError, match=rf"{stem if stem == 'vision' else 'decoder'} "):
        verify_target(folder, spec, checkpoint, silent)


def test_a_linear_missing_from_the_graphs_is_named(built: Callable[..., Any]) -> None:
    folder, spec, checkpoint = built("w4a16", "ort")
    changed = Checkpoint(checkpoint.directory)
    entry = {"component": "head", "format": "w4a16"}
    changed.linears = {**changed.linears, "lm_head": entry}
    with pytest.raises(VerificationError, match="lm_head: quantized in the checkpoint only"):
        verify_target(folder, spec, changed, silent)


def test_a_product_in_float_is_reported(
    built: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, spec, checkpoint = built("w4a16", "ort")
    ran = verify.executed

    def one_less(path: Path, feed: Any) -> dict[str, int]:
        return {name: count - (name == "MatMulNBits") for name, count in ran(path, feed).items()}

    monkeypatch.setattr(verify, "executed", one_less)
    with pytest.raises(
        VerificationError, match=r"ran 7 MatMulNBits in the decoder graph, expected 8"
    ):
        verify_target(folder, spec, checkpoint, silent)


def test_goldens_of_another_model_do_not_pass(
    built: Callable[..., Any], tiny_case: Callable[..., Any]
) -> None:
    folder, spec, checkpoint = built("float", "ort")
    other = Checkpoint(tiny_case("float", seed=5).directory).goldens()
    with pytest.raises(VerificationError, match="expected at most"):
        verify_graphs(folder, spec, model_spec(checkpoint), image_spec(checkpoint), other, silent)
    with pytest.raises(VerificationError, match="no goldens"):
        verify_graphs(folder, spec, model_spec(checkpoint), image_spec(checkpoint), [], silent)


def test_a_graph_that_does_not_open_is_one_error(built: Callable[..., Any], tmp_path: Path) -> None:
    folder, spec, checkpoint = _copy(built, "float", tmp_path)
    (folder / (spec.graphs["decoder"] + ".data")).write_bytes(b"")
    with pytest.raises(VerificationError, match=r"decoder\.onnx"):
        verify_target(folder, spec, checkpoint, silent)


def test_a_finished_folder_is_verified_from_its_own_goldens(
    built: Callable[..., Any], tmp_path: Path
) -> None:
    _, _, checkpoint = built("w8a8", "ort")
    specs = {
        name: build(checkpoint, named_target(name), tmp_path, 120, silent)
        for name in ("ort", "jetpack6")
    }
    add_runtime_files(checkpoint, tmp_path)
    manifest = write_manifest(tmp_path, checkpoint, specs, max_context=120)
    assert manifest.model.max_context == 120
    results = verify_folder(tmp_path, silent)
    assert sorted(result.target for result in results) == ["jetpack6", "ort"]


def test_relative_error_never_passes_nonsense() -> None:
    one = np.ones((2, 3))
    assert relative_error(one * 1.5, one).largest == 0.5
    for found in (one * np.nan, one[:1], one * np.inf):
        assert relative_error(found, one).rms == np.inf
    assert relative_error(one, one * 0).rms == np.inf
    assert replace(relative_error(one, one)).rms == 0
