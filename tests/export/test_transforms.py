"""Proves that folded, rotated and modality-split checkpoints of the driver export like any other: the goldens replay in
float32 and float16, no TensorRT rule is broken, no node is added for a fold.

Run: python -m pytest tests/export/test_transforms.py
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm.progress import silent
from qvlm.recipe import RECIPES
from qvlm_export.build import build
from qvlm_export.conform import check
from qvlm_export.graph import GraphBuilder
from qvlm_export.qdq import linears
from qvlm_export.targets import named_target
from qvlm_export.verify import verify_target
from qvlm_export.weights import Weights


@pytest.fixture(scope="module")
def checkpoint(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Rotated, smoothed, with two static scales in the decoder."""
    from tiny_source import tiny_questions

    from qvlm.quantize import quantize

    recipe = replace(RECIPES["w8a8-split"], method="smoothquant", transforms=("rotate",))
    folder = tmp_path_factory.mktemp("transforms") / "checkpoint"
    arguments = {"questions": tiny_questions(1), "goldens": 1}
    return Checkpoint(quantize(str(tiny_source), folder, recipe, **arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["ort", "rtx"])
def test_goldens_replay(checkpoint: Checkpoint, tmp_path: Path, target: str) -> None:
    spec = build(checkpoint, named_target(target), tmp_path, None, silent)
    result = verify_target(tmp_path, spec, checkpoint, silent)
    assert all(row.passed for row in result)


def test_no_rule_of_tensorrt_is_broken(checkpoint: Checkpoint, tmp_path: Path) -> None:
    target = named_target("jetpack6")
    build(checkpoint, target, tmp_path, None, silent)
    assert [finding.line() for finding in check(tmp_path, target)] == []


def test_a_fold_adds_no_node_and_a_split_one_where_per_input(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from tiny_models import make_case

    target = named_target("jetpack6")
    counts = []
    plain = make_case(tmp_path / "static", RECIPES["w8a8-static"]).directory
    for number, found in enumerate((checkpoint, Checkpoint(plain))):
        folder = tmp_path / str(number)
        spec = build(found, target, folder, None, silent)
        counts.append(Counter(n.op_type for n in ir.load(folder / spec.graphs["decoder"]).graph))
    more = counts[0] - counts[1]
    # Two layers of four inputs: q/k/v, o, gate/up, down.
    assert more == {"Where": 8, "Div": 8, "Mul": 8} and not counts[1] - counts[0]


def test_without_a_mask_a_split_linear_is_refused(checkpoint: Checkpoint) -> None:
    b = GraphBuilder("vision", named_target("rtx"), Weights(checkpoint, "float16"))
    x = b.input("x", b.float_type, (1, "S", 384))
    name = "model.language_model.layers.0.mlp.up_proj"
    with pytest.raises(ExportError, match=r"up_proj: its format tells image tokens from text, but"):
        linears(b, x, [name])
