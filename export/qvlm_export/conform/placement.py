"""Rules on where QuantizeLinear and DequantizeLinear stand: what becomes an integer product, and what only rounds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from qvlm_export.conform.products import (
    CONVOLUTIONS,
    GEMMS,
    PRODUCTS,
    Operand,
    Product,
    granularity,
    is_dq,
    numbers,
    operand,
    products,
    quantizers,
    reduced_axis,
)
from qvlm_export.conform.quant import FLOAT16_NORMAL
from qvlm_export.conform.rule import TENSORRT, Breach, Consumer, Rule, breach
from qvlm_export.conform.types import FLOAT8
from qvlm_export.conform.view import GraphView, dtype_name

_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Clip", "Relu", "Max", "Min", "Where")
# Operators that Q and DQ move across.
_COMMUTE = (
    *("Transpose", "Reshape", "Concat", "Gather", "MaxPool", "Slice", "Split"),
    *("Unsqueeze", "Squeeze", "Expand", "Flatten", "Identity", "Pad"),
)
_NOT_QUANTIZABLE = ("LayerNormalization", "RMSNormalization", "Softmax", "Add", "ReduceMean")
# Between the scores' product and Softmax.
_SCORE_OPS = ("Add", "Mul", "Div", "Where", "Cast")
# First GPU generation with 8-bit floats.
_FLOAT8_SM = 89
_FUSED_INT8_ROWS = 512
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def _cast_between(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for product in products(view):
        for side in (product.data, product.other):
            cast = next((node for node in side.path if node.op_type == "Cast"), None)
            half = side.dq is not None and view.dtype(side.dq.input[1]) == TensorProto.FLOAT16
            if cast is not None and half:
                found = f"Cast between DequantizeLinear and {product.node.op_type}"
                yield breach(product.node, cast.output[0], found, "the scale's type throughout")


def _arithmetic_between(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for product in products(view):
        for side in (product.data, product.other):
            node = view.producer(side.source)
            if side.dq is not None or node is None or node.op_type not in _ELEMENTWISE:
                continue
            if any(is_dq(view.producer(name)) for name in node.input):
                found = f"{node.op_type} between DequantizeLinear and {product.node.op_type}"
                yield breach(product.node, side.source, found, "at most Transpose or Reshape")


def _activation_dqs(view: GraphView) -> Iterator[NodeProto]:
    """DequantizeLinear directly behind QuantizeLinear of something computed."""
    for node in quantizers(view, "DequantizeLinear"):
        source = view.producer(node.input[0])
        if source is None or source.op_type != "QuantizeLinear":
            continue
        if not view.is_constant(source.input[0]):
            yield node


def _readers(view: GraphView, name: str) -> Iterator[NodeProto]:
    """What reads a tensor once Q and DQ have moved across what they commute with."""
    for node in view.consumers(name):
        if node.op_type in (*_COMMUTE, "Cast"):
            for output in node.output:
                yield from _readers(view, output)
        else:
            yield node


def _shared_with_float(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in _activation_dqs(view):
        readers = [reader.op_type for reader in _readers(view, node.output[0])]
        floats = sorted({op for op in readers if op in _NOT_QUANTIZABLE})
        if floats and any(op in PRODUCTS for op in readers):
            found = f"rounded values also read by {', '.join(floats)}"
            yield breach(node, node.output[0], found, "products only")


def _stray(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in _activation_dqs(view):
        readers = [reader.op_type for reader in _readers(view, node.output[0])]
        if not any(op in (*PRODUCTS, "Attention", "Einsum", "QuantizeLinear") for op in readers):
            found = f"values read by {', '.join(sorted(set(readers))) or 'nothing'}"
            yield breach(node, node.output[0], found, "a product")


def _one_scale(view: GraphView, _: Consumer) -> Iterator[Breach]:
    first: dict[str, NodeProto] = {}
    for node in quantizers(view, "QuantizeLinear"):
        known = first.setdefault(node.input[0], node)
        if known.input[1] == node.input[1]:
            continue
        left, right = view.values(known.input[1]), view.values(node.input[1])
        if left is None or right is None or not np.array_equal(left, right):
            found = f"scales {known.input[1]} and {node.input[1]} for {node.input[0]}"
            yield breach(node, node.input[1], found, "one scale for one tensor")


def _is_int8(view: GraphView, side: Operand) -> bool:
    return side.type(view) == TensorProto.INT8


def _half_quantized(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for product in products(view):
        if product.weight is None:
            continue
        data, weight = _is_int8(view, product.data), _is_int8(view, product.weight)
        if product.weight.dq is None and data:
            found = "INT8 activation and float weight"
            yield breach(product.node, product.weight.name, found, "both INT8 or both float")
        elif weight and not data:
            found = "INT8 weight and float activation"
            yield breach(product.node, product.data.name, found, "both INT8 or both float")


def _scores(view: GraphView, softmax: NodeProto) -> NodeProto | None:
    """The product behind a Softmax, through mask and scale."""
    node = view.producer(softmax.input[0])
    while node is not None and node.op_type in _SCORE_OPS:
        found = [view.producer(name) for name in node.input if not view.is_constant(name)]
        behind = [n for n in found if n is not None and n.op_type in (*_SCORE_OPS, "MatMul")]
        node = next((n for n in behind if n.op_type == "MatMul"), behind[0] if behind else None)
    return node if node is not None and node.op_type == "MatMul" else None


def attention_products(view: GraphView) -> Iterator[tuple[NodeProto, NodeProto, NodeProto]]:
    """(scores, softmax, context) of attention written in primitives."""
    for softmax in view.ops("Softmax"):
        scores = _scores(view, softmax)
        readers = _readers_through_quantization(view, softmax.output[0])
        context = next((node for node in readers if node.op_type == "MatMul"), None)
        if scores is not None and context is not None:
            yield scores, softmax, context


def _readers_through_quantization(view: GraphView, name: str) -> Iterator[NodeProto]:
    for node in view.consumers(name):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast", "Dropout"):
            yield from _readers_through_quantization(view, node.output[0])
        else:
            yield node


def _quantized_inputs(view: GraphView, node: NodeProto) -> int:
    return sum(operand(view, name).dq is not None for name in node.input[:2])


def _long_int8_attention(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for scores, _softmax, _context in attention_products(view):
        shape = view.shape(scores.output[0])
        columns = shape[-1] if shape else None
        if not _quantized_inputs(view, scores) or not isinstance(columns, int):
            continue
        if columns > _FUSED_INT8_ROWS:
            found = f"quantized attention over {columns} columns"
            yield breach(scores, scores.output[0], found, f"at most {_FUSED_INT8_ROWS}")


def _half_quantized_attention(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for scores, _softmax, context in attention_products(view):
        counts = _quantized_inputs(view, scores), _quantized_inputs(view, context)
        if counts not in ((0, 0), (2, 2)):
            found = (
                f"{counts[0]} of 2 inputs of the scores, {counts[1]} of 2 of the context quantized"
            )
            yield breach(scores, scores.output[0], found, "all four inputs, or none")


def _quantized_softmax(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for softmax in view.ops("Softmax"):
        node = view.producer(softmax.input[0])
        names = [softmax.input[0]]
        if node is not None and node.op_type in _SCORE_OPS:
            names += [name for name in node.input if not view.is_constant(name)]
        for name in names:
            if is_dq(view.producer(name)):
                yield breach(softmax, name, "quantized scores or mask", "float scores and mask")


def _float8(view: GraphView, consumer: Consumer) -> Iterator[Breach]:
    old = [sm for sm in consumer.sm if sm < _FLOAT8_SM]
    numbers_ = FLOAT8 | {TensorProto.FLOAT4E2M1}
    if not old:
        return
    for node in quantizers(view):
        name = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
        if view.dtype(name) in numbers_:
            found = f"{dtype_name(view.dtype(name))} on sm{old[0]}"
            yield breach(node, name, found, "INT8 or INT4 below sm89")


def _channel_products(view: GraphView) -> Iterator[tuple[Product, NodeProto, NodeProto]]:
    """INT8 products with FLOAT16 scales, one per output channel: the product, activation DQ, weight DQ."""
    for product in products(view):
        data, weight = product.data.dq, product.weight.dq if product.weight else None
        if data is None or weight is None or product.node.op_type in CONVOLUTIONS:
            continue
        half = view.dtype(weight.input[1]) == TensorProto.FLOAT16
        if half and granularity(view, weight) == "channel":
            yield product, data, weight


def _tiny_scale_products(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for product, data, weight in _channel_products(view):
        scales = view.values(data.input[1]), view.values(weight.input[1])
        if scales[0] is None or scales[1] is None:
            continue
        smallest = float(scales[0].min() * scales[1].min())
        if 0 < smallest < FLOAT16_NORMAL:
            found = f"input scale times weight scale down to {smallest:.3g}"
            yield breach(product.node, weight.input[1], found, f"at least {FLOAT16_NORMAL:.2g}")


def _half_accumulator(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for product, _data, weight in _channel_products(view):
        axis, shape = reduced_axis(view, product), numbers(view, weight.input[0])
        if axis is None or shape is None:
            continue
        largest = 127 * 127 * shape[axis]
        if largest > _FLOAT16_MAX:
            found = f"sums up to {largest} with a separate per-channel factor"
            yield breach(product.node, weight.input[1], found, f"at most {_FLOAT16_MAX:g}")


def _two_quantizers(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view, "QuantizeLinear"):
        if is_dq(view.producer(node.input[0])):
            yield breach(node, node.input[0], "values quantized twice", "one QuantizeLinear")


def _quantized_output(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in _activation_dqs(view):
        if node.output[0] in view.outputs:
            yield breach(node, node.output[0], "a rounded output of the graph", "a float output")


def _separate_int8(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in _activation_dqs(view):
        readers = [r for r in view.consumers(node.output[0]) if r.op_type in GEMMS]
        if view.dtype(node.input[0]) == TensorProto.INT8 and len(readers) > 1:
            found = f"{len(readers)} products share one signed activation"
            yield breach(node, node.output[0], found, "one merged product")


RULES: tuple[Rule, ...] = (
    Rule(
        "P-01",
        "Cast between DequantizeLinear and a product",
        "warning",
        TENSORRT,
        "Store the scale in the type of the product.",
        _cast_between,
    ),
    Rule(
        "P-02",
        "arithmetic between DequantizeLinear and a product",
        "warning",
        TENSORRT,
        "Move it in front of QuantizeLinear or behind the product.",
        _arithmetic_between,
    ),
    Rule(
        "P-03",
        "rounded activation that leaves the product",
        "warning",
        TENSORRT,
        "Let norms and residuals read the tensor in front of QuantizeLinear.",
        _shared_with_float,
    ),
    Rule(
        "P-04",
        "quantized activation without a product",
        "warning",
        TENSORRT,
        "Remove QuantizeLinear and DequantizeLinear: they only round.",
        _stray,
    ),
    Rule(
        "P-05",
        "different scales for one tensor",
        "warning",
        TENSORRT,
        "Share one QuantizeLinear: then products of one input are joined.",
        _one_scale,
    ),
    Rule(
        "P-06",
        "product quantized on one side",
        "warning",
        TENSORRT,
        "Quantize the other side too, or neither: there is no INT8 product.",
        _half_quantized,
    ),
    Rule(
        "P-07",
        "quantized attention over a long sequence",
        "warning",
        TENSORRT,
        "Leave attention in float: the fused INT8 kernel ends at 512 and the scores are written out.",
        _long_int8_attention,
    ),
    Rule(
        "P-08",
        "8-bit or 4-bit float without hardware",
        "error",
        TENSORRT,
        "Use INT8 or INT4 for this device.",
        _float8,
    ),
    Rule(
        "P-09",
        "scales whose product leaves float16",
        "warning",
        TENSORRT,
        "Use one power-of-two scale per weight and a separate Mul, or FLOAT scales.",
        _tiny_scale_products,
    ),
    Rule(
        "P-10",
        "INT8 sum that may pass through float16",
        "info",
        ("rtx-1.7",),
        "Use one scale per weight and a separate Mul: then the factor stays in the product.",
        _half_accumulator,
    ),
    Rule(
        "P-11",
        "attention quantized in part",
        "warning",
        TENSORRT,
        "Quantize Q, K, V and the probabilities, or nothing: a part breaks the fused kernel.",
        _half_quantized_attention,
    ),
    Rule(
        "P-12",
        "quantized scores or mask",
        "warning",
        TENSORRT,
        "Leave the input of Softmax in float.",
        _quantized_softmax,
    ),
    Rule(
        "P-13",
        "values quantized twice",
        "warning",
        TENSORRT,
        "Remove one pair: the second rounds what the first already rounded.",
        _two_quantizers,
    ),
    Rule(
        "P-14",
        "rounded output",
        "warning",
        TENSORRT,
        "Return the tensor in front of QuantizeLinear.",
        _quantized_output,
    ),
    Rule(
        "R-01",
        "signed activation shared by several products",
        "info",
        ("ort",),
        "Merge the weights and Split behind: ONNX Runtime runs only some of them as integers.",
        _separate_int8,
    ),
)
