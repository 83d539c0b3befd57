"""Quantized operands of MatMul, Gemm and convolutions: what stands between a product and its DequantizeLinear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from onnx import NodeProto, TensorProto

from qvlm_export.conform.view import GraphView, argument, attribute, has_attribute

Granularity = Literal["tensor", "channel", "block"]
GEMMS = ("MatMul", "Gemm")
CONVOLUTIONS = ("Conv", "ConvTranspose")
PRODUCTS = (*GEMMS, *CONVOLUTIONS)
# Walked through on the way back from a product to its DequantizeLinear.
_PASSED = ("Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten")


@dataclass(frozen=True, eq=False)
class Operand:
    """One input of a product: its name, the nodes back to ``dq`` (nearest the product first), and that node."""

    name: str
    path: tuple[NodeProto, ...]
    dq: NodeProto | None
    source: str

    def is_weight(self, view: GraphView) -> bool:
        """Stored, possibly quantized; not computed from inputs."""
        return view.is_constant(self.source if self.dq is None else self.dq.input[0])

    def type(self, view: GraphView) -> int | None:
        """Type of the quantized tensor, None if the operand is float."""
        return None if self.dq is None else view.dtype(self.dq.input[0])


@dataclass(frozen=True, eq=False)
class Product:
    """A product with its two operands; ``weight`` is None where both are activations."""

    node: NodeProto
    data: Operand
    other: Operand
    weight: Operand | None


def operand(view: GraphView, name: str) -> Operand:
    """Walk back from ``name`` to the DequantizeLinear that feeds it."""
    path: list[NodeProto] = []
    source = name
    node = view.producer(name)
    while node is not None and node.op_type in _PASSED:
        path.append(node)
        source = node.input[0]
        node = view.producer(source)
    is_dq = node is not None and node.op_type == "DequantizeLinear" and len(node.input) > 1
    return Operand(name, tuple(path), node if is_dq else None, source)


def products(view: GraphView) -> Iterator[Product]:
    """Every MatMul, Gemm and convolution, in graph order."""
    for node in view.ops(*PRODUCTS):
        if len(node.input) < 2:
            continue
        left, right = operand(view, node.input[0]), operand(view, node.input[1])
        if right.is_weight(view):
            yield Product(node, left, right, right)
        elif left.is_weight(view) and node.op_type in GEMMS:
            yield Product(node, right, left, left)
        else:
            yield Product(node, left, right, None)


def granularity(view: GraphView, node: NodeProto) -> Granularity | None:
    """Per tensor, per channel or per block, from the scale's shape; None if it is unknown."""
    shape = view.shape(node.input[1])
    if shape is None:
        return None
    if all(size == 1 for size in shape) and len(shape) <= 1:
        return "tensor"
    return "channel" if len(shape) == 1 else "block"


def axis_of(view: GraphView, node: NodeProto) -> int | None:
    """Non-negative ``axis`` of QuantizeLinear or DequantizeLinear as ONNX reads it (1 if left out)."""
    rank = view.rank(node.input[0])
    axis = attribute(node, "axis", 1) if has_attribute(node, "axis") else 1
    return axis if axis >= 0 else None if rank is None else axis + rank


def numbers(view: GraphView, name: str) -> tuple[int, ...] | None:
    """The shape, if every dimension is a number."""
    shape = view.shape(name)
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return tuple(int(size) for size in shape if isinstance(size, int))


def reduced_axis(view: GraphView, product: Product) -> int | None:
    """Axis of the stored weight over which the product sums (K); None for convolutions and reshaped weights."""
    weight = product.weight
    if weight is None or product.node.op_type not in GEMMS or weight.dq is None:
        return None
    rank = view.rank(weight.dq.input[0])
    if rank is None or rank < 2:
        return None
    second = weight.name == product.node.input[1]
    if product.node.op_type == "Gemm":
        flipped = bool(attribute(product.node, "transB" if second else "transA", 0))
    else:
        flipped = False
    axis = rank - 2 if second != flipped else rank - 1
    for node in weight.path:
        if node.op_type == "Transpose":
            perm = attribute(node, "perm", list(range(rank))[::-1])
            axis = perm[axis]
        elif node.op_type not in ("Cast", "Identity"):
            return None
    return axis


def blocked_axes(view: GraphView, node: NodeProto) -> list[int] | None:
    """Axes along which a block scale is shorter than the data; None if shapes are unknown or ranks differ."""
    data, scale = numbers(view, node.input[0]), numbers(view, node.input[1])
    if data is None or scale is None or len(data) != len(scale):
        return None
    return [i for i, (n, s) in enumerate(zip(data, scale, strict=True)) if n != s]


def block_of(view: GraphView, node: NodeProto) -> tuple[int, int, int] | None:
    """(axis, dimension, scales along it) of a block-quantized tensor, the written axis if no axis is shorter."""
    axes = blocked_axes(view, node)
    data, scale = numbers(view, node.input[0]), numbers(view, node.input[1])
    if axes is None or data is None or scale is None:
        return None
    axis = axes[0] if axes else axis_of(view, node)
    return None if axis is None or axis >= len(data) else (axis, data[axis], scale[axis])


def is_dq(node: NodeProto | None) -> bool:
    """DequantizeLinear with a scale."""
    return node is not None and node.op_type == "DequantizeLinear" and len(node.input) > 1


def quantizers(view: GraphView, *op_types: str) -> Iterator[NodeProto]:
    """QuantizeLinear and DequantizeLinear nodes that have a scale."""
    for node in view.ops(*(op_types or ("QuantizeLinear", "DequantizeLinear"))):
        if argument(node, 1):
            yield node


def int4_weights(view: GraphView) -> Iterator[NodeProto]:
    """DequantizeLinear nodes of stored INT4 tensors."""
    for node in quantizers(view, "DequantizeLinear"):
        if view.dtype(node.input[0]) == TensorProto.INT4 and view.is_constant(node.input[0]):
            yield node
