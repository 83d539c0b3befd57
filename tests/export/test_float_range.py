"""Proves that an export whose activations would leave float16 is refused with the tensor's name and
the way out, and that the way out is open.

Run: python -m pytest tests/export/test_float_range.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qvlm.checkpoint import MAGNITUDES, Checkpoint
from qvlm.errors import ExportError
from qvlm.recipe import RECIPES
from qvlm_export.float_range import HEADROOM, largest_activations, overflow
from qvlm_export.pipeline import Request, export
from qvlm_export.targets import Variant, named_target
from qvlm_export.weights import FLOAT16_MAX

LAYER = "model.language_model.layers.1"


@pytest.fixture
def large(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, as if one layer's output had reached 40000."""
    shutil.copytree(tiny_checkpoint, tmp_path / "large")
    path = tmp_path / "large" / MAGNITUDES
    recorded = json.loads(path.read_text())
    recorded[LAYER]["output"] = 40000.0
    path.write_text(json.dumps(recorded))
    return tmp_path / "large"


def test_a_float16_export_is_refused_by_name(large: Path, tmp_path: Path) -> None:
    request = Request(str(large), RECIPES["w4a16"], ("jetpack6",))
    expected = rf"target jetpack6: {LAYER} output reaches 40000 .* up to 32752 .*--overflow float32.*--dtype bfloat16\."
    with pytest.raises(ExportError, match=expected):
        export(request, tmp_path / "out")
    with pytest.raises(ExportError, match="target ort, which computes in float32"):
        overflow(Checkpoint(large), named_target("ort-cuda"))


def test_the_wide_types_are_not(large: Path) -> None:
    overflow(Checkpoint(large), named_target("jetpack6", Variant(dtype="bfloat16")))
    overflow(Checkpoint(large), named_target("ort"))


def test_the_limit_is_half_of_float16(large: Path) -> None:
    path = large / MAGNITUDES
    recorded = json.loads(path.read_text())
    recorded[LAYER]["output"] = FLOAT16_MAX / HEADROOM
    path.write_text(json.dumps(recorded))
    overflow(Checkpoint(large), named_target("rtx"))
    first, second = largest_activations(Checkpoint(large), 2)
    assert (first.module, first.side, first.largest) == (LAYER, "output", first.limit)
    assert second.largest < first.largest


def test_a_checkpoint_without_them_has_no_rows(large: Path) -> None:
    (large / MAGNITUDES).unlink()
    assert largest_activations(Checkpoint(large), 3) == []
