"""Which of ``qdq``'s kinds each linear of a checkpoint becomes on a target, and what no target can run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm.recipe import named_format
from qvlm_export.graph import GraphBuilder

Kind = Literal["float", "int4", "token", "split", "static"]
INT8_KINDS = ("token", "split", "static")
# A token table's: rows are looked up, not multiplied (``qdq.lookup``).
TABLE_FORMAT = "w8a16"
_SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126}


@dataclass(frozen=True)
class LinearPlan:
    """One linear as the graph will have it: weight [out_features, in_features] of the
    checkpoint. maxima: m of text and of image tokens, kind split only. joined: kind int4, whether
    the target takes several as one.
    """

    name: str
    kind: Kind
    out_features: int
    in_features: int
    input_scale: float | None = None
    block: int | None = None
    maxima: tuple[float, float] | None = None
    joined: bool = False

    @property
    def merge_key(self) -> tuple[object, ...] | None:
        """Linears of equal key that read the same tensor become one GEMM."""
        if self.kind in INT8_KINDS:
            return (self.kind, self.input_scale, self.maxima)
        return (self.kind, self.block) if self.joined else None


def check_deployable(checkpoint: Checkpoint) -> None:
    """ExportError naming the first linear whose format no engine runs."""
    for name, entry in checkpoint.linears.items():
        if entry["format"] != TABLE_FORMAT:
            _kind(name, entry["format"])


def _kind(name: str, format_name: str) -> Kind:
    format_ = named_format(format_name)
    weights, activations = format_.weights, format_.activations
    fits_int4 = weights is not None and weights.bits == 4 and weights.granularity == "group"
    fits_int8 = weights is not None and weights.bits == 8 and weights.granularity != "group"
    if format_.deployable and weights is not None and weights.symmetric:
        if fits_int4 and activations is None:
            return "int4"
        if (
            fits_int8
            and activations is not None
            and activations.bits == 8
            and activations.symmetric
        ):
            if activations.granularity == "token":
                return "token"
            if activations.granularity == "modality":
                return "split"
            if activations.granularity == "tensor":
                return "static"
    raise ExportError(
        f"{name}: format {format_name!r} has no engine, it is simulated in torch only. "
        "Quantize with a recipe of w4a16, w4a16-g64, w8a8, w8a8-static or w8a8-split."
    )


def has_linear(checkpoint: Checkpoint, name: str) -> bool:
    """True if the checkpoint stores linear ``name``, quantized or float."""
    return name in checkpoint.linears or f"{name}.weight" in checkpoint


def plan_linear(b: GraphBuilder, name: str) -> LinearPlan:
    """How linear ``name`` is lowered; ExportError for what the target cannot run."""
    checkpoint = b.weights.checkpoint
    if name not in checkpoint.linears:
        # A convolution's kernel, applied to patches that are rows already, is a matrix too.
        out_features, *rest = b.weights.shape(f"{name}.weight")
        return LinearPlan(name, "float", out_features, math.prod(rest))
    kind = _kind(name, checkpoint.linears[name]["format"])
    packed = f"{name}.weight_packed"
    shape = checkpoint.tensor(f"{name}.weight_shape") if packed in checkpoint else None
    sizes = b.weights.shape(f"{name}.weight") if shape is None else tuple(int(n) for n in shape)
    out_features, in_features = sizes
    if kind == "int4":
        block = _int4_block(b, name, out_features, in_features)
        joined = b.target.int4_joined
        return LinearPlan(name, kind, out_features, in_features, block=block, joined=joined)
    if kind == "split":
        text, image = (_checked_scale(b, name, 127.0 * s) for s in _static_scales(b, name, 2))
        return LinearPlan(name, kind, out_features, in_features, maxima=(text, image))
    scale = _checked_scale(b, name, _static_scales(b, name, 1)[0]) if kind == "static" else None
    return LinearPlan(name, kind, out_features, in_features, scale)


def _int4_block(b: GraphBuilder, name: str, out_features: int, in_features: int) -> int:
    groups = b.weights.shape(f"{name}.weight_scale")[1]
    if in_features % groups:
        raise ExportError(f"{name}: {groups} scale groups do not divide in_features {in_features}")
    if groups < b.target.int4_blocks:
        raise ExportError(
            f"{name}: {groups} INT4 block along in_features {in_features}, "
            f"target {b.target.name} needs at least {b.target.int4_blocks} (rule W-05). "
            "Use w4a16-g64 or keep this layer in float."
        )
    if out_features % 2:
        raise ExportError(
            f"{name}: out_features {out_features} is odd, INT4 stores pairs (rule W-01). "
            "Keep this layer in float."
        )
    if (block := in_features // groups) not in b.target.int4_sizes:
        known = ", ".join(map(str, b.target.int4_sizes))
        raise ExportError(
            f"{name}: INT4 blocks of {block}, target {b.target.name} takes {known} (rule W-04). "
            "Quantize with w4a16 or w4a16-g64."
        )
    return block


def _static_scales(b: GraphBuilder, name: str, count: int) -> list[float]:
    """The stored input scales, ``count`` of them."""
    key = f"{name}.input_scale"
    if key not in b.weights:
        raise ExportError(f"{name}: static activations without {key}. Quantize again.")
    zero = f"{name}.input_zero_point"
    if zero in b.weights and np.any(b.weights.checkpoint.tensor(zero)):
        raise ExportError(
            f"{name}: non-zero input zero point; TensorRT takes symmetric INT8 only (rule Q-01)"
        )
    values = b.weights.checkpoint.float_tensor(key)
    if values.size != count:
        raise ExportError(f"{name}: {values.size} input scales, expected {count}. Quantize again.")
    return [float(value) for value in values.reshape(-1)]


def _checked_scale(b: GraphBuilder, name: str, value: float) -> float:
    """The scale as the graph's float type holds it."""
    type_ = b.float_type.numpy()
    stored = float(np.array(value).astype(type_)) if abs(value) < math.inf else math.nan
    if not _SMALLEST_NORMAL[b.weights.dtype] <= stored < math.inf:
        raise ExportError(
            f"{name}: input scale {value}, "
            f"expected one normal positive {b.weights.dtype} number. "
            "Calibrate again, or use format w8a8."
        )
    return stored
