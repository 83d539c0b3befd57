"""Linears and their number formats; the only file that creates QuantizeLinear and DequantizeLinear.

Five kinds, chosen per linear by the checkpoint (x [1, S, K], weight stored as [K, N]):

    float    MatMul(x, W) + b
    INT4     MatMul(x, DequantizeLinear(INT4 W, F[K/block, N], axis=0, block_size)) + b
    token    m = Max(ReduceMax(Abs(x)), eps);  d = DQ(Q(x / m, 1/127), 1/127)
             MatMul(d, DequantizeLinear(INT8 W, s0)) * c[n] * m + b
    split    as token, with m = Where(image token, 127 image scale, 127 text scale): static
    static   d = DQ(Q(x, input_scale), input_scale);  MatMul(d, DequantizeLinear(INT8 W, s0)) * c[n]
    + b

``s0`` is one power of two per weight and c[n] = scale[n] / s0, so s0 * c[n] is the checkpoint's
scale exactly and W * s0 * c[n] is its dequantized weight bit for bit. s0 is also small enough that
no GEMM result leaves float16. INT8 linears that read the same tensor in the same way share one Q
and become one GEMM followed by Split: with a shared INT8 Q and separate GEMMs, ONNX Runtime runs 2
of 7 as integers; merged, all; TensorRT saves a kernel. INT4 linears that read the same tensor
become one where the target asks for it (``int4_joined``); no number changes, as columns of a
product do not depend on one another.

Rules kept (TensorRT rule book): zero points are INT8 zeros, always given to Q (Q-01, Q-02); scales
are constants of the activation's float type (Q-03, Q-05); ``axis`` is explicit on block scales
(Q-07); activations per tensor (Q-09); at least two INT4 blocks along K for TensorRT (W-05); no INT4
weight behind an INT8 activation (W-10).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qvlm.checkpoint import Checkpoint, QuantizedLinear
from qvlm.errors import ExportError
from qvlm_export.graph import GraphBuilder
from qvlm_export.linear_plan import INT8_KINDS, TABLE_FORMAT, LinearPlan, plan_linear
from qvlm_export.ops import split_last
from qvlm_export.pieces import Piece, summed
from qvlm_export.weights import Array, lazy_int4, lazy_int8

# Metadata key of a quantized MatMul: the checkpoint linears inside it, comma separated.
LINEARS_KEY = "qvlm.linears"
# Half of float16's range: what a GEMM's result may reach before c[n] and m.
GEMM_LIMIT = 2.0**15
# A token is divided by its largest value or by this: the smallest round number whose float16
# neighbourhood is normal, and the value that qvlm.affine uses.
TOKEN_FLOOR = 1e-4


def linears(b: GraphBuilder, x: ir.Value, names: Sequence[str]) -> list[ir.Value]:
    """Linears that read the same ``x`` [1, S, K], each to [1, S, N]; those of one ``merge_key``
    become one GEMM.
    """
    groups: dict[tuple[object, ...] | str, list[LinearPlan]] = {}
    for name in names:
        one = plan_linear(b, name)
        groups.setdefault(one.merge_key or name, []).append(one)
    outputs: dict[str, ir.Value] = {}
    for group in groups.values():
        with b.scope("+".join(p.name.rsplit(".", 1)[-1] for p in group)):
            for name in (p.name for p in group):
                b.expect_held(x, name)
            lower = _int8 if group[0].kind in INT8_KINDS else _weight_only
            parts = [_held(b, p, y) for p, y in zip(group, lower(b, x, group), strict=True)]
        outputs.update(zip((p.name for p in group), parts, strict=True))
    return [outputs[name] for name in names]


def linear(b: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """One linear, [1, S, K] to [1, S, N]."""
    return linears(b, x, [name])[0]


def heads_linear(b: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """The projection behind attention: x [1, S, heads, D] to [1, S, N].

    INT4 on TensorRT runs in 2-D with the Reshape back in front of the residual Add: in 3-D the
    compiler expands the whole weight to float16 at every run.
    """
    one = plan_linear(b, name)
    if one.kind == "int4" and b.target.int4_attention_output_2d:
        with b.scope(name.rsplit(".", 1)[-1]):
            flat = b.op("Reshape", x, b.i64(-1, one.in_features))
            b.expect_held(flat, name)
            product = _held(b, one, _weight_only(b, flat, [one])[0])
            return b.op("Reshape", product, b.i64(1, -1, one.out_features))
    return linear(b, b.op("Reshape", x, b.i64(0, 0, one.in_features)), name)


def lookup(b: GraphBuilder, ids: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
    """Rows ``ids`` [1, S] of the table [rows, columns] called ``name``, [1, S, columns].

    INT8: Gather(DequantizeLinear(table, s0)) * Gather(scale / s0), s0 a power of two, exact as in a
    linear. TensorRT takes no integers behind Gather (rule T-02) and keeps the table INT8 in this
    order; ONNX Runtime would expand the whole table at every run, so there DequantizeLinear follows.
    """
    checkpoint = b.weights.checkpoint
    if name not in checkpoint.linears:
        return b.op("Gather", b.parameter(f"{name}.weight", shape), ids, axis=0)
    if (format_name := checkpoint.linears[name]["format"]) != TABLE_FORMAT:
        raise ExportError(f"{name}: format {format_name!r}, expected {TABLE_FORMAT} or float.")
    b.weights.expect(f"{name}.weight", shape)
    # A scale divided by it stays exact in float16 down to s0 * 2^-14.
    s0 = 2.0 ** max(math.floor(math.log2(float(_scales(checkpoint, name).max()))), -14)
    table = b.constant(f"{name}.weight", lazy_int8(shape, lambda: _load(checkpoint, name).integers))
    factor = b.weights.lazy(
        f"{name}.row_scale", (shape[0], 1), lambda: _scales(checkpoint, name) / np.float32(s0)
    )
    constants = (b.scalar(s0), b.scalar(0, ir.DataType.INT8))
    if b.target.is_tensorrt:
        rows = b.op("Gather", b.op("DequantizeLinear", table, *constants), ids, axis=0)
        gathered = rows.producer()
    else:
        integers = b.op("Gather", table, ids, axis=0)
        gathered = integers.producer()
        rows = b.op("DequantizeLinear", integers, *constants)
    assert gathered is not None
    gathered.metadata_props[LINEARS_KEY] = name
    return b.op("Mul", rows, b.op("Gather", b.constant(f"{name}.row_scale", factor), ids, axis=0))


def _weight_only(b: GraphBuilder, x: ir.Value, group: Sequence[LinearPlan]) -> list[ir.Value]:
    """A float linear or INT4 ones; of float32 values, or to values that float16 does not hold,
    they multiply x / m and give product * m.
    """
    m = None
    if b.is_wide(x) or any(b.overflow.row(p.name, "output") for p in group):
        m = _token_maximum(b, x)
        x = b.narrow(b.op("Div", x, m))
    product = _matmul(b, x, group)
    if m is not None:
        product = b.op("Mul", b.widen(product), m)
    return _parts(b, _bias(b, product, group), group)


def _parts(b: GraphBuilder, product: ir.Value, group: Sequence[LinearPlan]) -> list[ir.Value]:
    """The results of a group's linears."""
    if len(group) == 1:
        return [product]
    return list(split_last(b, product, [p.out_features for p in group]))


def _held(b: GraphBuilder, one: LinearPlan, product: ir.Value) -> ir.Value:
    """The result as float32 beside modules that float16 does not hold, as float16 elsewhere."""
    return b.held(product, one.name, wide=b.overflow.beside(one.name))


def _matmul(b: GraphBuilder, x: ir.Value, group: Sequence[LinearPlan]) -> ir.Value:
    """Product with a float weight, or with the INT4 weights of a group."""
    first, width = group[0], sum(p.out_features for p in group)
    depth, block = first.in_features, first.block

    def product(x: ir.Value, piece: Piece) -> ir.Value:
        if block is not None:
            node = b.op("MatMul", x, _int4_weight(b, group, block, piece))
            _mark(node, group)
            return node
        weight = b.weights.stored(
            f"{first.name}.weight",
            (piece.depth, width),
            lambda array: piece.columns(array.reshape(width, -1)).T,
        )
        return b.op("MatMul", x, b.constant(f"{first.name}.weight{piece.suffix}", weight))

    if block is not None:
        least = block * b.target.int4_blocks
        return summed(b, x, depth, depth * width // 2, block, least, product)
    return summed(b, x, depth, depth * width * int(b.float_type.itemsize), 1, 1, product)


def _mark(product: ir.Value, group: Sequence[LinearPlan]) -> None:
    node = product.producer()
    assert node is not None
    node.metadata_props[LINEARS_KEY] = ",".join(p.name for p in group)


def _bias(b: GraphBuilder, x: ir.Value, group: Sequence[LinearPlan]) -> ir.Value:
    """Add the group's biases, zeros for a linear without one."""
    present = [p for p in group if f"{p.name}.bias" in b.weights]
    if not present:
        return x
    for p in present:
        b.weights.expect(f"{p.name}.bias", (p.out_features,))
    checkpoint = b.weights.checkpoint

    def make() -> Array:
        zeros = [np.zeros(p.out_features, np.float32) for p in group]
        for i, p in enumerate(group):
            if p in present:
                zeros[i] = checkpoint.float_tensor(f"{p.name}.bias")
        return np.concatenate(zeros)

    name = _joint(group, "bias")
    width = sum(p.out_features for p in group)
    return b.op("Add", x, b.constant(name, b.weights.lazy(name, (width,), make)))


def _joint(group: Sequence[LinearPlan], suffix: str) -> str:
    """``prefix.q_proj+k_proj.suffix``."""
    prefix, _, first = group[0].name.rpartition(".")
    rest = [p.name.rsplit(".", 1)[-1] for p in group[1:]]
    return f"{prefix}.{'+'.join([first, *rest])}.{suffix}" if prefix else f"{first}.{suffix}"


def _load(checkpoint: Checkpoint, name: str) -> QuantizedLinear:
    found = checkpoint.linear(name)
    assert found is not None, name
    return found


def _scales(checkpoint: Checkpoint, name: str) -> Array:
    """Weight scales [out, groups] float32, checked."""
    scale = checkpoint.float_tensor(f"{name}.weight_scale")
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ExportError(
            f"{name}.weight_scale: not positive and finite everywhere (rule Q-04). Quantize again."
        )
    return scale


def _int4_weight(
    b: GraphBuilder, group: Sequence[LinearPlan], block: int, piece: Piece
) -> ir.Value:
    """DequantizeLinear of a group's integers [depth, N] beside one another."""
    checkpoint, width = b.weights.checkpoint, sum(p.out_features for p in group)

    def integers() -> Array:
        rows = [piece.columns(_load(checkpoint, p.name).integers) for p in group]
        return np.ascontiguousarray(np.concatenate(rows).T)

    def scale() -> Array:
        return np.concatenate([piece.columns(_scales(checkpoint, p.name)) for p in group]).T

    name, key = (_joint(group, suffix) + piece.suffix for suffix in ("weight", "weight_scale"))
    shape, scales = (piece.depth, width), (piece.depth // block, width)
    return b.op(
        "DequantizeLinear",
        b.constant(name, lazy_int4(shape, integers)),
        b.constant(key, b.weights.lazy(key, scales, scale)),
        axis=0,
        block_size=block,
    )


def weight_split(scales: Array, in_features: int, input_scale: float | None) -> float:
    """s0: the largest power of two not above the largest weight scale for which no GEMM result
    leaves float16.

    The result is at most K * |d| * 127 * s0 with |d| <= 1 (token) or 128 * input_scale (static);
    the bound asks for K * |d| * 128 * s0 <= ``GEMM_LIMIT``. Never below 2^-14, float16's smallest
    normal number.
    """
    largest_input = 1.0 if input_scale is None else 128.0 * input_scale
    bound = GEMM_LIMIT / (in_features * 128.0 * largest_input)
    exponent = math.floor(math.log2(min(float(scales.max()), bound)))
    return float(2.0 ** max(exponent, -14))


def _int8(b: GraphBuilder, x: ir.Value, group: Sequence[LinearPlan]) -> list[ir.Value]:
    """One integer GEMM for the group, then Split."""
    first = group[0]
    if first.kind in ("token", "split"):
        m = _token_maximum(b, x) if first.kind == "token" else _split_maximum(b, first)
        data, scale = b.narrow(b.op("Div", x, m)), 1.0 / 127.0
    else:
        assert first.input_scale is not None
        m, data, scale = None, b.narrow(x), first.input_scale
    product = _int8_product(b, data, scale, group)
    if m is not None:
        product = b.op("Mul", product, m)
    return _parts(b, _bias(b, product, group), group)


def _token_maximum(b: GraphBuilder, x: ir.Value) -> ir.Value:
    """m [1, S, 1] of kind token."""
    largest = b.op("ReduceMax", b.op("Abs", x), b.i64(-1), keepdims=1)
    return b.op("Max", largest, b.scalar(TOKEN_FLOOR))


def _split_maximum(b: GraphBuilder, one: LinearPlan) -> ir.Value:
    """m [1, S, 1] of kind split."""
    assert one.maxima is not None
    if b.image_tokens is None:
        raise ExportError(
            f"{one.name}: its format tells image tokens from text, but graph {b.name} has one kind. "
            "Quantize it as w8a8-static."
        )
    text, image = one.maxima
    return b.op("Where", b.image_tokens, b.scalar(image), b.scalar(text))


def _round_trip(b: GraphBuilder, x: ir.Value, scale: float) -> ir.Value:
    """DequantizeLinear(QuantizeLinear(x)), INT8, per tensor."""
    constants = (b.scalar(scale), b.scalar(0, ir.DataType.INT8))
    return b.op("DequantizeLinear", b.op("QuantizeLinear", x, *constants), *constants)


def _int8_product(
    b: GraphBuilder, x: ir.Value, scale: float, group: Sequence[LinearPlan]
) -> ir.Value:
    """MatMul(DQ(Q(x, scale)), DQ(W, s0)) * c[n]. Pieces are cut before they are quantized: ONNX
    Runtime moves Q across Slice and gets its types wrong.
    """
    checkpoint = b.weights.checkpoint
    sizes = [p.out_features for p in group]
    width, depth = sum(sizes), group[0].in_features

    def scales() -> Array:
        rows = [np.broadcast_to(_scales(checkpoint, p.name)[:, 0], p.out_features) for p in group]
        return np.concatenate(rows)

    s0 = weight_split(scales(), depth, group[0].input_scale)
    channel = b.weights.lazy(
        _joint(group, "weight_channel"), (width,), lambda: scales() / np.float32(s0)
    )

    def product(x: ir.Value, piece: Piece) -> ir.Value:
        data = _round_trip(b, x, scale)

        def integers() -> Array:
            stacked = np.empty((piece.depth, width), np.int8)
            for p, end in zip(group, np.cumsum(sizes), strict=True):
                part = piece.columns(_load(checkpoint, p.name).integers)
                stacked[:, end - p.out_features : end] = part.T
            return stacked

        name = _joint(group, "weight") + piece.suffix
        weight = b.constant(name, lazy_int8((piece.depth, width), integers))
        # Its own zero, not a shared one: ONNX Runtime's pass for processors without VNNI copies the
        # zero point of every weight under a name made from the old one, and stops at the second copy.
        name = _joint(group, "weight_zero_point") + piece.suffix
        zero_point = b.constant(name, ir.Tensor(np.array(0, np.int8)))
        dequantized = b.op("DequantizeLinear", weight, b.scalar(s0), zero_point)
        node = b.op("MatMul", data, dequantized)
        _mark(node, group)
        return node

    whole = summed(b, x, depth, depth * width, 1, 1, product)
    if any(b.overflow.beside(p.name) for p in group):
        whole = b.widen(whole)
    return b.op("Mul", whole, b.constant(_joint(group, "weight_channel"), channel))
