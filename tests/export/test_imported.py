"""Proves that an imported checkpoint exports like any other: its goldens replay, no TensorRT rule is broken, and of one
with float activations the graphs replay the dequantized float model; for decoders of every kind of names.

Run: python -m pytest tests/export/test_imported.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_families
from safetensors.torch import load_file, save_file
from tiny_imported import KINDS, write_imported, write_source
from tiny_source import tiny_questions

from qvlm.checkpoint import Checkpoint
from qvlm.errors import QvlmError
from qvlm.progress import silent
from qvlm.quantize import quantize
from qvlm.recipe import RECIPES
from qvlm.source import load, open_source
from qvlm_export.build import build
from qvlm_export.conform import check
from qvlm_export.targets import named_target
from qvlm_export.verify import verify_target


@pytest.mark.parametrize(
    ("kind", "target"), [("gptq", "ort"), ("awq", "jetpack6"), ("w8a8", "ort")]
)
def test_goldens_replay(tmp_path: Path, kind: str, target: str) -> None:
    folder = tmp_path / "in"
    write_imported(write_source(tmp_path / "float"), folder, kind)
    arguments = {"questions": tiny_questions(1), "goldens": 1}
    made = quantize(str(folder), tmp_path / "checkpoint", RECIPES["float"], **arguments)  # type: ignore[arg-type]
    checkpoint = Checkpoint(made)
    outputs = checkpoint.goldens()[0].outputs
    assert np.array_equal(outputs["float"]["logits"], outputs["quant"]["logits"]) == (
        kind != "w8a8"
    )
    where = named_target(target)
    spec = build(checkpoint, where, tmp_path / "out", None, silent)
    assert all(row.passed for row in verify_target(tmp_path / "out", spec, checkpoint, silent))
    assert [finding.line() for finding in check(tmp_path / "out", where)] == []


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("qwen2_5_vl", "gptq"),
        ("qwen2_5_vl", "awq"),
        ("qwen3_vl", "w8a8"),
        ("smolvlm", "awq"),
        ("idefics3", "w4a16"),
        ("internvl", "gptq_v2"),
        ("internvl", "w8a8"),
    ],
)
def test_every_familys_integers_reach_the_graph(family: str, kind: str, tmp_path: Path) -> None:
    source = tiny_families.write_source(family, tmp_path / "float")
    packed = write_imported(source, tmp_path / "in", kind)
    grids = {_layer(name): grid for name, grid in packed.items()}
    layers = 3 if family.startswith("qwen") else 2
    assert len(grids) == 7 * layers
    questions = tiny_families.questions(family)[:1]
    out = tmp_path / "checkpoint"
    quantize(str(tmp_path / "in"), out, RECIPES["float"], questions=questions, goldens=1)
    checkpoint = Checkpoint(out)
    assert {_layer(name) for name in checkpoint.linears} == set(grids)
    for name in checkpoint.linears:
        linear, (integers, scale) = checkpoint.linear(name), grids[_layer(name)]
        assert linear is not None and linear.format.name == KINDS[kind][2]
        assert np.array_equal(linear.integers, integers)
        assert np.array_equal(linear.scale, scale.astype(np.float32))
    spec = build(checkpoint, named_target("ort"), tmp_path / "out", None, silent)
    assert all(row.passed for row in verify_target(tmp_path / "out", spec, checkpoint, silent))


def _layer(name: str) -> str:
    """A module's name from its layer on."""
    return name[name.index("layers.") :]


def test_reordered_inputs_of_another_family_are_one_line(tmp_path: Path) -> None:
    source = tiny_families.write_source("qwen2_5_vl", tmp_path / "float")
    write_imported(source, tmp_path / "in", "gptq")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    name = min(n for n in tensors if n.endswith(".g_idx"))
    save_file(
        {**tensors, name: tensors[name].flip(0)},
        tmp_path / "in" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(QvlmError, match="inputs are reordered") as caught:
        load(open_source(str(tmp_path / "in")))
    assert name.removesuffix(".g_idx") in str(caught.value) and "\n" not in str(caught.value)
