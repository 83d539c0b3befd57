"""Proves that the graphs for JetPack 6 hold nothing that TensorRT 10.3's importer does not read: no
operator, attribute, element type or constant form outside the table below, at opset 21.

The table is the part of 10.3's that these graphs need, written down apart from the rules and from
the exporter.

Run: python -m pytest tests/export/conform/test_jetpack6.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

# Operator -> attributes its importer reads.
ATTRIBUTES: dict[str, frozenset[str]] = {
    **dict.fromkeys(("Abs", "Add", "Div", "Expand", "GreaterOrEqual", "LessOrEqual"), frozenset()),
    **dict.fromkeys(("MatMul", "Max", "Mul", "Relu", "Reshape", "Shape", "Sigmoid"), frozenset()),
    **dict.fromkeys(("Slice", "Sqrt", "Sub", "Unsqueeze", "Where"), frozenset()),
    **dict.fromkeys(
        ("Concat", "Gather", "Softmax", "Split", "QuantizeLinear"), frozenset({"axis"})
    ),
    **dict.fromkeys(("ReduceMax", "ReduceMean"), frozenset({"keepdims"})),
    "Cast": frozenset({"to"}),
    "Conv": frozenset({"kernel_shape", "strides", "pads", "dilations", "group"}),
    "DequantizeLinear": frozenset({"axis", "block_size"}),
    "Gelu": frozenset({"approximate"}),
    "LayerNormalization": frozenset({"axis", "epsilon"}),
    "Transpose": frozenset({"perm"}),
}
# Inputs that 10.3 reads when it builds: they must lie in the file.
STORED_INPUTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("ReduceMax", "ReduceMean", "Unsqueeze", "Expand", "Reshape", "Split"), (1,)),
    "Conv": (1,),
    "LayerNormalization": (1, 2),
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1,),
}
FLOATS = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
STORED_TYPES = {*FLOATS, TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT8, TensorProto.INT4}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "concatenated layers, other activations": {
        "vision_feature_layer": [0, -2],
        "vision_hidden_act": "gelu_pytorch_tanh",
        "projector_hidden_act": "quick_gelu",
        "text_hidden_act": "gelu",
        "text_tie_word_embeddings": True,
        "tie_word_embeddings": True,
    },
}


def outside(model: ModelProto) -> list[str]:
    """What of a graph is not in the table, in words."""
    found = []
    if {(e.domain, e.version) for e in model.opset_import} != {("", 21)}:
        found.append(f"opsets {[(e.domain, e.version) for e in model.opset_import]}")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in stored.values():
        if tensor.data_type not in STORED_TYPES:
            found.append(f"{tensor.name}: {TensorProto.DataType.Name(tensor.data_type)}")
        if tensor.data_type == TensorProto.INT4 and len(tensor.dims) != 2:
            found.append(f"{tensor.name}: INT4 of rank {len(tensor.dims)}")
    for node in model.graph.node:
        found += [f"{node.name}: {what}" for what in _outside(node, stored)]
    return found


def _outside(node: NodeProto, stored: dict[str, TensorProto]) -> list[str]:
    if node.op_type not in ATTRIBUTES or node.domain:
        return [f"operator {node.domain}.{node.op_type}"]
    extra = {a.name for a in node.attribute} - ATTRIBUTES[node.op_type]
    found = [f"attribute {name}" for name in sorted(extra)]
    for index in STORED_INPUTS.get(node.op_type, ()):
        if index >= len(node.input) or node.input[index] not in stored:
            found.append(f"input {index} is not stored")
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        scale = stored.get(node.input[1])
        if scale is None or scale.data_type not in FLOATS:
            found.append("scale of another type than the activations")
    return found


@pytest.mark.parametrize("recipe", ["float", "w4a16", "w4a16-g64", "w8a8", "w8a8-static"])
def test_every_format_is_in_the_table(built: Callable[..., Any], recipe: str) -> None:
    folder, spec, _ = built(recipe, "jetpack6")
    for path in spec.graphs.values():
        assert outside(onnx.load(str(folder / path), load_external_data=False)) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_of_the_family_is_in_the_table(
    built: Callable[..., Any], variant: str
) -> None:
    folder, spec, _ = built("w8a8", "jetpack6", **VARIANTS[variant])
    for path in spec.graphs.values():
        assert outside(onnx.load(str(folder / path), load_external_data=False)) == []


def test_a_newer_graph_is_not(built: Callable[..., Any]) -> None:
    folder, spec, _ = built("w4a16", "ort")
    found = outside(onnx.load(str(folder / spec.graphs["decoder"]), load_external_data=False))
    for name in ("opsets", "RMSNormalization", "RotaryEmbedding", "TensorScatter"):
        assert any(name in line for line in found)


def _changed(folder: Path, change: Callable[[ModelProto], None]) -> list[str]:
    model = onnx.load(str(folder), load_external_data=False)
    change(model)
    return outside(model)


def test_an_attribute_and_a_computed_constant_are_found(built: Callable[..., Any]) -> None:
    folder, spec, _ = built("w8a8", "jetpack6")
    path = folder / spec.graphs["decoder"]

    def part_of_shape(model: ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == "Shape")
        node.attribute.append(helper.make_attribute("start", 2))

    def computed_axes(model: ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == "ReduceMax")
        node.input[1] = "input_ids"

    assert [line.split(": ")[1] for line in _changed(path, part_of_shape)] == ["attribute start"]
    assert "input 1 is not stored" in _changed(path, computed_axes)[0]
