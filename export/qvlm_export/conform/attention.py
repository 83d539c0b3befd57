"""Rules on attention and rotary embedding, as operators and as primitives."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from qvlm_export.conform.rule import TENSORRT, Breach, Consumer, Release, Rule, breach
from qvlm_export.conform.view import (
    GraphView,
    argument,
    attribute,
    dtype_name,
    has_attribute,
)

_WITH_ATTENTION: tuple[Release, ...] = ("10.13", "10.15", "11", "rtx-1.7")
_WITH_ROTARY: tuple[Release, ...] = ("10.15", "11", "rtx-1.7")
# Compiles to a fused kernel: 16, 32, 36, 40, 60, 64, 66, 72, 80, 96, 100, 128, 192, 256; refused: 4, 8, 264, 320.
_HEAD_SIZES = (16, 256)
_HEAD_STEP = 8
_INPUTS = {4: "past_key", 5: "past_value", 6: "nonpad_kv_seqlen"}
_ATTRIBUTES = ("softcap", "softmax_precision", "qk_matmul_output_mode")
# Operators that move or repeat data without computing.
_LAYOUT = ("Transpose", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Identity")


def _attention_form(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Attention"):
        for index, title in _INPUTS.items():
            if argument(node, index):
                yield breach(node, argument(node, index), f"input {title}", "Q, K, V and attn_mask")
        for name in _ATTRIBUTES:
            if attribute(node, name, 0):
                yield breach(node, "", f"attribute {name}", "is_causal, scale and head numbers")
        for name in node.output[1:]:
            if view.is_used(name):
                yield breach(node, name, "a second output in use", "the first output only")


def _attention_rank(view: GraphView, consumer: Consumer) -> Iterator[Breach]:
    for node in view.ops("Attention"):
        ranks = [view.rank(name) for name in node.input[:3]]
        if None in ranks:
            continue
        heads = has_attribute(node, "q_num_heads") and has_attribute(node, "kv_num_heads")
        found = f"Q, K, V of rank {ranks}"
        if len(set(ranks)) > 1:
            yield breach(node, node.input[0], found, "one rank")
        elif ranks[0] != 4 and consumer.release == "10.13":
            yield breach(node, node.input[0], found, "4: [batch, heads, rows, head size]")
        elif ranks[0] == 3 and not heads:
            yield breach(node, node.input[0], found, "3 with q_num_heads and kv_num_heads, or 4")


def _attention_mask(view: GraphView, consumer: Consumer) -> Iterator[Breach]:
    for node in view.ops("Attention"):
        name = argument(node, 3)
        if not name:
            continue
        dtype, data, rank = view.dtype(name), view.dtype(node.input[0]), view.rank(name)
        if None not in (dtype, data) and dtype not in (data, TensorProto.BOOL):
            yield breach(node, name, dtype_name(dtype), f"{dtype_name(data)} or BOOL")
        if consumer.release == "10.13" and rank not in (None, 4):
            yield breach(node, name, f"a mask of rank {rank}", "rank 4")


def _attention_float32(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Attention"):
        decomposes = attribute(node, "TRT_decomposable", 0)
        if view.dtype(node.input[0]) == TensorProto.FLOAT and not decomposes:
            yield breach(node, node.input[0], "FLOAT", "FLOAT16 or BFLOAT16")


def _holds_past(view: GraphView, name: str) -> bool:
    """Keys that come from an input of the graph besides the new rows."""
    node = view.producer(name)
    while node is not None and node.op_type in _LAYOUT:
        node = view.producer(node.input[0])
    if node is None:
        return False
    if node.op_type == "TensorScatter":
        return True
    return node.op_type == "Concat" and any(source in view.inputs for source in node.input)


def _causal_with_past(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Attention"):
        if attribute(node, "is_causal", 0) and _holds_past(view, node.input[1]):
            found = "is_causal=1 over keys that hold a past"
            yield breach(node, node.input[1], found, "an additive mask")


def _bool_mask(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Attention"):
        name = argument(node, 3)
        if name and view.dtype(name) == TensorProto.BOOL:
            yield breach(node, name, "BOOL mask", "an additive mask of the data's type")


def _head_size(view: GraphView, node: NodeProto) -> int | None:
    shape = view.shape(node.input[0])
    if shape is None or not isinstance(shape[-1], int):
        return None
    heads = attribute(node, "q_num_heads", 0) if len(shape) == 3 else 1
    return shape[-1] // heads if heads else None


def _attention_head_size(view: GraphView, _: Consumer) -> Iterator[Breach]:
    least, most = _HEAD_SIZES
    for node in view.ops("Attention"):
        size = _head_size(view, node)
        if size is None or attribute(node, "TRT_decomposable", 0):
            continue
        if not least <= size <= most:
            yield breach(node, node.input[0], f"head size {size}", f"{least} to {most}")


def _padded_heads(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Attention"):
        size = _head_size(view, node)
        if size is not None and size % _HEAD_STEP:
            found = f"head size {size}"
            yield breach(node, node.input[0], found, f"a multiple of {_HEAD_STEP}")


def _trt_attribute(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.nodes:
        for entry in node.attribute:
            if entry.name.startswith("TRT_"):
                yield breach(node, "", f"attribute {entry.name}", "attributes of the ONNX standard")


def _quantized_attention(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Attention"):
        for name in node.input[:3]:
            if view.producer_op(name) == "DequantizeLinear":
                yield breach(node, name, "quantized Q, K or V", "a float tensor")


def _rotary_rank(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("RotaryEmbedding"):
        rank = view.rank(node.input[0])
        if rank == 3 and not attribute(node, "num_heads", 0):
            yield breach(node, node.input[0], "rank 3 without num_heads", "num_heads, or rank 4")


def _rotary_tables(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("RotaryEmbedding"):
        want = 2 if argument(node, 3) else 3
        for name in node.input[1:3]:
            rank = view.rank(name)
            if rank is not None and rank != want:
                allowed = "[positions, D/2] with position_ids, [batch, rows, D/2] without"
                yield breach(node, name, f"a table of rank {rank}", allowed)


RULES: tuple[Rule, ...] = (
    Rule(
        "A-01",
        "Attention with inputs, attributes or outputs that are not imported",
        "error",
        _WITH_ATTENTION,
        "Join the past outside the operator and apply softcap with primitives.",
        _attention_form,
    ),
    Rule(
        "A-02",
        "Attention on tensors of a rank that is not imported",
        "error",
        _WITH_ATTENTION,
        "Reshape and transpose Q, K and V to [batch, heads, rows, head size].",
        _attention_rank,
    ),
    Rule(
        "A-03",
        "attention mask of another type or rank",
        "error",
        _WITH_ATTENTION,
        "Give a mask [batch or 1, heads or 1, rows, columns] of the data's type.",
        _attention_mask,
    ),
    Rule(
        "A-04",
        "Attention in float32",
        "error",
        _WITH_ATTENTION,
        "Export in float16: there is no float32 kernel and no fallback.",
        _attention_float32,
    ),
    Rule(
        "A-05",
        "is_causal over a cache",
        "error",
        _WITH_ATTENTION,
        "Use a mask: is_causal aligns the upper left corner, so new rows see the oldest ones only.",
        _causal_with_past,
    ),
    Rule(
        "A-06",
        "boolean attention mask",
        "warning",
        _WITH_ATTENTION,
        "Use an additive mask: a boolean one costs eight to nine more kernels in prefill.",
        _bool_mask,
    ),
    Rule(
        "A-07",
        "head size without a kernel",
        "error",
        _WITH_ATTENTION,
        "Write attention in primitives.",
        _attention_head_size,
    ),
    Rule(
        "A-12",
        "head size that is padded",
        "warning",
        _WITH_ATTENTION,
        "Store the heads padded with zeros: otherwise Q, K and V are copied at every run.",
        _padded_heads,
    ),
    Rule(
        "A-08",
        "attribute outside the ONNX standard",
        "warning",
        TENSORRT,
        "Keep it in a copy for TensorRT: ONNX Runtime and the ONNX checker reject the file.",
        _trt_attribute,
    ),
    Rule(
        "A-09",
        "quantized inputs of Attention",
        "warning",
        _WITH_ATTENTION,
        "Leave Q, K and V in float: the kernel stays float16 and only rounding is added.",
        _quantized_attention,
    ),
    Rule(
        "A-10",
        "RotaryEmbedding of rank 3 without num_heads",
        "error",
        _WITH_ROTARY,
        "Set num_heads, or give [batch, heads, rows, head size].",
        _rotary_rank,
    ),
    Rule(
        "A-11",
        "RotaryEmbedding with tables of another rank",
        "error",
        _WITH_ROTARY,
        "Store cos and sin as [positions, D/2] and give position_ids.",
        _rotary_tables,
    ),
)
