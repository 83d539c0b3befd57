"""Rules on quantized weights: forms of INT4 and INT8 that become one kernel, and forms expanded at run time."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from qvlm_export.conform.products import (
    CONVOLUTIONS,
    GEMMS,
    Product,
    axis_of,
    block_of,
    granularity,
    int4_weights,
    numbers,
    products,
    quantizers,
    reduced_axis,
)
from qvlm_export.conform.rule import ONLY_10_3, TENSORRT, Breach, Consumer, Rule, breach
from qvlm_export.conform.view import GraphView, dtype_name, label

_INT8_OR_4 = (TensorProto.INT8, TensorProto.INT4)
_BLOCKS = (64, 128)


def int4_products(view: GraphView) -> Iterator[tuple[Product, NodeProto]]:
    """Products with a stored INT4 weight, and that weight's DequantizeLinear."""
    for product in products(view):
        weight = product.weight
        dq = None if weight is None else weight.dq
        if dq is not None and view.dtype(dq.input[0]) == TensorProto.INT4:
            yield product, dq


def _even(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for name, tensor in view.initializers.items():
        shape = tuple(tensor.dims)
        stored_alone = math.prod(shape) == 1  # a zero point
        if tensor.data_type != TensorProto.INT4 or stored_alone:
            continue
        if math.prod(shape) % 2 or shape[-1] % 2:
            node = next(iter(view.consumers(name)), None)
            found = f"INT4 tensor of shape {list(shape)}"
            yield Breach(label(node) if node else "", name, found, "an even last dimension")


def _direct_chain(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in int4_weights(view):
        name = node.output[0]
        readers = view.consumers(name)
        while len(readers) == 1 and readers[0].op_type == "Transpose":
            name = readers[0].output[0]
            readers = view.consumers(name)
        wrong = [r.op_type for r in readers if r.op_type not in (*GEMMS, *CONVOLUTIONS, "Gather")]
        if wrong or len(readers) > 1:
            found = f"INT4 weight read by {', '.join(r.op_type for r in readers)}"
            yield breach(node, name, found, "one MatMul or Gemm, behind at most a Transpose")


def _blocks_along_k(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for product, dq in int4_products(view):
        block, k = block_of(view, dq), reduced_axis(view, product)
        if (
            block is not None
            and k is not None
            and granularity(view, dq) == "block"
            and block[0] != k
        ):
            found = f"blocks along axis {block[0]}, the product sums over axis {k}"
            yield breach(product.node, dq.input[1], found, "blocks along the summed axis")


def _block_size(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in int4_weights(view):
        block = block_of(view, node) if granularity(view, node) == "block" else None
        if block is None or block[2] < 2 or block[1] % block[2]:
            continue
        size = block[1] // block[2]
        if size not in _BLOCKS:
            yield breach(node, node.input[1], f"block {size}", "64 or 128")


def _two_blocks(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for product, dq in int4_products(view):
        kind = granularity(view, dq)
        block = block_of(view, dq)
        if kind in ("tensor", "channel"):
            yield breach(product.node, dq.input[1], f"per-{kind} INT4 scale", "two blocks or more")
        elif block is not None and block[2] < 2:
            found = f"one block of {block[1]}"
            yield breach(product.node, dq.input[1], found, "two blocks or more")


def _activation_type(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for product, dq in int4_products(view):
        scale = view.dtype(dq.input[1])
        if scale == TensorProto.FLOAT:
            found = "FLOAT scale of an INT4 weight"
            yield breach(product.node, dq.input[1], found, "FLOAT16 or BFLOAT16, as the activation")


def _int4_convolution(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for product, dq in int4_products(view):
        if product.node.op_type in CONVOLUTIONS:
            yield breach(product.node, dq.input[0], "INT4 convolution", "INT4 in MatMul or Gemm")


def _int4_activation(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view, "QuantizeLinear"):
        if view.dtype(node.output[0]) == TensorProto.INT4 and not view.is_constant(node.input[0]):
            yield breach(node, node.output[0], "INT4 activation", "INT8 or float activations")


def _int8_times_int4(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for product, dq in int4_products(view):
        if product.data.type(view) == TensorProto.INT8:
            found = "INT8 activation and INT4 weight"
            yield breach(product.node, dq.input[0], found, "a float activation")


def _block_form_10_3(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in quantizers(view):
        if granularity(view, node) != "block":
            continue
        dtype, rank = view.dtype(node.input[0]), view.rank(node.input[0])
        if node.op_type == "QuantizeLinear":
            dtype = view.dtype(node.output[0])
        if dtype not in (None, TensorProto.INT4) or rank not in (None, 2):
            found = f"{dtype_name(dtype)} of rank {rank} in blocks"
            yield breach(node, node.input[1], found, "INT4 of rank 2")


def _int8_blocks(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for product in products(view):
        weight = product.weight
        dq = None if weight is None else weight.dq
        if dq is None or view.dtype(dq.input[0]) != TensorProto.INT8:
            continue
        if granularity(view, dq) == "block":
            yield breach(
                product.node, dq.input[1], "INT8 weight in blocks", "one scale per channel"
            )


def _scale_along_k(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for product in products(view):
        dq = None if product.weight is None else product.weight.dq
        if dq is None or granularity(view, dq) != "channel":
            continue
        axis = axis_of(view, dq)
        if axis is not None and axis == reduced_axis(view, product):
            found = f"one scale per row of the summed axis {axis}"
            yield breach(product.node, dq.input[1], found, "one scale per output channel")


def _tiny_product(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for product in products(view):
        dq = None if product.weight is None else product.weight.dq
        if dq is None or product.node.op_type not in GEMMS:
            continue
        if view.dtype(dq.input[0]) not in _INT8_OR_4:
            continue
        shape = numbers(view, dq.input[0])
        if shape is not None and min(shape) < 16:
            found = f"quantized weight of shape {list(shape)}"
            yield breach(product.node, dq.input[0], found, "16 or more rows and columns")


RULES: tuple[Rule, ...] = (
    Rule(
        "W-01",
        "INT4 tensor with an odd number of columns",
        "error",
        TENSORRT,
        "Pad the weight by one column, or keep this layer in float.",
        _even,
    ),
    Rule(
        "W-02",
        "INT4 weight that does not go straight into its product",
        "warning",
        TENSORRT,
        "Let DequantizeLinear feed one MatMul or Gemm; a Transpose between them is folded.",
        _direct_chain,
    ),
    Rule(
        "W-03",
        "INT4 blocks across the product's sum",
        "info",
        TENSORRT,
        "Store [K, N] with axis=0: it is the form that every release is known to fuse.",
        _blocks_along_k,
    ),
    Rule(
        "W-04",
        "unusual INT4 block",
        "warning",
        TENSORRT,
        "Use blocks of 128 or 64: NVIDIA's guide names no other.",
        _block_size,
    ),
    Rule(
        "W-05",
        "INT4 weight without at least two blocks",
        "warning",
        TENSORRT,
        "Use blocks below K: otherwise the whole weight is expanded to float at every run.",
        _two_blocks,
    ),
    Rule(
        "W-06",
        "INT4 weight in a float32 product",
        "warning",
        TENSORRT,
        "Store scales and run activations in FLOAT16 or BFLOAT16.",
        _activation_type,
    ),
    Rule(
        "W-07",
        "INT4 convolution",
        "error",
        TENSORRT,
        "Use INT8, or write the convolution as MatMul.",
        _int4_convolution,
    ),
    Rule(
        "W-09",
        "INT4 activation",
        "error",
        TENSORRT,
        "INT4 is for weights only.",
        _int4_activation,
    ),
    Rule(
        "W-10",
        "INT4 weight behind an INT8 activation",
        "error",
        TENSORRT,
        "Remove the activation's QuantizeLinear, or use an INT8 weight: compiled, it is wrong.",
        _int8_times_int4,
    ),
    Rule(
        "W-11",
        "blocks in another form than 10.3 has",
        "error",
        ONLY_10_3,
        "Use blocks on two-dimensional INT4 weights only.",
        _block_form_10_3,
    ),
    Rule(
        "W-12",
        "INT8 weight in blocks",
        "warning",
        TENSORRT,
        "Use one scale per output channel: INT8 blocks are expanded at every run.",
        _int8_blocks,
    ),
    Rule(
        "W-13",
        "one scale per input channel",
        "warning",
        TENSORRT,
        "Put the scales on the output axis: along the sum there is no integer product.",
        _scale_along_k,
    ),
    Rule(
        "W-14",
        "tiny quantized product",
        "info",
        TENSORRT,
        "Keep it in float: below 16 rows or columns there is nothing to gain.",
        _tiny_product,
    ),
)
