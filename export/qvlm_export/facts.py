"""What a written graph holds, read back from the file: node count, bytes, quantized products.

Counts are of what was written, not of what was meant: verify and rtx compare both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx_ir as ir

from qvlm.errors import ExportError
from qvlm_export.qdq import LINEARS_KEY

# Operators that move or compare data and round nothing. Q and DQ are accounted for apart.
_EXACT = frozenset(
    {
        *("Reshape", "Transpose", "Slice", "Concat", "Gather", "Unsqueeze", "Expand", "Split"),
        *("Shape", "Where", "LessOrEqual", "GreaterOrEqual", "Max", "Abs", "ReduceMax", "Cast"),
        *("TensorScatter", "QuantizeLinear", "DequantizeLinear"),
    }
)
# Depth of a product of two activations: head size or attended rows, which no weight's shape tells.
_ATTENTION_DEPTH = 128
_LAYER = re.compile(r"layers\.(\d+)/")


@dataclass(frozen=True)
class Product:
    """One MatMul with an integer weight [depth, N].

    linears: the checkpoint linears in it; dtype: the weight's, "INT4" or "INT8".
    """

    node: str
    linears: tuple[str, ...]
    elements: int
    depth: int
    dtype: str


@dataclass(frozen=True)
class GraphFacts:
    """One graph file: node count, bytes with external data, integer products.

    layers: transformer layers. roundings: nodes that round their result. depths: contraction
    lengths of all products, summed. constants: nodes that read a stored float tensor. tables:
    quantized tables that are looked up.
    """

    name: str
    nodes: int
    nbytes: int
    products: tuple[Product, ...]
    layers: int
    roundings: int
    depths: int
    constants: int = 0
    tables: tuple[str, ...] = ()

    def elements(self, dtype: str) -> int:
        """Integer weight elements of one type."""
        return sum(p.elements for p in self.products if p.dtype == dtype)

    def count(self, dtype: str) -> int:
        """Integer products of one type."""
        return sum(1 for p in self.products if p.dtype == dtype)

    @property
    def linears(self) -> tuple[str, ...]:
        """Checkpoint linears inside the integer products, and quantized tables."""
        return (*(name for p in self.products for name in p.linears), *self.tables)


def graph_facts(path: Path) -> GraphFacts:
    """Read a graph (not its constants); ExportError if it cannot be read."""
    try:
        model = ir.load(path)
        nbytes = path.stat().st_size + path.with_name(path.name + ".data").stat().st_size
    except OSError as error:
        raise ExportError(f"{path}: not readable ({error}). Export again.") from error
    nodes = list(model.graph)
    return GraphFacts(
        path.stem,
        len(nodes),
        nbytes,
        tuple(p for node in nodes if (p := _product(node)) is not None),
        len({m[1] for node in nodes if (m := _LAYER.search(str(node.name)))}),
        sum(node.op_type not in _EXACT for node in nodes),
        sum(_depth(node) for node in nodes),
        sum(any(map(_is_stored_float, node.inputs)) for node in nodes),
        tuple(name for node in nodes if (name := _table(node))),
    )


def _is_stored_float(value: ir.Value | None) -> bool:
    tensor = None if value is None else value.const_value
    return tensor is not None and tensor.dtype.is_floating_point() and tensor.size > 1


def _weight(node: ir.Node) -> ir.Value | None:
    """The constant behind a product's second input, through Transpose and DequantizeLinear."""
    value = node.inputs[1]
    while value is not None and value.const_value is None:
        producer = value.producer()
        if producer is None or producer.op_type not in ("DequantizeLinear", "Transpose"):
            return None
        value = producer.inputs[0]
    return value


def _depth(node: ir.Node) -> int:
    if node.op_type not in ("MatMul", "Conv"):
        return 0
    weight = _weight(node)
    if weight is None or weight.shape is None:
        return _ATTENTION_DEPTH
    shape = weight.shape.numpy()
    return prod(shape[1:]) if node.op_type == "Conv" else shape[0]


def _table(node: ir.Node) -> str:
    """The checkpoint's name of the quantized table a Gather reads, "" for other nodes."""
    return node.metadata_props.get(LINEARS_KEY, "") if node.op_type == "Gather" else ""


def _product(node: ir.Node) -> Product | None:
    right = node.inputs[1] if node.op_type == "MatMul" else None
    producer = right.producer() if right is not None else None
    weight = _weight(node) if producer and producer.op_type == "DequantizeLinear" else None
    if weight is None or weight.const_value is None:
        return None
    linears = tuple(filter(None, node.metadata_props.get(LINEARS_KEY, "").split(",")))
    tensor = weight.const_value
    return Product(str(node.name), linears, tensor.size, _depth(node), tensor.dtype.name)
