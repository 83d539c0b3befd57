"""Proves that an imported checkpoint exports like any other: its goldens replay, no TensorRT rule is broken, and of one
with float activations the graphs replay the dequantized float model.

Run: python -m pytest tests/export/test_imported.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_imported import write_imported, write_source
from tiny_source import tiny_questions

from qvlm.checkpoint import Checkpoint
from qvlm.progress import silent
from qvlm.quantize import quantize
from qvlm.recipe import RECIPES
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
