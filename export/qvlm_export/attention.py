"""Attention over a key/value cache, and without one, as sequences that compile to the fewest
kernels.

Causal masks compare cache slots with the slot of each query row, so stale rows and padding behind
the valid length are never seen. Scores of masked slots get the most negative finite number: softmax
gives them exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from qvlm_export.graph import Dims, GraphBuilder
from qvlm_export.ops import heads_first
from qvlm_runtime.manifest import CacheForm

# Finite, so that a Sub or a Cast downstream makes no NaN; far below any score.
MASKED = {ir.DataType.FLOAT: -1e30, ir.DataType.BFLOAT16: -1e30, ir.DataType.FLOAT16: -65504.0}


@dataclass(frozen=True)
class HeadShape:
    """Query heads, key/value heads and head size D."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Places:
    """Positions of a decoder's rows, int64 [1, S], that turn nothing: learned ones are in the hidden
    state already.
    """

    position_ids: ir.Value


@dataclass(frozen=True)
class Rotary(Places):
    """Rotary positions of a decoder's rows.

    cos and sin: ``ops.rope_tables``. position_ids: int64 [1, S], or [3, S] with M-RoPE, where
    frequency i takes its position from row axes[i] and the tables are flat.
    """

    cos: ir.Value
    sin: ir.Value
    axes: tuple[int, ...] | None = None

    def factors(self, b: GraphBuilder) -> tuple[ir.Value, ir.Value]:
        """cos and sin of each row, each [1, S, 1, D/2]."""
        if self.axes is None:
            places = b.op("Unsqueeze", self.position_ids, b.i64(2))
        else:
            # A place for each number, in the final shape: a Gather that gives it is part of the
            # attention kernel. GatherElements, or rows chosen by Where, are two more in each layer.
            count = len(self.axes)
            rows = b.op("Transpose", b.op("Gather", self.position_ids, b.i64(*self.axes), axis=0))
            places = b.op("Add", b.op("Mul", rows, b.i64(count)), b.i64(*range(count)))
            places = b.op("Reshape", places, b.i64(1, -1, 1, count))
        cos, sin = (b.op("Gather", table, places, axis=0) for table in (self.cos, self.sin))
        return cos, sin


class CausalAttention(Protocol):
    """One instance per decoder graph; ``layer`` once per decoder layer."""

    def layer(self, index: int, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """q [1, S, heads, D], k and v [1, S, kv_heads, D] before rope, to [1, S, heads, D]."""


def causal_attention(
    b: GraphBuilder, heads: HeadShape, places: Places, positions: int
) -> CausalAttention:
    """The target's cache form, for up to ``positions`` rows; declares its inputs."""
    if b.target.attention_operator:
        return StaticAttention(b, heads, places, positions)
    kinds: dict[CacheForm, type[ScatterAttention | GrownAttention | AppendAttention]] = {
        "scatter": ScatterAttention,
        "grown": GrownAttention,
        "append": AppendAttention,
    }
    return kinds[b.target.cache](b, heads, places, positions)


def rotate(b: GraphBuilder, x: ir.Value, cos: ir.Value, sin: ir.Value, head_dim: int) -> ir.Value:
    """x [1, S, heads, D] rotated by cos and sin [1, S, 1, D/2], half form, in primitives."""
    half = head_dim // 2
    first = b.op("Slice", x, b.i64(0), b.i64(half), b.i64(-1))
    second = b.op("Slice", x, b.i64(half), b.i64(head_dim), b.i64(-1))
    low = b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin))
    high = b.op("Add", b.op("Mul", second, cos), b.op("Mul", first, sin))
    return b.op("Concat", low, high, axis=-1)


def full_attention(
    b: GraphBuilder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    head_dim: int,
    mask: ir.Value | None = None,
) -> ir.Value:
    """Attention of all rows to all, all [N, S, heads, D]: the pattern that becomes one fused kernel.

    mask: added to the scores, broadcast to [N, heads, S, S].
    """
    scaled = b.op("Mul", heads_first(b, q), b.scalar(head_dim**-0.5))
    keys = b.op("Transpose", heads_first(b, k), perm=[0, 1, 3, 2])
    scores = b.op("MatMul", scaled, keys)
    if mask is not None:
        scores = b.op("Add", scores, mask)
    weights = b.op("Softmax", scores, axis=-1)
    return heads_first(b, b.op("MatMul", weights, heads_first(b, v)))


def _turned(b: GraphBuilder, x: ir.Value) -> ir.Value:
    """The last two axes exchanged."""
    return b.op("Transpose", x, perm=[0, 1, 3, 2])


def segment_mask(b: GraphBuilder, segments: ir.Value) -> ir.Value:
    """[1, 1, S, S] for ``full_attention``: rows see those of their own segment; segments int64
    [S].
    """
    column = b.op("Unsqueeze", segments, b.i64(0, 1, 3))
    same = b.op("Equal", column, b.op("Unsqueeze", segments, b.i64(0, 1, 2)))
    return b.op("Where", same, b.scalar(0.0), b.scalar(MASKED[b.float_type]))


def _slots(b: GraphBuilder, positions: int) -> ir.Value:
    """0, 1, ... positions-1, to be sliced: cheaper than Range on every consumer."""
    return b.constant("slots", ir.Tensor(np.arange(positions, dtype=np.int64)))


def _mask(b: GraphBuilder, columns: ir.Value, rows: ir.Value) -> ir.Value:
    """[1, 1, S, T]: 0 where columns [T] <= rows [1, 1, S, 1]."""
    visible = b.op("LessOrEqual", columns, rows)
    return b.op("Where", visible, b.scalar(0.0), b.scalar(MASKED[b.float_type]))


class AppendAttention:
    """TensorRT's form: past [1, P, kv_heads, D] comes in, only the new rows [1, S, kv_heads, D] go
    out.

    Sequence-major, so that with batch 1 the past is a prefix of one buffer and the new rows land
    behind it without a copy. One decode kernel does rope, append and grouped attention, if K/V are
    repeated by Expand and cos/sin come straight out of Gather in their final shape. Column t of the
    mask is slot t; the rows' slots are the last S.
    """

    def __init__(self, b: GraphBuilder, heads: HeadShape, places: Places, positions: int) -> None:
        self.b, self.heads, self.places, self.positions = b, heads, places, positions
        self.factors = places.factors(b) if isinstance(places, Rotary) else None
        self.mask: ir.Value | None = None

    def layer(self, index: int, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """See ``CausalAttention``."""
        b, h = self.b, self.heads
        if self.factors is not None:
            cos, sin = self.factors
            q, k = (rotate(b, x, cos, sin, h.head_dim) for x in (q, k))
        keys, values = (
            self._join(f"{name}_{index}", new) for name, new in (("key", k), ("value", v))
        )
        if self.mask is None:  # needs T, which the first layer's keys tell
            # Not Shape's start and end: older importers do not read these attributes.
            length = b.op("Gather", b.op("Shape", keys), b.i64(2), axis=0)
            slots = _slots(b, self.positions)
            columns = b.op("Slice", slots, b.i64(0), length, b.i64(0))
            self.mask = _mask(b, columns, self._rows(slots, length))
        query = b.op("Mul", heads_first(b, q), b.scalar(h.head_dim**-0.5))
        keys, values = self._repeat(keys), self._repeat(values)
        scores = b.op("MatMul", query, b.op("Transpose", keys, perm=[0, 1, 3, 2]))
        weights = b.op("Softmax", b.op("Add", scores, self.mask), axis=-1)
        return heads_first(b, b.op("MatMul", weights, values))

    def _rows(self, slots: ir.Value, length: ir.Value) -> ir.Value:
        """Slots [1, 1, S, 1] of the query rows. One position per row is the slot itself; M-RoPE's
        positions are not, there the last S of ``length`` are taken.
        """
        b, ids = self.b, self.places.position_ids
        if not isinstance(self.places, Rotary) or self.places.axes is None:
            return b.op("Unsqueeze", ids, b.i64(1, 3))
        first = b.op("Sub", length, b.op("Gather", b.op("Shape", ids), b.i64(1), axis=0))
        rows = b.op("Slice", slots, first, length, b.i64(0))
        return b.op("Unsqueeze", rows, b.i64(0, 1, 3))

    def _join(self, name: str, new: ir.Value) -> ir.Value:
        b, tail = self.b, (self.heads.kv_heads, self.heads.head_dim)
        past = b.input(f"past_{name}", b.float_type, (1, "P", *tail))
        b.output(new, f"present_{name}", b.float_type, (1, "S", *tail))
        return heads_first(b, b.op("Concat", past, new, axis=1))

    def _repeat(self, x: ir.Value) -> ir.Value:
        b, h = self.b, self.heads
        if h.group == 1:
            return x
        wide = b.op("Expand", b.op("Unsqueeze", x, b.i64(2)), b.i64(1, 1, h.group, 1, 1))
        return b.op("Reshape", wide, b.i64(0, h.heads, -1, h.head_dim))


class _InPlace:
    """What both in-place forms share: rotation, TensorScatter-24 into a buffer [1, kv_heads, C, D],
    and the slot of each query row, which is where it is written.
    """

    def __init__(
        self,
        b: GraphBuilder,
        heads: HeadShape,
        places: Places,
        rows: int | str,
    ) -> None:
        self.b, self.heads, self.places = b, heads, places
        self._factors: tuple[ir.Value, ir.Value] | None = None
        self.cache_shape = (1, heads.kv_heads, rows, heads.head_dim)
        self.write_index = b.input("write_index", ir.DataType.INT64, (1,))
        self.kv_len = b.input("kv_len", ir.DataType.INT64, (1,))

    def rows(self, slots: ir.Value) -> ir.Value:
        """Slots [1, 1, S, 1] of the query rows: the last S of kv_len."""
        b = self.b
        count = b.op("Shape", self.places.position_ids, start=-1)
        first = b.op("Sub", self.kv_len, count)
        rows = b.op("Add", b.op("Slice", slots, b.i64(0), count, b.i64(0)), first)
        return b.op("Unsqueeze", rows, b.i64(0, 1, 3))

    def rope(self, x: ir.Value) -> ir.Value:
        """[1, S, heads, D] to [1, heads, S, D], rotated where positions are; RotaryEmbedding-23,
        half form (interleaved=0).
        """
        b, r = self.b, self.places
        if not isinstance(r, Rotary):
            return heads_first(b, x)
        if r.axes is None:
            return b.op("RotaryEmbedding", heads_first(b, x), r.cos, r.sin, r.position_ids)
        if self._factors is None:
            squeezed = (b.op("Squeeze", factor, b.i64(2)) for factor in r.factors(b))
            cos, sin = squeezed
            self._factors = cos, sin
        return b.op("RotaryEmbedding", heads_first(b, x), *self._factors)

    def scatter(
        self, name: str, new: ir.Value, shape: Dims | None = None, axis: int = -2
    ) -> ir.Value:
        """Write the new rows [1, kv_heads, S, D], or columns with ``axis`` -1; the whole buffer, of
        ``shape`` or [1, kv_heads, C, D], is the output ``present_name``.
        """
        b, shape = self.b, shape or self.cache_shape
        past = b.input(f"past_{name}", b.float_type, shape)
        whole = b.op("TensorScatter", past, new, self.write_index, axis=axis, mode="linear")
        b.output(whole, f"present_{name}", b.float_type, shape)
        return whole


class ScatterAttention(_InPlace):
    """ONNX Runtime's form on a GPU: a buffer of any length C, read up to kv_len.

    The Slice matters: attention over the whole buffer costs 3x at 1,000 valid rows of 4,096.
    Grouped queries are rows of one product per key/value head, so K and V are read once and never
    repeated.
    """

    def __init__(
        self,
        b: GraphBuilder,
        heads: HeadShape,
        places: Places,
        positions: int,
    ) -> None:
        super().__init__(b, heads, places, "C")
        slots = _slots(b, positions)
        columns = b.op("Slice", slots, b.i64(0), self.kv_len, b.i64(0))
        mask = _mask(b, columns, self.rows(slots))
        self.mask = mask if heads.group == 1 else b.op("Concat", *[mask] * heads.group, axis=2)

    def layer(self, index: int, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """See ``CausalAttention``."""
        b, h = self.b, self.heads
        keys = self._valid(self.scatter(f"key_{index}", self.rope(k)))
        values = self._valid(self.scatter(f"value_{index}", heads_first(b, v)))
        query = b.op("Mul", self.rope(q), b.scalar(h.head_dim**-0.5))
        rows = b.op("Reshape", query, b.i64(0, h.kv_heads, -1, h.head_dim))
        scores = b.op("MatMul", rows, b.op("Transpose", keys, perm=[0, 1, 3, 2]))
        weights = b.op("Softmax", b.op("Add", scores, self.mask), axis=-1)
        out = b.op("Reshape", b.op("MatMul", weights, values), b.i64(0, h.heads, -1, h.head_dim))
        return heads_first(b, out)

    def _valid(self, whole: ir.Value) -> ir.Value:
        return self.b.op("Slice", whole, self.b.i64(0), self.kv_len, self.b.i64(2))


class GrownAttention(_InPlace):
    """ONNX Runtime's form on a CPU: all C rows of the buffer are read, and the runtime keeps C at
    most a step above what is valid.

    A Slice of the valid rows would copy them. Values lie as columns, [1, kv_heads, D, C]: a decode
    step then multiplies both buffers from the left, where the CPU's product reads a matrix as it
    lies; what stands on the right it packs first, at the price of the product itself. Many query
    rows pay for packing, and would pay more for turning their scores round, so each graph has both
    ways and a run takes one.
    """

    def __init__(self, b: GraphBuilder, heads: HeadShape, places: Places, positions: int) -> None:
        super().__init__(b, heads, places, "C")
        self.value_shape = (1, heads.kv_heads, heads.head_dim, "C")
        self.slots = _slots(b, positions)
        self.masks: tuple[ir.Value, ir.Value] | None = None
        self.single = b.op("Equal", b.op("Shape", places.position_ids, start=-1), b.i64(1))

    def layer(self, index: int, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """See ``CausalAttention``."""
        b, h = self.b, self.heads
        keys = self.scatter(f"key_{index}", self.rope(k))
        columns = b.op("Transpose", v, perm=[0, 2, 3, 1])
        values = self.scatter(f"value_{index}", columns, self.value_shape, -1)
        if self.masks is None:  # needs C, which the first layer's keys tell
            visible = b.op("Slice", self.slots, b.i64(0), b.op("Shape", keys, start=2, end=3))
            self.masks = self._masks(_mask(b, visible, self.rows(self.slots)))
        across, down = self.masks
        query = b.op("Mul", self.rope(q), b.scalar(h.head_dim**-0.5))
        rows = b.op("Reshape", query, b.i64(0, h.kv_heads, -1, h.head_dim))

        def many() -> ir.Value:
            scores = b.op("MatMul", rows, _turned(b, keys))
            weights = b.op("Softmax", b.op("Add", scores, across), axis=-1)
            return b.op("MatMul", weights, _turned(b, values))

        def one() -> ir.Value:
            scores = b.op("MatMul", keys, _turned(b, rows))
            weights = b.op("Softmax", b.op("Add", scores, down), axis=2)
            return _turned(b, b.op("MatMul", values, weights))

        # A single row per head is a product of a vector, which packs nothing.
        mixed = many() if h.group == 1 else b.choose(self.single, one, many)
        return heads_first(b, b.op("Reshape", mixed, b.i64(0, h.heads, -1, h.head_dim)))

    def _masks(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Mask [1, 1, S, C] for scores [1, kv_heads, group * S, C], and for the turned scores of a
        single row: of their inner shape, as adding a column to a matrix is slow.
        """
        b, group = self.b, self.heads.group
        if group == 1:
            return mask, mask
        across = b.op("Concat", *[mask] * group, axis=2)
        unused = b.scalar(0.0)  # in a run of many rows
        down = b.choose(self.single, lambda: _turned(b, across), lambda: b.op("Identity", unused))
        return across, down


class StaticAttention(_InPlace):
    """TensorRT's in-place form, 10.15 and later: a buffer of exactly ``positions`` rows, and
    Attention-23 over all of it.

    Every shape and address of a decode step is fixed, which a CUDA graph wants. It reads the whole
    buffer at every step and compiles to more kernels than ``AppendAttention``, so it is a variant
    and no default. The mask hides what is behind kv_len: is_causal would align the upper left
    corner.
    """

    def __init__(
        self,
        b: GraphBuilder,
        heads: HeadShape,
        places: Places,
        positions: int,
    ) -> None:
        super().__init__(b, heads, places, positions)
        slots = _slots(b, positions)
        self.mask = _mask(b, slots, self.rows(slots))

    def layer(self, index: int, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """See ``CausalAttention``."""
        b = self.b
        keys = self.scatter(f"key_{index}", self.rope(k))
        values = self.scatter(f"value_{index}", heads_first(b, v))
        return heads_first(b, b.op("Attention", self.rope(q), keys, values, self.mask))
