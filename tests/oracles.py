"""Textbook quantization in NumPy float64: loops, no tricks, nothing of qvlm imported."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def round_half_even(x: float) -> int:
    """Nearest integer, ties to the even one (IEEE 754 roundTiesToEven)."""
    floor = math.floor(x)
    rest = x - floor
    if rest < 0.5 or (rest == 0.5 and floor % 2 == 0):
        return floor
    return floor + 1


def group_columns(columns: int, size: int | None) -> Iterator[tuple[int, range]]:
    """(group, its columns); one group for ``size`` None."""
    step = columns if size is None else size
    for group, start in enumerate(range(0, columns, step)):
        yield group, range(start, start + step)


def parameters(low: float, high: float, bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale (a float16 value, at least its smallest normal) and zero point for one range."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        # The range ends are float32 and so is the quotient that is rounded to float16.
        raw = np.float32(max(abs(low), abs(high))) / np.float32(qmax)
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        raw = (np.float32(high) - np.float32(low)) / np.float32(qmax - qmin)
    scale = float(np.float16(max(raw, np.float32(2.0**-14))))
    if symmetric:
        return scale, 0
    zero = round_half_even(float(np.float32(qmin) - np.float32(low) / np.float32(scale)))
    return scale, min(max(zero, qmin), qmax)


def quantize(
    weight: Array, bits: int, size: int | None, symmetric: bool, per_tensor: bool = False
) -> tuple[Array, Array, Array]:
    """Integers [out, in], scales and zero points [out, groups] ([1, 1] per tensor)."""
    out, columns = weight.shape
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    integers = np.zeros((out, columns), np.int64)
    groups = 1 if size is None else columns // size
    scales = np.zeros((out, groups))
    zeros = np.zeros((out, groups), np.int64)
    for row in range(out):
        for group, where in group_columns(columns, size):
            values = weight if per_tensor else weight[row, where.start : where.stop]
            scale, zero = parameters(float(values.min()), float(values.max()), bits, symmetric)
            scales[row, group], zeros[row, group] = scale, zero
            for column in where:
                # The quotient is a float32 in every engine; only its rounding is exact.
                quotient = float(np.float32(weight[row, column]) / np.float32(scale))
                integers[row, column] = min(max(round_half_even(quotient) + zero, qmin), qmax)
    return (integers, scales[:1], zeros[:1]) if per_tensor else (integers, scales, zeros)


def token_normalised(x: Array, bits: int) -> tuple[Array, Array]:
    """Integers and values of a [tokens, in] input, one scale per token; float32 steps as in ONNX."""
    qmax = 2 ** (bits - 1) - 1
    step = np.float32(1.0) / np.float32(qmax)
    integers, values = np.zeros(x.shape, np.int64), np.zeros(x.shape)
    for t in range(x.shape[0]):
        maximum = np.float32(max(float(np.abs(x[t]).max()), float(np.float32(1e-4))))
        for c in range(x.shape[1]):
            quotient = np.float32(x[t, c]) / maximum / step
            integers[t, c] = min(max(round_half_even(float(quotient)), -qmax - 1), qmax)
            values[t, c] = integers[t, c] * float(step) * float(maximum)
    return integers, values
