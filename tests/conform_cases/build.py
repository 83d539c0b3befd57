"""Minimal ONNX graphs for the conformance rules: nodes as ONNX text, constants from numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

Make = Callable[[Path], Path]


@dataclass(frozen=True)
class Case:
    """A rule, the release it is tried for, a graph that breaks it and one that does not."""

    rule: str
    bad: ModelProto | Make
    good: ModelProto | Make
    release: str = "rtx-1.7"
    sm: int = 86


def case(
    rule: str,
    bad: ModelProto | Make,
    good: ModelProto | Make,
    release: str = "rtx-1.7",
    sm: int = 86,
) -> Case:
    return Case(rule, bad, good, release, sm)


def graph(
    inputs: str, outputs: str, nodes: str, opset: int = 21, **constants: TensorProto
) -> ModelProto:
    """``inputs`` and ``outputs`` as in "float16[4,64] x, int64[1,S] ids"; ``nodes`` as ONNX text."""
    parsed = parser.parse_graph(f"g ({inputs}) => ({outputs}) {{ {nodes} }}")
    for number, node in enumerate(parsed.node):
        node.name = f"n{number}_{node.op_type}"
    for name, tensor in constants.items():
        tensor.name = name
        parsed.initializer.append(tensor)
    domains = {node.domain for node in parsed.node} - {"", "ai.onnx"}
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in sorted(domains))]
    return helper.make_model(parsed, opset_imports=opsets, ir_version=10)


def save(model: ModelProto | Make, path: Path) -> Path:
    """Write the case's file and give its path."""
    if callable(model):
        return model(path.parent)
    onnx.save(model, path)
    return path


def tensor(values: object, dtype: object) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, np.float64).astype(dtype))  # type: ignore[arg-type]


def f16(*values: float) -> TensorProto:
    """A scalar for one value, else a vector."""
    return tensor(values[0] if len(values) == 1 else values, np.float16)


def f32(*values: float) -> TensorProto:
    return tensor(values[0] if len(values) == 1 else values, np.float32)


def i64(*values: int) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, np.int64))


def i8(*values: int) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values[0] if len(values) == 1 else values, np.int8))


def full(dtype: object, *shape: int, value: float = 1.0) -> TensorProto:
    """A constant tensor of any type."""
    return numpy_helper.from_array(np.full(shape, value, np.float64).astype(dtype))  # type: ignore[arg-type]


def ramp(dtype: object, *shape: int, step: float = 1.0) -> TensorProto:
    """0, 1, 2, -2, -1, 0, ... times ``step``: weights that no compiler folds into a scalar."""
    values = (np.arange(np.prod(shape)) % 5 - 2) * step
    return numpy_helper.from_array(values.reshape(shape).astype(dtype))  # type: ignore[arg-type]


def int4(*shape: int) -> TensorProto:
    return ramp(ml_dtypes.int4, *shape)


def half(*shape: int, value: float = 0.01) -> TensorProto:
    return full(np.float16, *shape, value=value)
