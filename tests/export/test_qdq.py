"""Proves that every kind of linear computes its definition, that the graph's integers and scales are
the checkpoint's bit for bit, and that what no engine runs is refused by name.

Run: python -m pytest tests/export/test_qdq.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qvlm.checkpoint import Checkpoint, CheckpointWriter, QuantizedLinear
from qvlm.errors import ExportError
from qvlm.progress import silent
from qvlm.recipe import FORMATS, Recipe
from qvlm_export.bounds import UNIT_ROUNDOFF
from qvlm_export.graph import GraphBuilder
from qvlm_export.linear_plan import check_deployable
from qvlm_export.qdq import GEMM_LIMIT, heads_linear, linears, weight_split
from qvlm_export.targets import named_target
from qvlm_export.weights import Weights, write_model
from qvlm_runtime.backend import EXACT, open_session

IN, ROWS = 256, 5
# (name, out features, format, bias)
LINEARS = (
    ("a.q_proj", 96, "w4a16", True),
    ("a.k_proj", 64, "w8a8", False),
    ("a.v_proj", 32, "w8a8", True),
    ("a.gate_proj", 48, "w8a8-static", True),
    ("a.up_proj", 80, "w8a8-static", False),
    ("a.o_proj", 40, "w4a16-g64", True),
    ("a.fc", 24, "float", True),
)
INPUT_SCALE = np.float32(np.float16(0.031))


def _integers(out: int, format_name: str, rng: np.random.Generator) -> QuantizedLinear:
    format_ = FORMATS[format_name]
    assert format_.weights is not None
    groups = format_.weights.groups(IN, format_name)
    limit = 1 << (format_.weights.bits - 1)
    integers = rng.integers(-limit, limit, (out, IN)).astype(np.int8)
    scale = rng.uniform(0.5, 8.0, (out, groups)) * 2.0 ** rng.integers(-9, -5, (out, 1))
    static = format_.activations is not None and format_.activations.static
    return QuantizedLinear(
        integers,
        scale.astype(np.float16).astype(np.float32),
        format_,
        input_scale=np.array([INPUT_SCALE]) if static else None,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("linears") / "checkpoint"
    rng, writer = np.random.default_rng(0), CheckpointWriter(folder)
    for name, out, format_name, bias in LINEARS:
        if format_name == "float":
            writer.add(f"{name}.weight", rng.normal(size=(out, IN)).astype(np.float32))
        else:
            writer.add_linear("text", name, _integers(out, format_name, rng))
        if bias:
            writer.add(f"{name}.bias", rng.normal(size=out).astype(np.float32))
    writer.close({"model_type": "none"}, Recipe(()), {})
    return Checkpoint(folder)


def _run(
    checkpoint: Checkpoint, folder: Path, target: str, names: list[str], x: Any, heads: int = 0
) -> dict[str, np.ndarray[Any, Any]]:
    """A graph of these linears on one input, run by ONNX Runtime."""
    target_ = named_target(target)
    b = GraphBuilder("linears", target_, Weights(checkpoint, target_.dtype))
    shape = (1, "S", heads, IN // heads) if heads else (1, "S", IN)
    value = b.input("x", b.float_type, shape)
    outputs = [heads_linear(b, value, names[0])] if heads else linears(b, value, names)
    for name, output in zip(names, outputs, strict=True):
        b.output(output, name, b.float_type, (1, "S", None))
    path = folder / "linears.onnx"
    write_model(b.model("test"), path, silent)
    return open_session(path, accuracy_level=EXACT).run({"x": x.astype(target_.dtype)})


def _expected(checkpoint: Checkpoint, name: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The definition in float64, rounding boundaries decided in float32 as the formats say."""
    found = checkpoint.linear(name)
    if found is None:
        weight = checkpoint.float_tensor(f"{name}.weight").astype(np.float64)
        d = x.astype(np.float64)
    else:
        weight = found.dequantize().astype(np.float64)
        activations = found.activations
        if activations is None:
            d = x.astype(np.float64)
        elif activations.static:
            q = np.clip(np.rint(x / INPUT_SCALE), -128, 127)
            d = q.astype(np.float64) * float(INPUT_SCALE)
        else:
            m = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-4))
            q = np.clip(np.rint(x / m / np.float32(1 / 127)), -128, 127)
            d = q.astype(np.float64) / 127 * m
    y: np.ndarray[Any, Any] = d @ weight.T
    if f"{name}.bias" in checkpoint:
        y += checkpoint.float_tensor(f"{name}.bias")
    return y


def _inputs() -> np.ndarray[Any, Any]:
    x = np.random.default_rng(1).normal(size=(1, ROWS, IN)).astype(np.float32)
    x[0, 1] *= 100  # a token of another magnitude: static saturates, token does not
    x[0, 2] = 0  # the floor of the token scale
    return x


def test_every_kind_equals_its_definition(checkpoint: Checkpoint, tmp_path: Path) -> None:
    x, names = _inputs(), [name for name, *_ in LINEARS]
    found = _run(checkpoint, tmp_path, "ort", names, x)
    for name in names:
        expected = _expected(checkpoint, name, x)
        # IN products summed in float32: IN * u relative to the sum of magnitudes, which is at most
        # sqrt(IN) times the largest result here.
        tolerance = IN * UNIT_ROUNDOFF["float32"] * np.abs(expected).max()
        np.testing.assert_allclose(found[name], expected, atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize("name", ["a.q_proj", "a.o_proj", "a.k_proj", "a.gate_proj", "a.fc"])
def test_float16_kinds(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    x = _inputs().astype(np.float16).astype(np.float32)
    found = _run(checkpoint, tmp_path, "rtx", [name], x)[name].astype(np.float64)
    expected = _expected(checkpoint, name, x)
    # Weight, result, factors and bias each round once (8 u); an INT8 value may also fall on the
    # other side of a boundary, because x / m rounds: one step of the largest input per value, with
    # independent signs.
    weight = checkpoint.linear(name)
    step = 0.0
    if weight is not None and weight.activations is not None:
        largest = np.abs(x).max() if not weight.activations.static else 127 * INPUT_SCALE
        norms = np.linalg.norm(weight.dequantize(), axis=1)
        step = 4 * float(largest) / 127 * float(norms.max())
    tolerance = 8 * UNIT_ROUNDOFF["float16"] * np.abs(expected).max() + step
    assert np.abs(found - expected).max() <= tolerance


@pytest.mark.parametrize("target", ["ort", "rtx"])
@pytest.mark.parametrize("name", ["a.o_proj", "a.k_proj", "a.fc"])
def test_projection_behind_attention_equals_the_plain_one(
    checkpoint: Checkpoint, tmp_path: Path, target: str, name: str
) -> None:
    x = _inputs()
    plain = _run(checkpoint, tmp_path, target, [name], x)[name]
    joined = _run(checkpoint, tmp_path, target, [name], x.reshape(1, ROWS, 4, IN // 4), heads=4)
    np.testing.assert_array_equal(joined[name], plain)


@pytest.mark.parametrize("recipe", ["w4a16", "w4a16-g64", "w8a8", "w8a8-static", "w8a8-split"])
@pytest.mark.parametrize("target", ["ort", "jetpack6"])
def test_dequantized_weights_are_the_checkpoints_bit_for_bit(
    built: Callable[..., Any], recipe: str, target: str
) -> None:
    folder, spec, checkpoint = built(recipe, target)
    seen: set[str] = set()
    for path in spec.graphs.values():
        for node in ir.load(folder / path).graph:
            names = node.metadata_props.get("qvlm.linears", "").split(",")
            if node.op_type != "MatMul" or names == [""]:
                continue
            seen.update(names)
            found = _dequantized(node)
            weights = [checkpoint.linear(name) for name in names]
            expected = np.concatenate([w.dequantize() for w in weights if w is not None]).T
            if node.inputs[1].producer().attributes.get("block_size") is not None:
                # INT4: DequantizeLinear's result itself, in its own float type
                np.testing.assert_array_equal(found, expected.astype(spec.dtype))
            else:
                np.testing.assert_array_equal(found, expected)
    assert seen == set(checkpoint.linears)


def _dequantized(node: ir.Node) -> np.ndarray[Any, Any]:
    """DequantizeLinear by ONNX's reference evaluator; INT8: times the channel factor behind it."""
    dequantize = node.inputs[1].producer()  # type: ignore[union-attr]
    assert dequantize is not None
    attributes = {key: attribute.value for key, attribute in dequantize.attributes.items()}
    constants = [ir.to_proto(v.const_value) for v in dequantize.inputs if v is not None]
    tensors = []
    for i, (value, proto) in enumerate(zip(dequantize.inputs, constants, strict=True)):
        array = value.const_value  # type: ignore[union-attr]
        tensors.append(
            TensorProto(
                name=f"c{i}", data_type=proto.data_type, dims=proto.dims, raw_data=array.tobytes()
            )
        )
    inputs = [t.name for t in tensors]
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", inputs, ["y"], **attributes)],
        "g",
        [],
        [helper.make_tensor_value_info("y", tensors[1].data_type, None)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    found = ReferenceEvaluator(model).run(None, {})[0]
    if "block_size" in attributes:
        return found
    factor = next(iter(node.outputs[0].uses())).node.inputs[1]
    channel = numpy_helper.to_array(
        TensorProto(
            data_type=int(factor.const_value.dtype),
            dims=list(factor.const_value.shape),
            raw_data=factor.const_value.tobytes(),
        )
    )
    # s0 is a power of two and the factor a float16 value, so float32 holds the product exactly.
    return found.astype(np.float32) * channel.astype(np.float32)


@given(
    st.lists(st.floats(2.0**-14, 100.0, width=16), min_size=1, max_size=8),
    st.integers(1, 20000),
    st.one_of(st.none(), st.floats(2.0**-14, 16.0, width=16)),
)
def test_weight_split_keeps_scales_exact_and_results_in_float16(
    scales: list[float], depth: int, input_scale: float | None
) -> None:
    s0 = weight_split(np.array(scales, np.float32), depth, input_scale)
    mantissa, _ = np.frexp(s0)
    assert mantissa == 0.5
    assert s0 >= 2.0**-14
    channel = np.array(scales) / s0
    if channel.max() <= 65504:
        in_half = channel.astype(np.float16).astype(np.float64)
        normal = channel >= np.finfo(np.float16).tiny
        np.testing.assert_array_equal(in_half[normal] * s0, np.array(scales)[normal])
    if s0 > 2.0**-14:
        largest_input = 1.0 if input_scale is None else 128 * input_scale
        assert depth * largest_input * 128 * s0 <= GEMM_LIMIT


def _with_entry(checkpoint: Checkpoint, name: str, format_name: str) -> Checkpoint:
    changed = Checkpoint(checkpoint.directory)
    changed.linears = {**changed.linears, name: {"component": "text", "format": format_name}}
    return changed


@pytest.mark.parametrize("format_name", ["w4a4", "w6a6", "w3a16", "w2a16"])
def test_simulated_formats_are_refused_by_name(checkpoint: Checkpoint, format_name: str) -> None:
    with pytest.raises(ExportError, match=rf"a\.q_proj: format '{format_name}' has no engine"):
        check_deployable(_with_entry(checkpoint, "a.q_proj", format_name))


def _builder(checkpoint: Checkpoint, **changes: Any) -> tuple[GraphBuilder, ir.Value]:
    b = GraphBuilder("g", replace(named_target("rtx"), **changes), Weights(checkpoint, "float16"))
    return b, b.input("x", b.float_type, (1, "S", IN))


def test_a_single_int4_block_is_refused_for_tensorrt(checkpoint: Checkpoint) -> None:
    b, x = _builder(checkpoint, int4_blocks=3)
    with pytest.raises(ExportError, match=r"a\.q_proj: 2 INT4 block.* at least 3 \(rule W-05\)"):
        linears(b, x, ["a.q_proj"])


def test_static_without_scale_is_refused(checkpoint: Checkpoint) -> None:
    b, x = _builder(_with_entry(checkpoint, "a.k_proj", "w8a8-static"))
    with pytest.raises(ExportError, match=r"a\.k_proj: static activations without"):
        linears(b, x, ["a.k_proj"])


def test_joined_int4_linears_give_the_numbers_of_separate_ones(tmp_path: Path) -> None:
    """Of equal blocks and one input: one product on ONNX Runtime, each its own on TensorRT; a bias
    stays its linear's."""
    kinds = {"q": ("w4a16", 96, True), "k": ("w4a16", 64, False), "v": ("w4a16", 32, True)}
    kinds["g"] = ("w4a16-g64", 48, False)
    rng, writer = np.random.default_rng(1), CheckpointWriter(tmp_path / "checkpoint")
    for name, (format_name, out, bias) in kinds.items():
        writer.add_linear("text", f"a.{name}", _integers(out, format_name, rng))
        if bias:
            writer.add(f"a.{name}.bias", rng.normal(size=out).astype(np.float32))
    writer.close({"model_type": "none"}, Recipe(()), {})
    checkpoint, names, x = Checkpoint(tmp_path / "checkpoint"), [f"a.{n}" for n in kinds], _inputs()
    for target, products in (("ort", 2), ("jetpack6", 4)):
        together = _run(checkpoint, tmp_path, target, names, x)
        nodes = ir.load(tmp_path / "linears.onnx").graph
        assert sum(node.op_type == "MatMul" for node in nodes) == products
        for name in names:
            alone = _run(checkpoint, tmp_path, target, [name], x)[name]
            np.testing.assert_array_equal(together[name], alone)
