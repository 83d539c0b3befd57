"""The vocabulary of graph building: norms, activations, embedding merge, heads, rope tables.

Each function lowers itself for the builder's target. Linears are in ``qdq.py``, attention in
``attention.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qvlm.errors import ExportError
from qvlm_export.graph import GraphBuilder
from qvlm_export.weights import Array

INT64_MAX = 2**63 - 1


def layer_norm(b: GraphBuilder, x: ir.Value, name: str, width: int, eps: float) -> ir.Value:
    """LayerNormalization-17 over the last axis, scale and bias both given (rule O-04), reduced in
    float32.
    """
    x = _read(b, x, name)
    scale, bias = b.parameter(f"{name}.weight", (width,)), b.parameter(f"{name}.bias", (width,))
    return b.held(b.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=eps), name)


def rms_norm(b: GraphBuilder, x: ir.Value, name: str, width: int, eps: float) -> ir.Value:
    """x / sqrt(mean(x^2) + eps) * g, reduced in float32: RMSNormalization-23 or its primitives (one
    kernel both).
    """
    x = _read(b, x, name)
    gain = b.parameter(f"{name}.weight", (width,))
    if b.target.native_ops:
        normal = b.op("RMSNormalization", x, gain, axis=-1, epsilon=eps, stash_type=1)
        return b.held(normal, name)
    cast = b.float_type != ir.DataType.FLOAT and not b.is_wide(x)
    c = b.op("Cast", x, to=int(ir.DataType.FLOAT)) if cast else x
    mean = b.op("ReduceMean", b.op("Mul", c, c), b.i64(-1), keepdims=1)
    root = b.op("Sqrt", b.op("Add", mean, b.scalar(eps, ir.DataType.FLOAT)))
    normal = b.op("Div", c, root)
    if cast:
        normal = b.op("Cast", normal, to=int(b.float_type))
    elif not b.overflow.row(name, "output"):
        normal = b.narrow(normal)
    return b.held(b.op("Mul", normal, gain), name)


def _read(b: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """What norm ``name`` reads: float32 if it gives what float16 does not hold."""
    b.expect_held(x, name)
    return b.widen(x) if b.overflow.row(name, "output") else x


def activation(b: GraphBuilder, x: ir.Value, kind: str, where: str) -> ir.Value:
    """An elementwise function by transformers' name; ExportError naming ``where`` for another."""
    if kind == "gelu":
        return b.op("Gelu", x)
    if kind in ("gelu_pytorch_tanh", "gelu_new"):
        return b.op("Gelu", x, approximate="tanh")
    if kind == "quick_gelu":
        return b.op("Mul", x, b.op("Sigmoid", b.op("Mul", x, b.scalar(1.702))))
    if kind in ("silu", "swish"):
        return b.op("Mul", x, b.op("Sigmoid", x))
    if kind == "relu":
        return b.op("Relu", x)
    raise ExportError(
        f"{where}: activation {kind!r}, "
        "expected gelu, gelu_pytorch_tanh, gelu_new, quick_gelu, silu or relu"
    )


def embedding_merge(
    b: GraphBuilder,
    text: ir.Value,
    image_index: ir.Value,
    image_features: ir.Value,
    sizes: Sequence[int],
) -> tuple[ir.Value, list[ir.Value]]:
    """Token embeddings ``text`` [1, S, H]; where image_index >= 0 the first H numbers of that row of
    image_features [M, sum of sizes]. The row's further parts come apart, [1, S, size] and 0 on text.

    One kernel together with the first norm. Text tokens read row 0 and discard it, so M >= 1 is
    needed. Tells the builder which tokens are image tokens.
    """
    image = b.op("Gather", image_features, b.op("Max", image_index, b.i64(0)), axis=0)
    is_image = b.op("Unsqueeze", b.op("GreaterOrEqual", image_index, b.i64(0)), b.i64(-1))
    b.image_tokens = is_image
    first, *rest = [image] if len(sizes) == 1 else split_last(b, image, sizes)
    further = [b.op("Where", is_image, part, b.scalar(0.0)) for part in rest]
    return b.op("Where", is_image, first, text), further


def split_last(b: GraphBuilder, x: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
    """x [..., sum of sizes] cut along its last axis."""
    return b.op_many("Split", [x, b.i64(*sizes)], len(sizes), axis=-1)


def last_position(b: GraphBuilder, x: ir.Value) -> ir.Value:
    """[1, S, H] to [1, 1, H]. Before the final norm: behind it the norm would run over all S
    rows.
    """
    return b.op("Slice", x, b.i64(-1), b.i64(INT64_MAX), b.i64(1))


def split_heads(b: GraphBuilder, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """[1, S, heads * D] to [1, S, heads, D]."""
    return b.op("Reshape", x, b.i64(0, 0, heads, head_dim))


def heads_first(b: GraphBuilder, x: ir.Value) -> ir.Value:
    """[1, S, heads, D] to [1, heads, S, D], and back."""
    return b.op("Transpose", x, perm=[0, 2, 1, 3])


def rope_frequencies(parameters: Mapping[str, Any], head_dim: int, where: str) -> Array:
    """Angular frequencies [D/2] float64 of rotary embeddings (Su et al. 2021) for transformers'
    ``rope_parameters``.

    rope_type "default", "linear" (divided by factor) or "llama3" (Llama 3.1: wavelengths above
    original/low_freq_factor divided by factor, a ramp down to original/high_freq_factor).
    ExportError otherwise.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    kind = "default" if kind == "mrope" else kind  # the older name: ``rope_axes`` reads the rest
    if float(parameters.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ExportError(f"{where}: partial_rotary_factor is not supported")
    try:
        base = float(parameters["rope_theta"])
        frequencies = base ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if kind == "default":
            return frequencies
        factor = float(parameters["factor"])
        if kind == "linear":
            return frequencies / factor
        if kind == "llama3":
            low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
            original = float(parameters["original_max_position_embeddings"])
            ramp = (original * frequencies / (2 * math.pi) - low) / (high - low)
            keep = np.clip(ramp, 0.0, 1.0)
            return (1 - keep) * frequencies / factor + keep * frequencies
    except KeyError as error:
        raise ExportError(f"{where}: rope_type {kind!r} without key {error}") from error
    raise ExportError(f"{where}: rope_type {kind!r}, expected default, linear or llama3")


def rope_axes(parameters: Mapping[str, Any], head_dim: int, where: str) -> tuple[int, ...] | None:
    """M-RoPE (Wang et al. 2024, Qwen2-VL): which of the position's axes (0 time, 1 row, 2 column)
    each of the D/2 frequencies turns with; None without ``mrope_section``.

    mrope_section counts the frequencies of each axis: in that order, or with ``mrope_interleaved``
    time, row, column in turn, where axes with fewer leave the rest to time. ExportError if the
    counts are not three that sum to D/2.
    """
    section = parameters.get("mrope_section")
    if section is None:
        return None
    counts = [int(n) for n in section]
    if len(counts) != 3 or sum(counts) != head_dim // 2:
        raise ExportError(
            f"{where}: mrope_section is {section}, expected three counts that sum to {head_dim // 2}"
        )
    if not parameters.get("mrope_interleaved"):
        return tuple(axis for axis, count in enumerate(counts) for _ in range(count))
    axes = [0] * sum(counts)
    for axis in (1, 2):
        for i in range(axis, min(3 * counts[axis], len(axes)), 3):
            axes[i] = axis
    return tuple(axes)


def rope_tables(
    b: GraphBuilder, frequencies: Array, positions: int, flat: bool = False
) -> tuple[ir.Value, ir.Value]:
    """cos and sin, F [positions, D/2] or ``flat`` [positions * D/2], rounded once from float64."""
    whole = (positions, len(frequencies))
    shape = (math.prod(whole),) if flat else whole

    def angles() -> Array:
        # In float32, as transformers forms them: a model's positions are what it was trained with.
        narrow = frequencies.astype(np.float32)
        return np.outer(np.arange(positions, dtype=np.float32), narrow).astype(np.float64)

    # float64 must survive up to the one rounding, so the tables do not go through float32 first.
    cos = b.weights.lazy("rope.cos", shape, lambda: np.cos(angles()).astype(b.float_type.numpy()))
    sin = b.weights.lazy("rope.sin", shape, lambda: np.sin(angles()).astype(b.float_type.numpy()))
    return b.constant("rope.cos", cos), b.constant("rope.sin", sin)
