"""Qwen's vision transformer, of Qwen2-VL (Wang et al. 2024), Qwen2.5-VL (Bai et al. 2025) and Qwen3-VL:
patches of one image of any size, 2-D rotary positions, a merger of neighbouring patches.

1. A patch is a row already: the processor wrote it out, so the patch projection is a linear. Patches
   stand in blocks of merge x merge that become one row of features.
2. Row and column of a patch turn half of the frequencies each. Qwen3-VL adds a learned table as well,
   interpolated to the image's grid: four rows of it, weighted.
3. Qwen2.5-VL sorts the merge blocks by window; most layers see one window only, by a mask, and the
   order is undone behind the merger. What depends on the grid alone comes as index tensors.
4. Qwen3-VL's deepstack: the outputs of some layers go through mergers of their own and stand behind
   the features in each row; the decoder adds them behind its first layers.

The mask makes windowed layers cost what full ones cost: [P, P] scores. Batches of padded windows
would save up to a third of the tower at 4,096 patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qvlm_export.attention import full_attention, rotate, segment_mask
from qvlm_export.graph import GraphBuilder
from qvlm_export.ops import activation, layer_norm, rms_norm, split_heads, split_last
from qvlm_export.qdq import heads_linear, linear, linears

# In the modules' code, not in their configs.
EPS = 1e-6


@dataclass(frozen=True)
class QwenVitConfig:
    """Sizes and the parts that differ by generation.

    frames: images that a patch holds one behind the other, in each channel. mlp: the linears of an
    MLP, the last one behind the activation; with three the first gates the second. merger: its norm
    and two linears. window: side of a window in pixels, None for none; full: the layers that see the
    whole image all the same. positions: rows of the learned table, 0 for none.
    deepstack: the layers whose output gets a merger of its own.
    """

    width: int
    heads: int
    layers: int
    channels: int
    frames: int
    patch_side: int
    merge: int
    out_size: int
    act: str
    rms: bool
    mlp: tuple[str, ...]
    merger: tuple[str, str, str]
    window: int | None = None
    full: tuple[int, ...] = ()
    positions: int = 0
    deepstack: tuple[int, ...] = ()
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def patch_size(self) -> int:
        """Numbers in a flattened patch."""
        return self.channels * self.frames * self.patch_side**2

    @property
    def block(self) -> int:
        """Patches of a merge block, one row of features."""
        return self.merge**2

    @property
    def feature_size(self) -> int:
        """Numbers in a row of features."""
        return self.out_size * (1 + len(self.deepstack))


def features(b: GraphBuilder, c: QwenVitConfig, prefix: str) -> ir.Value:
    """Declares the tower's inputs (one image of P patches, G = P / block rows of features); the rows
    [G, feature_size].

    pixel_values F [P, patch_size], patch_positions int64 [P, 2]; window_index and window_inverse
    int64 [G] and window_segments int64 [P] with windows; position_index int64 [4, P] and
    position_weights F [4, P] with a learned table.
    """
    pixels = b.input("pixel_values", b.float_type, ("P", c.patch_size))
    grid = b.input("patch_positions", ir.DataType.INT64, ("P", 2))
    with b.scope("embeddings"):
        x = linear(b, b.op("Unsqueeze", pixels, b.i64(0)), f"{prefix}.patch_embed.proj")
        if c.positions:
            x = b.op("Add", x, _learned_positions(b, c, f"{prefix}.pos_embed"))
    order = mask = None
    if c.window is not None:
        order = b.input("window_index", ir.DataType.INT64, ("G",))
        segments = b.input("window_segments", ir.DataType.INT64, ("P",))
        with b.scope("windows"):
            x = b.op("Unsqueeze", _reordered(b, x, order, c.block, c.width), b.i64(0))
            grid = _reordered(b, grid, order, c.block, 2)
            mask = segment_mask(b, segments)
    with b.scope("positions"):
        turn = _rotary(b, c, grid)
    parts: list[ir.Value] = []
    for i in range(c.layers):
        with b.scope(f"layers.{i}"):
            x = _layer(b, c, f"{prefix}.blocks.{i}", x, turn, None if i in c.full else mask)
        if i in c.deepstack:
            number = c.deepstack.index(i)
            with b.scope(f"deepstack.{number}"):
                parts.append(_merged(b, c, f"{prefix}.deepstack_merger_list.{number}", x, True))
    with b.scope("merger"):
        x = _merged(b, c, f"{prefix}.merger", x, False)
        x = b.op("Concat", x, *parts, axis=-1) if parts else x
        x = b.op("Reshape", x, b.i64(-1, c.feature_size))
        if order is not None:
            inverse = b.input("window_inverse", ir.DataType.INT64, ("G",))
            x = b.op("Gather", x, inverse, axis=0)
    return x


def _learned_positions(b: GraphBuilder, c: QwenVitConfig, name: str) -> ir.Value:
    """[P, width]: the four nearest rows of the table, weighted."""
    index = b.input("position_index", ir.DataType.INT64, (4, "P"))
    weights = b.input("position_weights", b.float_type, (4, "P"))
    rows = b.op("Gather", b.parameter(f"{name}.weight", (c.positions, c.width)), index, axis=0)
    weighted = b.op("Mul", rows, b.op("Unsqueeze", weights, b.i64(-1)))
    return b.op("ReduceSum", weighted, b.i64(0), keepdims=0)


def _reordered(b: GraphBuilder, x: ir.Value, order: ir.Value, block: int, width: int) -> ir.Value:
    """x [P, width] or [1, P, width] with its blocks of ``block`` rows in this order, [P, width]."""
    blocks = b.op("Reshape", x, b.i64(-1, block * width))
    return b.op("Reshape", b.op("Gather", blocks, order, axis=0), b.i64(-1, width))


def _rotary(b: GraphBuilder, c: QwenVitConfig, grid: ir.Value) -> tuple[ir.Value, ir.Value]:
    """cos and sin [1, P, 1, D/2] of patches at ``grid`` [P, 2]: D/4 frequencies turn with the row,
    D/4 with the column.

    Computed in float32, as transformers does: a table would bound the sides of an image.
    """
    count = c.head_dim // 4
    exponents = np.arange(0, 2 * count, 2, dtype=np.float32) / np.float32(2 * count)
    frequencies = (1.0 / np.float32(c.rope_theta) ** exponents).astype(np.float32)
    sides = b.op("Cast", b.op("Unsqueeze", grid, b.i64(2)), to=int(ir.DataType.FLOAT))
    angles = b.op("Mul", sides, b.constant("vision.frequencies", ir.Tensor(frequencies)))
    angles = b.op("Reshape", angles, b.i64(1, -1, 1, 2 * count))
    cos, sin = b.op("Cos", angles), b.op("Sin", angles)
    if b.float_type == ir.DataType.FLOAT:
        return cos, sin
    to = int(b.float_type)
    return b.op("Cast", cos, to=to), b.op("Cast", sin, to=to)


def _norm(b: GraphBuilder, c: QwenVitConfig, x: ir.Value, name: str, width: int) -> ir.Value:
    return (rms_norm if c.rms else layer_norm)(b, x, name, width, EPS)


def _layer(
    b: GraphBuilder,
    c: QwenVitConfig,
    prefix: str,
    x: ir.Value,
    turn: tuple[ir.Value, ir.Value],
    mask: ir.Value | None,
) -> ir.Value:
    x = b.stream(x, prefix)
    h = _norm(b, c, x, f"{prefix}.norm1", c.width)
    with b.scope("attn"):
        qkv = split_last(b, b.narrow(linear(b, h, f"{prefix}.attn.qkv")), [c.width] * 3)
        q, k, v = (split_heads(b, part, c.heads, c.head_dim) for part in qkv)
        q, k = (rotate(b, part, *turn, c.head_dim) for part in (q, k))
        context = full_attention(b, q, k, v, c.head_dim, mask)
        x = b.op("Add", x, heads_linear(b, context, f"{prefix}.attn.proj"))
    h = _norm(b, c, x, f"{prefix}.norm2", c.width)
    with b.scope("mlp"):
        *first, last = (f"{prefix}.mlp.{name}" for name in c.mlp)
        gate, *up = linears(b, h, first)
        inner = activation(b, gate, c.act, prefix)
        inner = b.op("Mul", inner, up[0]) if up else inner
        return b.op("Add", x, linear(b, inner, last))


def _merged(b: GraphBuilder, c: QwenVitConfig, prefix: str, x: ir.Value, joined: bool) -> ir.Value:
    """x [1, P, width] to [1, G, out_size]. ``joined``: the norm runs over whole blocks."""
    norm, first, second = (f"{prefix}.{name}" for name in c.merger)
    width = c.block * c.width
    if joined:
        x = _norm(b, c, b.op("Reshape", x, b.i64(1, -1, width)), norm, width)
    else:
        x = b.op("Reshape", _norm(b, c, x, norm, c.width), b.i64(1, -1, width))
    return linear(b, activation(b, linear(b, x, first), "gelu", prefix), second)
