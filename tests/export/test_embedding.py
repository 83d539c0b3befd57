"""Proves that quantized embeddings export: graphs with an INT8 token table and an INT4 patch projection replay their
goldens on every kind of target, break no rule, hold integers and not their expansion, and a damaged row is noticed.

Run: python -m pytest tests/export/test_embedding.py -q
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file
from tiny_source import tiny_questions

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError, VerificationError
from qvlm.progress import silent
from qvlm.quantize import quantize
from qvlm.recipe import FORMATS, LayerRule, Recipe
from qvlm_export.build import build
from qvlm_export.conform import check_graph
from qvlm_export.facts import graph_facts
from qvlm_export.targets import named_target
from qvlm_export.verify import verify_target

TABLE = "model.language_model.embed_tokens"
PATCHES = "model.vision_tower.embeddings.patch_embedding"
# No INT8 product, so that the bound of verify has no term for flipped roundings.
RECIPE = Recipe(
    (
        LayerRule(f"embedding.{TABLE}", FORMATS["w8a16"]),
        LayerRule(f"embedding.{PATCHES}", FORMATS["w4a16-g64"]),
        LayerRule("text.*.mlp.*", FORMATS["w4a16-g64"]),
    )
)


@pytest.fixture(scope="module")
def checkpoint(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("embedding") / "checkpoint"
    questions = tiny_questions()
    return Checkpoint(quantize(str(tiny_source), folder, RECIPE, questions=questions, goldens=2))


@pytest.mark.parametrize("name", ["ort", "jetpack6"])
def test_an_export_replays_its_goldens(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    target = named_target(name)
    spec = build(checkpoint, target, tmp_path, None, silent)
    result = verify_target(tmp_path, spec, checkpoint, silent)
    assert all(row.passed for row in result)
    facts = {stem: graph_facts(tmp_path / path) for stem, path in spec.graphs.items()}
    assert facts["decoder"].tables == (TABLE,)
    assert PATCHES in facts["vision"].linears
    graph = ir.load(tmp_path / spec.graphs["decoder"]).graph
    table = graph.initializers[f"{TABLE}.weight"]
    assert table.dtype == ir.DataType.INT8
    # What reads the integers: TensorRT wants DequantizeLinear, ONNX Runtime would run it on every row.
    readers = {use.node.op_type for use in table.uses()}
    assert readers == ({"DequantizeLinear"} if target.is_tensorrt else {"Gather"})
    if target.is_tensorrt:
        findings = [
            f for path in spec.graphs.values() for f in check_graph(tmp_path / path, target)
        ]
        assert not [f.line() for f in findings if f.level == "error"]


def test_a_damaged_row_is_noticed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """One row's scale twice as large: another embedding for the tokens that use it."""
    token = int(checkpoint.goldens()[0].inputs["input_ids"][0])
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in checkpoint.directory.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = folder / "model-00001.safetensors"
    tensors: dict[str, Any] = load_file(shard)
    scale = np.array(tensors[f"{TABLE}.weight_scale"])
    scale[token] *= 2
    save_file({**tensors, f"{TABLE}.weight_scale": scale}, shard, metadata={"format": "pt"})
    changed = Checkpoint(folder)
    spec = build(changed, named_target("ort"), tmp_path / "out", None, silent)
    with pytest.raises(VerificationError):
        verify_target(tmp_path / "out", spec, changed, silent)


def test_pixels_that_no_patch_covers_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A convolution ignores them, the reshaped form cannot."""
    changed = Checkpoint(checkpoint.directory)
    vision = {**changed.config["vision_config"], "image_size": 28}
    changed.config = {**changed.config, "vision_config": vision}
    with pytest.raises(ExportError, match="image_size 28 is no multiple of patch_size 8"):
        build(changed, named_target("ort"), tmp_path / "out", None, silent)
