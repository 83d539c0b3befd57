"""What a graph must read and multiply in one run, from the ONNX file alone.

A device has no onnx package, so this reads protobuf's wire format: names, dims and types of the
initializers, operator and inputs of the nodes. Nothing else of the file is looked at, and the
external data is not opened. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qvlm_runtime.errors import FolderError

# Bits of an element -> the values of TensorProto.DataType that have so many.
_TYPES = {
    64: (7, 11, 13),
    32: (1, 6, 12),
    16: (4, 5, 10, 16),
    8: (2, 3, 9, 17, 18, 19, 20, 24),
    4: (21, 22, 23),
    2: (25, 26),
}
_BITS = {dtype: bits for bits, dtypes in _TYPES.items() for dtype in dtypes}
_PRODUCTS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class GraphWeights:
    """nbytes: initializers that every run reads whole (a table that is only gathered from is not).

    elements: numbers of the weights that are multiplied, each twice an operation per position.
    """

    nbytes: int
    elements: int


@dataclass(frozen=True)
class _Tensor:
    name: str
    dims: tuple[int, ...]
    dtype: int


def graph_weights(path: Path) -> GraphWeights:
    """Read one graph file. FolderError if it is not an ONNX model."""
    try:
        data = memoryview(path.read_bytes())
        graph = next(value for field, value in _fields(data) if field == 7)
        assert isinstance(graph, memoryview)
        tensors, uses = _graph(graph)
        sizes = {t.name: (prod(t.dims) * _BITS[t.dtype] + 7) // 8 for t in tensors}
    except OSError as error:
        raise FolderError(f"{path}: not readable ({error})") from error
    except (AssertionError, StopIteration, KeyError, IndexError, ValueError) as error:
        raise FolderError(f"{path}: not an ONNX model. Export again.") from error
    nbytes = elements = 0
    for tensor in tensors:
        roles = uses.get(tensor.name, set())
        if roles - {("Gather", 0)}:
            nbytes += sizes[tensor.name]
        # An integer weight reaches its product through DequantizeLinear, whose scale is no weight;
        # a tied table through Transpose.
        direct = any((op, 1) in roles for op in _PRODUCTS)
        through = ("DequantizeLinear", 0) in roles or ("Transpose", 0) in roles
        if len(tensor.dims) >= 2 and (direct or through):
            elements += prod(tensor.dims)
    return GraphWeights(nbytes, elements)


def _graph(graph: memoryview) -> tuple[list[_Tensor], dict[str, set[tuple[str, int]]]]:
    """Initializers, and for each name the (operator, input position) pairs that read it."""
    tensors: list[_Tensor] = []
    uses: dict[str, set[tuple[str, int]]] = {}
    for field, value in _fields(graph):
        if field == 5 and isinstance(value, memoryview):
            tensors.append(_tensor(value))
        elif field == 1 and isinstance(value, memoryview):
            inputs, operator = [], ""
            for part, content in _fields(value):
                if part == 1 and isinstance(content, memoryview):
                    inputs.append(bytes(content).decode())
                elif part == 4 and isinstance(content, memoryview):
                    operator = bytes(content).decode()
            for position, name in enumerate(inputs):
                uses.setdefault(name, set()).add((operator, position))
    return tensors, uses


def _tensor(data: memoryview) -> _Tensor:
    name, dims, dtype = "", list[int](), 0
    for field, value in _fields(data):
        if field == 8 and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif field == 2 and isinstance(value, int):
            dtype = value
        elif field == 1:
            dims += [value] if isinstance(value, int) else _packed(value)
    return _Tensor(name, tuple(dims), dtype)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value of each field of a message; IndexError or ValueError if it is none."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + length > len(data):
            raise IndexError("a field leaves its message")
        yield key >> 3, data[at : at + length]
        at += length


def _packed(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
