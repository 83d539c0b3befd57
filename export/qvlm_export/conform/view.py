"""An ONNX graph as the rules read it: producers, consumers, types, shapes and small constants; never whole weights.

A file of any exporter: local functions are inlined, external data stays on disk, types and shapes come from ONNX shape
inference on a copy without the large tensors. What inference cannot tell (custom operators) is None, and a rule that
needs it says nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    inliner,
    load,
    numpy_helper,
    shape_inference,
)
from onnx.external_data_helper import load_external_data_for_tensor

from qvlm.errors import ExportError

Shape = tuple["int | str | None", ...]
Array = npt.NDArray[np.float64]
T = TypeVar("T")

# Protobuf reads no message of this size or more.
PROTOBUF_LIMIT = 1 << 31
# Constants above this many bytes are never read. The scales of a 150k-word INT4 head are 5 MB.
VALUE_LIMIT = 64 << 20
# Tensors above this stay out of the copy that shape inference works on; axes, shapes and scales are
# below it.
INFERENCE_LIMIT = 1 << 12

_BITS = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.BOOL: 8,
    TensorProto.FLOAT8E4M3FN: 8,
    TensorProto.FLOAT8E4M3FNUZ: 8,
    TensorProto.FLOAT8E5M2: 8,
    TensorProto.FLOAT8E5M2FNUZ: 8,
    TensorProto.INT16: 16,
    TensorProto.UINT16: 16,
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.INT32: 32,
    TensorProto.UINT32: 32,
    TensorProto.FLOAT: 32,
    TensorProto.INT64: 64,
    TensorProto.UINT64: 64,
    TensorProto.DOUBLE: 64,
    TensorProto.COMPLEX64: 64,
    TensorProto.COMPLEX128: 128,
}


def dtype_name(dtype: int | None) -> str:
    """``FLOAT16``; ``unknown`` for None or a number this onnx does not know."""
    if dtype is None or dtype not in TensorProto.DataType.values():
        return "unknown"
    return str(TensorProto.DataType.Name(cast(TensorProto.DataType, dtype)))


def tensor_bytes(dtype: int, shape: Iterable[int]) -> int | None:
    """Stored size of a tensor, two 4-bit values in a byte; None for strings."""
    bits = _BITS.get(dtype)  # type: ignore[call-overload]
    return None if bits is None else math.ceil(math.prod(shape) * bits / 8)


@dataclass(frozen=True, eq=False)
class Use:
    """One place where a tensor is read: input number ``index`` of ``node``."""

    node: NodeProto
    index: int


class GraphView:
    """The main graph and the bodies of its control flow, read only."""

    def __init__(self, model: ModelProto, path: Path) -> None:
        """``path`` is where the model came from: external data lies beside it."""
        if model.functions:
            model = inliner.inline_local_functions(model)
        self.path = path
        self.model = model
        self.opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
        self.inputs: dict[str, ValueInfoProto] = {}
        self.outputs: dict[str, ValueInfoProto] = {v.name: v for v in model.graph.output}
        self.initializers: dict[str, TensorProto] = {}
        self.nodes: list[NodeProto] = []
        self._producers: dict[str, NodeProto] = {}
        self._uses: dict[str, list[Use]] = defaultdict(list)
        for graph in _graphs(model.graph):
            self._read(graph)
        self._constants = self._find_constants()
        self.inputs = {v.name: v for v in model.graph.input if v.name not in self.initializers}
        self.file_bytes = path.stat().st_size if path.is_file() else 0
        self.skeleton = _without_large_tensors(model)
        self.inference_error: str | None = None
        self._types: dict[str, tuple[int, Shape | None]] = {}
        self._infer()

    @staticmethod
    def open(path: Path) -> GraphView:
        """Read a file without its external data; ExportError if it is missing or no ONNX model."""
        if not path.is_file():
            raise ExportError(f"{path}: no such file. Give an ONNX file or an exported folder.")
        if path.stat().st_size >= PROTOBUF_LIMIT:
            return GraphView(ModelProto(), path)  # nobody can read it: rule X-01 alone speaks
        try:
            model = load(path, load_external_data=False)
        except Exception as error:  # protobuf has no common base class for its parse errors
            raise ExportError(f"{path}: not an ONNX model ({error})") from error
        if not model.graph.node:
            raise ExportError(f"{path}: an ONNX model without nodes. Is the file cut off?")
        return GraphView(model, path)

    def _read(self, graph: GraphProto) -> None:
        for tensor in graph.initializer:
            self.initializers[tensor.name] = tensor
        for node in graph.node:
            self.nodes.append(node)
            for name in node.output:
                if name:
                    self._producers[name] = node
            for index, name in enumerate(node.input):
                if name:
                    self._uses[name].append(Use(node, index))
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    tensor = _constant_tensor(attribute)
                    if tensor is not None:
                        self.initializers[node.output[0]] = tensor

    def _find_constants(self) -> set[str]:
        """Names that follow from stored tensors alone; nodes are in order, so one pass finds them."""
        constants = set(self.initializers)
        for node in self.nodes:
            sources = [name for name in node.input if name]
            bodies = any(entry.type == AttributeProto.GRAPH for entry in node.attribute)
            if sources and not bodies and all(name in constants for name in sources):
                constants.update(name for name in node.output if name)
        return constants

    def _infer(self) -> None:
        inferred: GraphProto = self.skeleton.graph
        try:
            inferred = shape_inference.infer_shapes(self.skeleton, data_prop=True).graph
        except shape_inference.InferenceError as error:
            self.inference_error = str(error).strip().splitlines()[0]
        values: list[ValueInfoProto] = []
        for graph in _graphs(inferred):
            values += [*graph.input, *graph.value_info, *graph.output]
        for value in values:
            if value.type.HasField("tensor_type"):
                self._types[value.name] = _type_of(value)
        for name, tensor in self.initializers.items():
            self._types[name] = (tensor.data_type, tuple(tensor.dims))

    # What a name is

    def dtype(self, name: str) -> int | None:
        """TensorProto type of a tensor; a DequantizeLinear output of unknown type has its scale's."""
        found = self._types.get(name)
        if found is not None and found[0] != TensorProto.UNDEFINED:
            return found[0]
        node = self._producers.get(name)
        if node is not None and node.op_type == "DequantizeLinear" and len(node.input) > 1:
            return self.dtype(node.input[1])
        return None

    def shape(self, name: str) -> Shape | None:
        """Dimensions: a number, a name, or None each; None if not even the rank is known."""
        found = self._types.get(name)
        return found[1] if found is not None else None

    def rank(self, name: str) -> int | None:
        """Number of dimensions, None if unknown."""
        shape = self.shape(name)
        return None if shape is None else len(shape)

    def producer(self, name: str) -> NodeProto | None:
        """The node that writes ``name``; None for graph inputs and initializers."""
        return self._producers.get(name)

    def producer_op(self, name: str) -> str:
        """Operator that writes ``name``, "" if none does."""
        node = self._producers.get(name)
        return "" if node is None else node.op_type

    def uses(self, name: str) -> list[Use]:
        """Every input that reads ``name``."""
        return self._uses.get(name, [])

    def consumers(self, name: str) -> list[NodeProto]:
        """The nodes that read ``name``, one entry per input."""
        return [use.node for use in self.uses(name)]

    def is_used(self, name: str) -> bool:
        """Read by a node or an output of the graph."""
        return bool(name) and (name in self._uses or name in self.outputs)

    def ops(self, *op_types: str) -> Iterator[NodeProto]:
        """Nodes of these operators, in graph order."""
        return (node for node in self.nodes if node.op_type in op_types)

    # Constants

    def is_initializer(self, name: str) -> bool:
        """Stored in the file: an initializer or a Constant node."""
        return name in self.initializers

    def is_constant(self, name: str) -> bool:
        """Stored, or computed from stored tensors only."""
        return name in self._constants

    def values(self, name: str) -> Array | None:
        """A stored constant as float64 (exact for every type used in scales, zero points and shapes).

        Looks through Cast and Identity. None if it is not stored, larger than ``VALUE_LIMIT``, or its file is missing.
        """
        node = self._producers.get(name)
        if node is not None and node.op_type in ("Cast", "Identity"):
            return self.values(node.input[0])
        tensor = self.initializers.get(name)
        if tensor is None:
            return None
        size = tensor_bytes(tensor.data_type, tensor.dims)
        if size is None or size > VALUE_LIMIT:
            return None
        if tensor.data_location == TensorProto.EXTERNAL:
            loaded = TensorProto()
            loaded.CopyFrom(tensor)
            try:
                load_external_data_for_tensor(loaded, str(self.path.parent))
            except (OSError, ValueError, RuntimeError):
                return None  # rules report the file
            tensor = loaded
        return np.asarray(numpy_helper.to_array(tensor)).astype(np.float64)

    def ints(self, name: str) -> list[int] | None:
        """A stored constant as a flat list of integers."""
        found = self.values(name)
        return None if found is None else [int(v) for v in found.reshape(-1)]

    def weight_shape(self, name: str) -> tuple[int, ...] | None:
        """Dimensions of a stored tensor."""
        tensor = self.initializers.get(name)
        return None if tensor is None else tuple(tensor.dims)


def attribute(node: NodeProto, name: str, default: T) -> T:
    """An attribute's value, ``default`` if absent."""
    for entry in node.attribute:
        if entry.name == name:
            value = helper.get_attribute_value(entry)
            return cast(T, value.decode() if isinstance(value, bytes) else value)
    return default


def has_attribute(node: NodeProto, name: str) -> bool:
    """True if the attribute is written out."""
    return any(entry.name == name for entry in node.attribute)


def argument(node: NodeProto, index: int) -> str:
    """Name of an input, "" if it is left out."""
    return node.input[index] if index < len(node.input) else ""


def label(node: NodeProto) -> str:
    """How messages name a node: its name, else the tensor it writes."""
    return node.name or f"{node.op_type} -> {node.output[0] if node.output else '?'}"


def operator(node: NodeProto) -> str:
    """``Softmax``, or ``com.microsoft.MatMulNBits`` outside the standard domain."""
    standard = node.domain in ("", "ai.onnx")
    return node.op_type if standard else f"{node.domain}.{node.op_type}"


def external_entries(tensor: TensorProto) -> dict[str, str] | None:
    """Location, offset and length of a tensor stored beside the model; None if it is stored inside."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    return {entry.key: entry.value for entry in tensor.external_data}


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for entry in node.attribute:
            if entry.type == AttributeProto.GRAPH:
                yield from _graphs(entry.g)
            for body in entry.graphs:
                yield from _graphs(body)


def _constant_tensor(entry: AttributeProto) -> TensorProto | None:
    if entry.name == "value":
        return entry.t
    if entry.name in ("value_float", "value_floats", "value_int", "value_ints"):
        kind = np.float32 if "float" in entry.name else np.int64
        return numpy_helper.from_array(np.asarray(helper.get_attribute_value(entry), kind))
    return None


def _without_large_tensors(model: ModelProto) -> ModelProto:
    """The model with each large or external initializer turned into an input of the same type."""
    skeleton = ModelProto()
    skeleton.ir_version = model.ir_version
    skeleton.opset_import.extend(model.opset_import)
    graph = skeleton.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    declared = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        size = tensor_bytes(tensor.data_type, tensor.dims)
        inside = tensor.data_location != TensorProto.EXTERNAL
        if inside and size is not None and size <= INFERENCE_LIMIT:
            graph.initializer.append(tensor)
        elif tensor.name not in declared:
            graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tuple(tensor.dims))
            )
    return skeleton


def _type_of(value: ValueInfoProto) -> tuple[int, Shape | None]:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return kind.elem_type, None
    return kind.elem_type, tuple(
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
        for dim in kind.shape.dim
    )
