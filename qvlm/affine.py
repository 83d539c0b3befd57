"""Uniform quantization of weights and activations in torch: the arithmetic every method shares. No model, no driver.

A weight [out, in] is cut into groups of consecutive input columns; each group has a scale (and a zero point if the
scheme is asymmetric). Value of an integer: ``(integer - zero_point) * scale``. Scales are rounded to float16 BEFORE
integers are computed, so that an engine that stores float16 scales and this simulation share one number.

Every function is differentiable: rounding passes the gradient straight through (its value is still exactly the
rounded one), clamping passes it inside the range. Without gradients nothing of that costs anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvlm.errors import CheckpointError
from qvlm.recipe import ActivationScheme, WeightScheme

# Smallest normal float16. TensorRT rule Q-04: a scale is positive, finite and not subnormal in float16.
SMALLEST_SCALE = 2.0**-14
# The token-normalised form divides by at least this much, so that an all-zero token stays zero.
SMALLEST_TOKEN_MAXIMUM = 1e-4


class _Round(torch.autograd.Function):
    """Round half to even; identity gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Float16(torch.autograd.Function):
    """Round to the nearest float16 value, kept in the input's dtype; identity gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.float16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def ste_round(x: Tensor) -> Tensor:
    """Round half to even (as ONNX QuantizeLinear does) with a straight-through gradient."""
    result: Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return result


def ste_float16(x: Tensor) -> Tensor:
    """Nearest float16 value in the dtype of ``x`` with a straight-through gradient."""
    result: Tensor = _Float16.apply(x)  # type: ignore[no-untyped-call]
    return result


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed integer: (-2^(bits-1), 2^(bits-1) - 1)."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """integers int8 [out, in]; scale float32 [out, groups] ([1, 1] per tensor); zero_point int8 like scale or None."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


def grouped(weight: Tensor, scheme: WeightScheme, where: str = "weight") -> Tensor:
    """The weight as [out, groups, columns of a group]; RecipeError if the group size does not divide."""
    out, columns = weight.shape
    groups = scheme.groups(columns, where)
    return weight.reshape(out, groups, columns // groups)


def weight_range(weight: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each group, each [out, groups] ([1, 1] per tensor)."""
    groups = grouped(weight, scheme)
    low, high = groups.amin(-1), groups.amax(-1)
    if scheme.granularity == "tensor":
        return low.min().reshape(1, 1), high.max().reshape(1, 1)
    return low, high


def weight_scales(
    weight: Tensor,
    scheme: WeightScheme,
    clip: float | Tensor = 1.0,
    low_high: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale float32 (holding float16 values) and zero point of each group, both [out, groups] or [1, 1].

    Symmetric: scale = clip * max|w| / (2^(bits-1) - 1), zero point None. Asymmetric: the range [low, high] * clip,
    widened to contain 0, spread over 2^bits - 1 steps; the zero point is a float tensor of integers in the signed
    range. ``clip`` broadcasts to [out, groups]; ``low_high`` replaces the group's own minimum and maximum.
    Raises CheckpointError if a scale does not fit in float16.
    """
    low, high = weight_range(weight, scheme) if low_high is None else low_high
    low, high = low * clip, high * clip
    scale, zero_point = _parameters(low, high, scheme.bits, scheme.symmetric)
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(
            f"weight: largest |value| {float(weight.detach().abs().max()):.3g} gives a scale beyond float16 (65504). "
            "Keep this layer in float."
        )
    return scale, zero_point


def _parameters(
    low: Tensor, high: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    qmin, qmax = integer_range(bits)
    if symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / qmax
        return ste_float16(scale.clamp(min=SMALLEST_SCALE)), None
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ste_float16(((high - low) / (qmax - qmin)).clamp(min=SMALLEST_SCALE))
    return scale, ste_round(qmin - low / scale).clamp(qmin, qmax)


def _weight_integers(
    weight: Tensor, scheme: WeightScheme, scale: Tensor, zero_point: Tensor | None
) -> Tensor:
    """Integers as a float tensor [out, groups, columns]; differentiable."""
    qmin, qmax = integer_range(scheme.bits)
    integers = ste_round(grouped(weight, scheme) / scale[..., None])
    if zero_point is not None:
        integers = integers + zero_point.to(weight.dtype)[..., None]
    return integers.clamp(qmin, qmax)


def quantize_weight(
    weight: Tensor,
    scheme: WeightScheme,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    clip: float | Tensor = 1.0,
) -> QuantizedWeight:
    """Round to nearest (half to even) and saturate. Without ``scale``, ``weight_scales(weight, scheme, clip)``."""
    with torch.no_grad():
        if scale is None:
            scale, zero_point = weight_scales(weight, scheme, clip)
        integers = _weight_integers(weight, scheme, scale, zero_point)
        zero = None if zero_point is None else zero_point.to(torch.int8)
        return QuantizedWeight(integers.reshape(weight.shape).to(torch.int8), scale.float(), zero)


def dequantize(quantized: QuantizedWeight) -> Tensor:
    """The float32 weight [out, in] the integers stand for."""
    out, columns = quantized.integers.shape
    groups = quantized.scale.shape[1]
    grid = quantized.integers.float().reshape(out, groups, columns // groups)
    if quantized.zero_point is not None:
        grid = grid - quantized.zero_point.float()[..., None]
    return (grid * quantized.scale[..., None]).reshape(out, columns)


def fake_quantize_weight(
    weight: Tensor,
    scheme: WeightScheme,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    clip: float | Tensor = 1.0,
) -> Tensor:
    """``dequantize(quantize_weight(...))`` in one differentiable step (to weight, scale and clip)."""
    if scale is None:
        scale, zero_point = weight_scales(weight, scheme, clip)
    integers = _weight_integers(weight, scheme, scale, zero_point)
    if zero_point is not None:
        integers = integers - zero_point.to(weight.dtype)[..., None]
    return (integers * scale[..., None]).reshape(weight.shape)


@dataclass(frozen=True)
class ActivationRange:
    """Smallest and largest value a static scheme covers, float32: [1] per tensor, [in] per channel, or [2] for text
    and image tokens (infinite, low above high, where none was seen).
    """

    low: Tensor
    high: Tensor

    def union(self, other: ActivationRange) -> ActivationRange:
        """The range that covers both."""
        return ActivationRange(
            torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        )


def activation_range(
    x: Tensor, scheme: ActivationScheme, image: Tensor | None = None
) -> ActivationRange:
    """Minimum and maximum of an input [..., in] over all tokens; shapes as in ``ActivationRange``.

    image: bool [...], True on image tokens; needed by granularity "modality" only.
    """
    tokens = x.detach().reshape(-1, x.shape[-1])
    if scheme.granularity == "modality":
        if image is None:
            raise ValueError("activation granularity 'modality' needs to know the image tokens")
        kinds = torch.stack([~image.reshape(-1), image.reshape(-1)])[..., None]  # [2, tokens, 1]
        return ActivationRange(
            torch.where(kinds, tokens, torch.inf).amin((1, 2)),
            torch.where(kinds, tokens, -torch.inf).amax((1, 2)),
        )
    low, high = tokens.amin(0), tokens.amax(0)
    if scheme.granularity == "tensor":
        low, high = low.min().reshape(1), high.max().reshape(1)
    return ActivationRange(low, high)


def activation_parameters(
    low: Tensor, high: Tensor, scheme: ActivationScheme
) -> tuple[Tensor, Tensor | None]:
    """Scale (float32 holding float16 values) and zero point (None if symmetric) of a static scheme, like ``low``.

    Granularity "modality": a kind of token that was never seen takes the other's range.
    """
    if scheme.granularity == "modality":
        seen = low <= high
        low, high = torch.where(seen, low, low.flip(0)), torch.where(seen, high, high.flip(0))
    return _parameters(low, high, scheme.bits, scheme.symmetric)


def fake_quantize_activation(
    x: Tensor,
    scheme: ActivationScheme,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize an input [..., in].

    "token": m = max(max|x| over the last axis, 1e-4), q = QuantizeLinear(x / m, 1/127), result q * (1/127) * m (an
    exported graph multiplies by m after the MatMul, DESIGN decision 4). "modality": the same with m = qmax * scale of
    the token's kind; ``scale`` [2] is for text and image, ``image`` bool [...] True on image tokens. "tensor" and
    "channel": QuantizeLinear with the calibrated ``scale`` [1] or [in] and ``zero_point``. All divide by the scale as
    ONNX defines it (QuantizeLinear-21: y = saturate(round(x / y_scale) + y_zero_point), round half to even).
    """
    qmin, qmax = integer_range(scheme.bits)
    if scheme.granularity in ("token", "modality"):
        if scheme.granularity == "token":
            maximum = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_TOKEN_MAXIMUM)
        else:
            maximum = _modality_maximum(x, scheme, scale, image)
        step = torch.tensor([1.0 / qmax], dtype=x.dtype, device=x.device)
        return ste_round(x / maximum / step).clamp(qmin, qmax) * step * maximum
    if scale is None:
        raise ValueError(f"activation granularity {scheme.granularity!r} needs a calibrated scale")
    integers = ste_round(x / scale)
    if zero_point is None:
        return integers.clamp(qmin, qmax) * scale
    zero = zero_point.to(x.dtype)
    return ((integers + zero).clamp(qmin, qmax) - zero) * scale


def _modality_maximum(
    x: Tensor, scheme: ActivationScheme, scale: Tensor | None, image: Tensor | None
) -> Tensor:
    """m [..., 1] of "modality": qmax times a float16 value, exact in float32."""
    if scale is None or image is None:
        raise ValueError("activation granularity 'modality' needs two scales and the image tokens")
    maxima = scale.to(x.dtype) * integer_range(scheme.bits)[1]
    return torch.where(image, maxima[1], maxima[0])[..., None]
