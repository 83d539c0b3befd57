"""Proves that every target and variant exports a graph that reproduces its checkpoint, that all
TensorRT targets share one graph, and that a variant a target lacks is refused by name.

Run: python -m pytest tests/export/test_targets.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from tiny_source import tiny_questions, write_tiny_source

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError, VerificationError
from qvlm.progress import silent
from qvlm.quantize import quantize
from qvlm.recipe import RECIPES, Recipe
from qvlm_export.bounds import epsilon, relative_error
from qvlm_export.build import build, image_spec, model_spec
from qvlm_export.cli import main
from qvlm_export.conform import check
from qvlm_export.facts import graph_facts
from qvlm_export.targets import TARGETS, Variant, named_target
from qvlm_export.twin import float32_twin
from qvlm_export.verify import verify_graphs, verify_target
from qvlm_runtime.backend import EXACT, open_session

BFLOAT16 = Variant(dtype="bfloat16")
IN_PLACE = Variant(cache="scatter")


@pytest.mark.parametrize(
    ("target", "variant"),
    [("ort-cuda", Variant()), ("jetpack7.2", IN_PLACE), ("trt11", BFLOAT16)],
    ids=["cuda", "in place", "bfloat16"],
)
@pytest.mark.parametrize("recipe", ["w4a16", "w8a8"])
def test_a_variant_reproduces_its_checkpoint(
    tiny_case: Callable[..., Any], tmp_path: Path, target: str, variant: Variant, recipe: str
) -> None:
    checkpoint = Checkpoint(tiny_case(recipe).directory)
    chosen = named_target(target, variant)
    spec = build(checkpoint, chosen, tmp_path, None, silent)
    assert (spec.dtype, spec.cache) == (chosen.dtype, chosen.cache)
    assert all(row.passed for row in verify_target(tmp_path, spec, checkpoint, silent))
    assert [finding.line() for finding in check(tmp_path, chosen)] == []


def test_every_tensorrt_target_has_the_same_graph(
    tiny_case: Callable[..., Any], tmp_path: Path
) -> None:
    """So what is compiled for rtx is what the others get."""
    checkpoint = Checkpoint(tiny_case("w4a16").directory)
    for number, variant in enumerate((Variant(), BFLOAT16, IN_PLACE)):
        files: dict[str, list[bytes]] = {}
        for name, target in TARGETS.items():
            if target.is_tensorrt and (variant.cache or "append") in target.caches:
                folder = tmp_path / str(number)
                build(checkpoint, named_target(name, variant), folder, None, silent)
                files[name] = [p.read_bytes() for p in sorted((folder / name).iterdir())]
        assert len(files) == (4 if variant.cache else 6)
        assert all(one == files["rtx"] for one in files.values())


def test_a_bfloat16_graph_is_the_float16_graph_with_its_constants_rounded(
    tiny_case: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_case("w8a8").directory)
    graphs = {}
    for dtype in ("float16", "bfloat16"):
        target = named_target("trt11", Variant(dtype=dtype))  # type: ignore[arg-type]
        spec = build(checkpoint, target, tmp_path / dtype, None, silent)
        graphs[dtype] = onnx.load(str(tmp_path / dtype / spec.graphs["decoder"])).graph
    half, wide = graphs["float16"].node, graphs["bfloat16"].node
    assert [(n.op_type, n.name) for n in half] == [(n.op_type, n.name) for n in wide]
    stored = {tensor.name: tensor for tensor in graphs["float16"].initializer}
    integers = 0
    for tensor in graphs["bfloat16"].initializer:
        if tensor.data_type in (TensorProto.INT8, TensorProto.INT64):
            assert tensor == stored[tensor.name]
            integers += 1
        elif tensor.data_type == TensorProto.BFLOAT16 and tensor.name in stored:
            found = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            expected = onnx.numpy_helper.to_array(stored[tensor.name]).astype(np.float32)
            # Each was rounded from the same number: by 2^-8 and by 2^-11 of it, or of the smallest
            # normal float16.
            bound = (2.0**-8 + 2.0**-11) * np.maximum(np.abs(expected), 2.0**-14)
            assert (np.abs(found - expected) <= bound).all(), tensor.name
    assert integers >= 8


def test_the_twin_keeps_every_number(tiny_case: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_case("w4a16").directory)
    spec = build(checkpoint, named_target("jetpack6", BFLOAT16), tmp_path, None, silent)
    path = tmp_path / spec.graphs["decoder"]
    (tmp_path / "twin").mkdir()
    twin = ir.load(float32_twin(path, tmp_path / "twin")).graph
    for name, value in ir.load(path).graph.initializers.items():
        before, after = value.const_value, twin.initializers[name].const_value
        assert before is not None and after is not None
        expected = before.numpy()
        if before.dtype == ir.DataType.BFLOAT16:
            assert after.dtype == ir.DataType.FLOAT
            expected = expected.astype(np.float32)
        np.testing.assert_array_equal(after.numpy(), expected)
    onnx.checker.check_model(str(tmp_path / "twin" / path.name), full_check=True)


def test_a_wrong_bfloat16_graph_is_found(tiny_case: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_case("w4a16").directory)
    spec = build(checkpoint, named_target("jetpack6", BFLOAT16), tmp_path, None, silent)
    other = Checkpoint(tiny_case("w4a16", seed=5).directory).goldens()
    with pytest.raises(VerificationError, match="differs from the golden"):
        verify_graphs(tmp_path, spec, model_spec(checkpoint), image_spec(checkpoint), other, silent)


@pytest.mark.parametrize("recipe", ["float", "w4a16-g64", "w8a8", "w8a8-static"])
def test_weights_in_pieces_compute_the_same(
    built: Callable[..., Any], tmp_path: Path, recipe: str
) -> None:
    folder, spec, checkpoint = built(recipe, "ort")
    limit = 40_000
    target = replace(named_target("ort"), max_constant=limit)
    pieces = build(checkpoint, target, tmp_path, None, silent)
    path = tmp_path / pieces.graphs["vision"]
    model = onnx.load(str(path), load_external_data=False)
    weights = [t for t in model.graph.initializer if ".weight." in t.name]
    assert weights, "no weight was cut"
    for tensor in weights:
        size = {TensorProto.INT4: 0.5, TensorProto.INT8: 1}.get(tensor.data_type, 4)
        if len(tensor.dims) == 2:
            # Pieces are whole rows: one row more than the limit's share at most.
            assert np.prod(tensor.dims) * size <= limit + tensor.dims[1] * size
    pixels = checkpoint.goldens()[0].inputs["pixel_values"][:1]
    runs = [
        open_session(p, accuracy_level=EXACT).run({"pixel_values": pixels})["image_features"]
        for p in (folder / spec.graphs["vision"], path)
    ]
    bound = 4 * epsilon(graph_facts(path), "float32")
    assert relative_error(runs[1], runs[0]).rms <= bound
    assert all(row.passed for row in verify_target(tmp_path, pieces, checkpoint, silent))


@pytest.fixture(scope="module")
def small_embedding(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """INT4 head, INT8 token table."""
    data = RECIPES["w4a16"].to_json()
    rules = [("head.*", "w4a16-g64"), ("embedding.*embed_tokens", "w8a16")]
    data["rules"] = [{"pattern": p, "format": f} for p, f in rules] + data["rules"]
    folder = tmp_path_factory.mktemp("embedding")
    write_tiny_source(folder / "source", text_vocab_size=512)
    recipe = replace(Recipe.from_json(data), method="rtn")
    out = folder / "checkpoint"
    return Checkpoint(
        quantize(str(folder / "source"), out, recipe, questions=tiny_questions(2), goldens=1)
    )


@pytest.mark.parametrize("name", TARGETS)
def test_a_split_head_and_an_int8_table_keep_every_targets_rules(
    small_embedding: Checkpoint, tmp_path: Path, name: str
) -> None:
    """And only the last position leaves the decoder."""
    limit = 384 * 512 // 4  # half of the head's INT4 bytes
    target = named_target(name, Variant(max_constant=limit))
    spec = build(small_embedding, target, tmp_path, None, silent)
    assert [finding.line() for finding in check(tmp_path, target)] == []
    graph = onnx.load(str(tmp_path / spec.graphs["decoder"]), load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    assert {f"lm_head.weight.{first}" for first in (0, 192)} <= set(stored)
    assert stored["model.language_model.embed_tokens.weight"].data_type == TensorProto.INT8
    (logits,) = (value for value in graph.output if value.name == "logits")
    assert [d.dim_value for d in logits.type.tensor_type.shape.dim] == [1, 1, 512]


@pytest.mark.parametrize(
    ("name", "variant", "message"),
    [
        ("jetpack6", IN_PLACE, "target jetpack6: cache scatter, expected append"),
        ("ort", BFLOAT16, "target ort: dtype bfloat16, expected float32"),
        ("rtx", Variant(dtype="float32"), "dtype float32, expected float16 or bfloat16"),
    ],
)
def test_what_a_target_lacks_is_refused(name: str, variant: Variant, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        named_target(name, variant)


def test_an_int4_block_the_target_does_not_take_is_refused(
    built: Callable[..., Any], tmp_path: Path
) -> None:
    _, _, checkpoint = built("w4a16-g64", "jetpack6")
    only_128 = replace(named_target("jetpack6"), int4_sizes=(128,))
    with pytest.raises(ExportError, match=r"INT4 blocks of 64, target jetpack6 takes 128"):
        build(checkpoint, only_128, tmp_path, None, silent)


def test_the_table_names_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:-1]] == list(TARGETS)
    for line, target in zip(table[1:-1], TARGETS.values(), strict=True):
        for cell in (target.release or "-", str(target.opset), target.dtype, target.hardware):
            assert cell in line
    rows = json.loads(last)
    assert rows["jetpack6"]["sm"] == [87] and rows["jetpack7.2"]["caches"] == ["append", "scatter"]
