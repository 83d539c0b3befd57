"""Rules on operators: which ones a release imports, and the forms of each that it imports."""

from __future__ import annotations

import re
from collections.abc import Iterator

from onnx import TensorProto

from qvlm_export.conform.operator_table import INSTEAD, MAX_OPSET, has_operator
from qvlm_export.conform.rule import ONLY_10_3, TENSORRT, Breach, Consumer, Release, Rule, breach
from qvlm_export.conform.view import (
    GraphView,
    argument,
    attribute,
    dtype_name,
    has_attribute,
    operator,
)

# Input that 10.3 reads when it builds, by operator.
_BUILD_TIME_INPUT = {"Squeeze": 1, "Unsqueeze": 1, "Pad": 3, "CumSum": 1}
# The 11 parser takes these computed; the tables of 10.x do not.
_BEFORE_11: tuple[Release, ...] = ("10.3", "10.13", "10.15")
# Kernel limit of the sorted selection.
_TOPK_LIMIT = 3840


def _available(view: GraphView, consumer: Consumer) -> Iterator[Breach]:
    for node in view.nodes:
        if not has_operator(consumer.release, node):
            instead = INSTEAD.get(node.op_type)
            allowed = f"write {instead}" if instead else "operators of the table only"
            found = f"{operator(node)} is not in TensorRT {consumer.release}"
            yield breach(node, node.output[0] if node.output else "", found, allowed)


def _build_time_axes(view: GraphView, consumer: Consumer) -> Iterator[Breach]:
    for node in view.nodes:
        reduces = node.op_type.startswith("Reduce")
        name = argument(
            node, 1 if reduces else _BUILD_TIME_INPUT.get(node.op_type, len(node.input))
        )
        if not name or view.is_initializer(name):
            continue
        if consumer.release == "10.3" or name in view.inputs:
            yield breach(node, name, f"computed axes of {node.op_type}", "an initializer")


def _scatter_reduction(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("ScatterND", "ScatterElements"):
        found = attribute(node, "reduction", "none")
        if found != "none":
            yield breach(node, node.output[0], f"reduction {found}", "none")


def _norm_outputs(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("LayerNormalization"):
        for name in node.output[1:]:
            if view.is_used(name):
                yield breach(node, name, "a second output in use", "the first output only")


def _norm_inputs(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("LayerNormalization"):
        if not (argument(node, 1) and argument(node, 2)):
            given = sum(bool(name) for name in node.input)
            yield breach(node, node.output[0], f"{given} inputs", "data, scale and bias")


def _data_dependent(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("NonZero", "If", "Loop", "Scan", "NonMaxSuppression"):
        found = f"{node.op_type}, whose work depends on data"
        yield breach(node, node.output[0], found, "shapes that follow from the input shapes")


def _top_k(view: GraphView, consumer: Consumer) -> Iterator[Breach]:
    for node in view.ops("TopK"):
        k = view.ints(node.input[1])
        if k is None and consumer.release == "10.3":
            yield breach(node, node.input[1], "a computed K", "an initializer")
        if k and k[0] > _TOPK_LIMIT:
            yield breach(node, node.input[1], f"K = {k[0]}", f"at most {_TOPK_LIMIT}")
        if not attribute(node, "sorted", 1):
            yield breach(node, node.output[0], "sorted=0", "sorted=1")


def _resize_antialias(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Resize"):
        if attribute(node, "antialias", 0):
            yield breach(node, node.output[0], "antialias=1", "antialias=0")


def _einsum(view: GraphView, consumer: Consumer) -> Iterator[Breach]:
    for node in view.ops("Einsum"):
        equation = attribute(node, "equation", "")
        if re.search(r"[A-Z]", equation):
            yield breach(node, node.output[0], f"equation {equation!r}", "lower-case letters")
        if "..." in equation and consumer.release == "10.3":
            yield breach(node, node.output[0], f"equation {equation!r}", "no ellipsis before 10.12")
        integers = [
            n for n in node.input if view.dtype(n) in (TensorProto.INT32, TensorProto.INT64)
        ]
        for name in integers:
            yield breach(node, name, "integer operand", "a float type")


def _opset(view: GraphView, consumer: Consumer) -> Iterator[Breach]:
    found, limit = view.opsets.get("ai.onnx", 0), MAX_OPSET[consumer.release]
    if found > limit:
        yield Breach("", "", f"opset {found}", f"at most {limit}")


def _trilu(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Trilu"):
        name = argument(node, 1)
        if name and not view.is_initializer(name):
            yield breach(node, name, "a computed diagonal k", "an initializer")


def _conv_weights(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Conv", "ConvTranspose"):
        if not view.is_constant(node.input[1]):
            allowed = "an initializer, or DequantizeLinear of one"
            yield breach(node, node.input[1], "a computed weight", allowed)


def _non_zero_input(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("NonZero"):
        dtype = view.dtype(node.input[0])
        if dtype not in (None, TensorProto.FLOAT, TensorProto.FLOAT16):
            yield breach(node, node.input[0], dtype_name(dtype), "FLOAT or FLOAT16")


def _norm_precision(view: GraphView, _: Consumer) -> Iterator[Breach]:
    half = (TensorProto.FLOAT16,)
    for node in view.ops("LayerNormalization", "RMSNormalization"):
        stash = attribute(node, "stash_type", TensorProto.FLOAT)
        if stash != TensorProto.FLOAT and view.dtype(node.input[0]) in half:
            yield breach(node, node.output[0], f"stash_type {dtype_name(stash)}", "FLOAT")


def _reshape_zero(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Reshape"):
        shape = view.ints(node.input[1])
        if shape and 0 in shape and attribute(node, "allowzero", 0):
            yield breach(node, node.input[1], f"allowzero=1 with {shape}", "allowzero=0")


def _partial_shape(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Shape"):
        for name in ("start", "end"):
            if has_attribute(node, name):
                yield breach(
                    node, node.output[0], f"Shape with {name}", "Gather from the whole Shape"
                )


RULES: tuple[Rule, ...] = (
    Rule(
        "O-01",
        "operator that the release does not import",
        "error",
        TENSORRT,
        "Write it in operators of the table, or choose a newer release.",
        _available,
    ),
    Rule(
        "O-02",
        "axes that are not an initializer",
        "error",
        TENSORRT,
        "Fold the axes into an initializer.",
        _build_time_axes,
    ),
    Rule(
        "O-03",
        "Scatter with a reduction",
        "error",
        TENSORRT,
        "Gather, combine and scatter without reduction.",
        _scatter_reduction,
    ),
    Rule(
        "O-04",
        "LayerNormalization with more than one output in use",
        "error",
        TENSORRT,
        "Compute mean and deviation with ReduceMean where they are needed.",
        _norm_outputs,
    ),
    Rule(
        "O-05",
        "work that depends on data",
        "warning",
        TENSORRT,
        "Express it with Where, masks or fixed unrolling: it prevents CUDA graphs.",
        _data_dependent,
    ),
    Rule(
        "O-06",
        "TopK beyond the kernel's limits",
        "error",
        TENSORRT,
        "Take K as an initializer of at most 3840 and sorted=1.",
        _top_k,
    ),
    Rule(
        "O-07",
        "Resize with antialias",
        "error",
        TENSORRT,
        "Resize the constant beforehand and store the result.",
        _resize_antialias,
    ),
    Rule(
        "O-08",
        "LayerNormalization without scale or bias",
        "warning",
        ONLY_10_3,
        "Give both, ones and zeros if need be: 10.1 to 10.3 take a missing one wrongly.",
        _norm_inputs,
    ),
    Rule(
        "O-09",
        "opset above the release's table",
        "warning",
        TENSORRT,
        "Export with a lower opset; 21 serves every release.",
        _opset,
    ),
    Rule(
        "O-10",
        "Trilu with a computed diagonal",
        "error",
        _BEFORE_11,
        "Compare position numbers and use Where.",
        _trilu,
    ),
    Rule(
        "O-11",
        "convolution with computed weights",
        "error",
        _BEFORE_11,
        "Store the weights, or write the product as MatMul.",
        _conv_weights,
    ),
    Rule(
        "O-12",
        "NonZero of something other than a float",
        "error",
        TENSORRT,
        "Cast to FLOAT first, or better avoid NonZero.",
        _non_zero_input,
    ),
    Rule(
        "O-13",
        "Einsum in a form that is not imported",
        "error",
        TENSORRT,
        "Write Transpose, MatMul and Reshape.",
        _einsum,
    ),
    Rule(
        "O-14",
        "normalization that accumulates in float16",
        "warning",
        TENSORRT,
        "Set stash_type to FLOAT: squares leave float16 at 256.",
        _norm_precision,
    ),
    Rule(
        "O-15",
        "Reshape that means a literal zero",
        "warning",
        TENSORRT,
        "Leave allowzero out and name the dimension, or use -1.",
        _reshape_zero,
    ),
    Rule(
        "O-16",
        "part of a shape by attributes",
        "warning",
        ONLY_10_3,
        "Take the dimension with Gather: 8.0's importer skips start and end, 10.3's is not known to read them.",
        _partial_shape,
    ),
)
