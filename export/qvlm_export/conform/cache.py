"""Rules on the key/value cache: written in place, joined, or returned as new rows."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from qvlm_export.conform.rule import TENSORRT, Breach, Consumer, Release, Rule, breach
from qvlm_export.conform.view import GraphView, attribute, dtype_name, tensor_bytes

_WITH_SCATTER: tuple[Release, ...] = ("10.15", "11", "rtx-1.7")
_CACHE_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
# Alignment of every address that is bound.
_ADDRESS = 256


def _scatter_form(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("TensorScatter"):
        axis, rank = attribute(node, "axis", -2), view.rank(node.input[0])
        mode = attribute(node, "mode", "linear")
        dtype = view.dtype(node.input[0])
        if axis not in (-2, None if rank is None else rank - 2):
            yield breach(node, node.input[0], f"axis {axis}", "-2")
        if mode != "linear":
            yield breach(node, node.input[0], f"mode {mode}", "linear")
        if dtype is not None and dtype not in _CACHE_TYPES:
            allowed = "FLOAT, FLOAT16 or BFLOAT16"
            yield breach(node, node.input[0], f"{dtype_name(dtype)} cache", allowed)


def _scatter_binding(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("TensorScatter"):
        if node.input[0] not in view.inputs:
            yield breach(node, node.input[0], "a computed cache", "an input of the graph")
        if node.output[0] not in view.outputs:
            yield breach(node, node.output[0], "a result kept inside", "an output of the graph")


def _scatter_length(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("TensorScatter"):
        shape = view.shape(node.input[0])
        if shape is not None and len(shape) == 4 and not isinstance(shape[2], int):
            yield breach(node, node.input[0], f"cache length {shape[2] or '?'}", "a fixed number")


def _scatter_nd_cache(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("ScatterND", "ScatterElements"):
        if node.input[0] in view.inputs and node.output[0] in view.outputs:
            found = f"{node.op_type} from an input to an output"
            yield breach(node, node.output[0], found, "the new rows as output")


def _behind_layout(view: GraphView, name: str, through: tuple[str, ...]) -> Iterator[NodeProto]:
    """Nodes that read ``name``, and what reads those that only move data, ``through`` included."""
    for node in view.consumers(name):
        yield node
        if node.op_type in through:
            yield from _behind_layout(view, node.output[0], through)


def _scatter_expand(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("TensorScatter"):
        readers = _behind_layout(view, node.output[0], ("Unsqueeze", "Transpose", "Reshape"))
        if any(reader.op_type in ("Expand", "Tile", "Gather") for reader in readers):
            found = "heads repeated from the whole cache at every step"
            yield breach(node, node.output[0], found, "Attention with fewer key/value heads")


def _whole_cache(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Concat"):
        grows = node.output[0] in view.outputs and (view.rank(node.output[0]) or 0) == 4
        if grows and any(name in view.inputs for name in node.input):
            found = "past and new rows joined in an output"
            yield breach(node, node.output[0], found, "the new rows as output")


def _head_major_past(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Concat"):
        past = next((name for name in node.input if name in view.inputs), None)
        shape = None if past is None else view.shape(past)
        if (
            past is None
            or shape is None
            or len(shape) != 4
            or attribute(node, "axis", 0) not in (2, -2)
        ):
            continue
        dynamic, heads = not isinstance(shape[2], int), shape[1]
        if dynamic and isinstance(heads, int) and heads > 1:
            found = f"[batch, {heads} heads, length, D]"
            yield breach(node, past, found, "[batch, length, heads, D]")


def _unaligned_rows(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Concat"):
        past = next((name for name in node.input if name in view.inputs), None)
        new = next((name for name in node.input if name in view.outputs), None)
        shape = None if past is None else view.shape(past)
        if past is None or new is None or shape is None or len(shape) != 4:
            continue
        heads, size, dtype = shape[2], shape[3], view.dtype(past)
        if (
            attribute(node, "axis", 0) != 1
            or not isinstance(heads, int)
            or not isinstance(size, int)
        ):
            continue
        row = None if dtype is None else tensor_bytes(dtype, (heads, size))
        if row is not None and row % _ADDRESS:
            found = f"rows of {row} bytes"
            yield breach(node, new, found, f"a multiple of {_ADDRESS}")


RULES: tuple[Rule, ...] = (
    Rule(
        "C-01",
        "TensorScatter in a form that is not imported",
        "error",
        _WITH_SCATTER,
        "Scatter linearly along the second last axis of a float cache.",
        _scatter_form,
    ),
    Rule(
        "C-02",
        "TensorScatter that cannot work in place",
        "error",
        _WITH_SCATTER,
        "Let the cache be an input and its result an output, bound to one address.",
        _scatter_binding,
    ),
    Rule(
        "C-03",
        "in-place cache of variable length",
        "error",
        _WITH_SCATTER,
        "Fix the length of the cache and mask what is not filled.",
        _scatter_length,
    ),
    Rule(
        "C-04",
        "cache written by ScatterND",
        "warning",
        TENSORRT,
        "Return the new rows, or use TensorScatter: ScatterND copies the whole cache each step.",
        _scatter_nd_cache,
    ),
    Rule(
        "C-05",
        "in-place cache with repeated heads",
        "warning",
        _WITH_SCATTER,
        "Use Attention behind TensorScatter, or the form that returns new rows.",
        _scatter_expand,
    ),
    Rule(
        "C-06",
        "whole cache as an output",
        "warning",
        TENSORRT,
        "Return the new rows only: the joined cache is written again at every step.",
        _whole_cache,
    ),
    Rule(
        "C-07",
        "past with heads before positions",
        "info",
        TENSORRT,
        "Keep the past as [batch, length, heads, D]: then new rows land behind it without a copy.",
        _head_major_past,
    ),
    Rule(
        "K-02",
        "cache rows that break the alignment of addresses",
        "warning",
        TENSORRT,
        "Pad the heads, or let the runtime copy: rows bound behind the past need 256-byte addresses.",
        _unaligned_rows,
    ),
)
