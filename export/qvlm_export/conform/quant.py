"""Rules on QuantizeLinear and DequantizeLinear: zero points, scales, axes and blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from qvlm_export.conform.products import (
    axis_of,
    blocked_axes,
    granularity,
    numbers,
    quantizers,
)
from qvlm_export.conform.rule import ONLY_10_3, TENSORRT, Breach, Consumer, Release, Rule, breach
from qvlm_export.conform.types import QUANTIZED
from qvlm_export.conform.view import (
    GraphView,
    argument,
    attribute,
    dtype_name,
    has_attribute,
)

_SCALE_TYPES = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
# Which default a missing axis gets: 0 in 10.3's importer, ONNX's 1 in 11; between them unknown.
_AXIS_UNSURE: tuple[Release, ...] = ("10.3", "10.13", "10.15")
_AFTER_10_3: tuple[Release, ...] = ("10.13", "10.15", "11", "rtx-1.7")
FLOAT16_NORMAL = float(np.finfo(np.float16).tiny)


def _zero_point_value(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view):
        name = argument(node, 2)
        if not name:
            continue
        values = view.values(name)
        if not view.is_constant(name):
            yield breach(node, name, "a computed zero point", "a constant zero")
        elif values is not None and np.any(values):
            found = f"zero point {values.reshape(-1)[np.flatnonzero(values)[0]]:g}"
            yield breach(node, name, found, "0 everywhere")


def _zero_point_shape(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view):
        name = argument(node, 2)
        zero = numbers(view, name) if name else None
        scale = numbers(view, node.input[1])
        if None not in (zero, scale) and math.prod(zero or ()) != math.prod(scale or ()):
            yield breach(
                node, name, f"shape {list(zero or ())}", f"the scale's {list(scale or ())}"
            )


def _zero_point_type(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view, "QuantizeLinear"):
        name = argument(node, 2)
        dtype = view.dtype(name) if name else attribute(node, "output_dtype", TensorProto.UINT8)
        if dtype not in QUANTIZED:
            found = dtype_name(dtype) if name else f"no zero point, which means {dtype_name(dtype)}"
            yield breach(node, name or node.output[0], found, "an INT8 zero")
    for node in quantizers(view, "DequantizeLinear"):
        dtype = view.dtype(node.input[0])
        if dtype == TensorProto.UINT8:
            yield breach(node, node.input[0], "UINT8 data", "INT8 data with an INT8 zero point")


def _scale_constant(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view):
        if not view.is_constant(node.input[1]):
            yield breach(node, node.input[1], "a computed scale", "an initializer")


def _scale_value(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view):
        values = view.values(node.input[1])
        if values is None:
            continue
        wrong = values[~(np.isfinite(values) & (values > 0))]
        if wrong.size:
            found = f"{wrong.size} of {values.size} scales not positive, such as {wrong[0]:g}"
            yield breach(node, node.input[1], found, "positive finite numbers")


def _scale_subnormal(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view):
        values = view.values(node.input[1])
        if values is None or view.dtype(node.input[1]) != TensorProto.FLOAT16:
            continue
        small = values[(values > 0) & (values < FLOAT16_NORMAL)]
        if small.size:
            found = f"{small.size} of {values.size} scales down to {small.min():g}"
            yield breach(node, node.input[1], found, f"at least {FLOAT16_NORMAL:.2g} in FLOAT16")


def _scale_matches_input(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view, "QuantizeLinear"):
        data, scale = view.dtype(node.input[0]), view.dtype(node.input[1])
        if None not in (data, scale) and data != scale:
            found = f"{dtype_name(scale)} scale on {dtype_name(data)} data"
            yield breach(node, node.input[1], found, f"a {dtype_name(data)} scale")


def _scale_type(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view):
        dtype = view.dtype(node.input[1])
        if dtype is not None and dtype not in _SCALE_TYPES:
            yield breach(node, node.input[1], dtype_name(dtype), "FLOAT, FLOAT16 or BFLOAT16")


def _output_dtype(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("DequantizeLinear"):
        if has_attribute(node, "output_dtype"):
            found = f"output_dtype {dtype_name(attribute(node, 'output_dtype', 0))}"
            yield breach(node, node.output[0], found, "no output_dtype")


def _axis_written(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view):
        kind = granularity(view, node)
        if kind in ("channel", "block") and not has_attribute(node, "axis"):
            yield breach(node, node.input[1], f"per-{kind} scale without axis", "axis written out")


def _scale_shape(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view):
        data, scale = view.shape(node.input[0]), view.shape(node.input[1])
        if data is None or scale is None or granularity(view, node) == "tensor":
            continue
        axis = axis_of(view, node)
        if len(scale) == 1:
            size = data[axis] if axis is not None and axis < len(data) else None
            if (isinstance(size, int) and size != scale[0]) or axis is None or axis >= len(data):
                found = f"{scale[0]} scales on axis {axis} of {list(data)}"
                yield breach(node, node.input[1], found, "[], [1], or one scale per channel")
        elif len(scale) != len(data):
            found = f"scale of shape {list(scale)} on data {list(data)}"
            yield breach(node, node.input[1], found, "the rank of the data for block scales")


def _activation_per_tensor(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view, "QuantizeLinear"):
        kind = granularity(view, node)
        if kind in ("channel", "block") and not view.is_constant(node.input[0]):
            yield breach(node, node.input[1], f"per-{kind} scale of an activation", "one scale")


def _bias_dq(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("DequantizeLinear"):
        if view.dtype(node.input[0]) == TensorProto.INT32:
            yield breach(node, node.input[0], "INT32 data", "a float bias")


def _extra_attributes(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view):
        for name in ("saturate", "precision"):
            if has_attribute(node, name):
                yield breach(node, node.output[0], f"attribute {name}", "axis and block_size")


def _block_divides(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view):
        if granularity(view, node) != "block":
            continue
        axes, data = blocked_axes(view, node), numbers(view, node.input[0])
        scale = numbers(view, node.input[1])
        if axes is None or data is None or scale is None:
            continue
        if len(axes) > 1:
            found = f"blocks along axes {axes}"
            yield breach(node, node.input[1], found, "blocks along one axis")
            continue
        axis = axes[0] if axes else axis_of(view, node)
        if axis is None or axis >= len(data):
            continue
        size, count = data[axis], scale[axis]
        written = attribute(node, "block_size", 0)
        if size % count or (written and written * count != size):
            found = f"{count} scales for {size} rows, block_size {written or 'not written'}"
            yield breach(node, node.input[1], found, "block_size * scales == rows")


def _block_axis(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view):
        axes = blocked_axes(view, node) if granularity(view, node) == "block" else None
        if axes and has_attribute(node, "axis") and axis_of(view, node) not in axes:
            found = f"axis {axis_of(view, node)}, blocks along {axes[0]}"
            yield breach(node, node.input[1], found, "axis of the blocks")


RULES: tuple[Rule, ...] = (
    Rule(
        "Q-01",
        "zero point other than zero",
        "error",
        TENSORRT,
        "Quantize symmetrically: TensorRT has no zero points.",
        _zero_point_value,
    ),
    Rule(
        "Q-02",
        "unsigned quantization",
        "error",
        TENSORRT,
        "Give QuantizeLinear an INT8 zero point: without one ONNX Runtime computes UINT8 and "
        "TensorRT INT8.",
        _zero_point_type,
    ),
    Rule(
        "Q-03",
        "computed scale",
        "error",
        ONLY_10_3,
        "Calibrate and store the scale, or divide by the dynamic part before QuantizeLinear.",
        _scale_constant,
    ),
    Rule(
        "Q-04",
        "scale that is not positive",
        "error",
        TENSORRT,
        "Quantize this layer again: an all-zero channel needs any positive scale.",
        _scale_value,
    ),
    Rule(
        "Q-05",
        "scale of another type than the data",
        "error",
        ONLY_10_3,
        "Store the scale in the type of the data.",
        _scale_matches_input,
    ),
    Rule(
        "Q-06",
        "output_dtype on DequantizeLinear",
        "error",
        TENSORRT,
        "Leave it out and store the scale in the wanted type.",
        _output_dtype,
    ),
    Rule(
        "Q-07",
        "axis not written",
        "error",
        _AXIS_UNSURE,
        "Write axis: importers disagree about its default.",
        _axis_written,
    ),
    Rule(
        "Q-08",
        "scale of a shape that does not fit the data",
        "error",
        TENSORRT,
        "Give one scale, one per channel of axis, or one per block.",
        _scale_shape,
    ),
    Rule(
        "Q-09",
        "activation with more than one scale",
        "warning",
        TENSORRT,
        "Quantize activations per tensor: others do not become an INT8 product.",
        _activation_per_tensor,
    ),
    Rule(
        "Q-10",
        "quantized bias",
        "error",
        TENSORRT,
        "Keep the bias as a float Add.",
        _bias_dq,
    ),
    Rule(
        "Q-11",
        "attribute that importers do not know",
        "warning",
        TENSORRT,
        "Leave it out.",
        _extra_attributes,
    ),
    Rule(
        "Q-12",
        "blocks that do not divide the dimension",
        "error",
        TENSORRT,
        "Choose a block that divides the dimension: the importer infers it from the shapes and "
        "compiles a wrong one silently.",
        _block_divides,
    ),
    Rule(
        "Q-13",
        "computed scale",
        "warning",
        _AFTER_10_3,
        "Divide by the dynamic part before QuantizeLinear: a computed scale loses the INT8 product.",
        _scale_constant,
    ),
    Rule(
        "Q-14",
        "scale below float16's normal numbers",
        "warning",
        TENSORRT,
        "Scale the layer, or store its scales in FLOAT: subnormal scales have few bits.",
        _scale_subnormal,
    ),
    Rule(
        "Q-15",
        "scale that is not a float",
        "error",
        TENSORRT,
        "Store the scale as FLOAT, FLOAT16 or BFLOAT16.",
        _scale_type,
    ),
    Rule(
        "Q-16",
        "zero point of another shape than the scale",
        "error",
        TENSORRT,
        "Give one zero for each scale.",
        _zero_point_shape,
    ),
    Rule(
        "Q-17",
        "axis that is not the one of the blocks",
        "error",
        TENSORRT,
        "Set axis to the dimension that the scale divides.",
        _block_axis,
    ),
)
