"""Rules on the file and on the shape of the graph: stored data, dimensions, and forms that compile to more kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from onnx import NodeProto, TensorProto, checker

from qvlm_export.conform.placement import attention_products
from qvlm_export.conform.rule import EVERYWHERE, TENSORRT, Breach, Consumer, Rule, breach
from qvlm_export.conform.view import (
    PROTOBUF_LIMIT,
    GraphView,
    argument,
    attribute,
    external_entries,
    tensor_bytes,
)
from qvlm_export.conform.weights import int4_products

_ENTRY_KEYS = {"location", "offset", "length", "checksum"}
_MOVES = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
# Rotary tables are read by two products per head tensor, so by four in one layer: from there on
# they are shared.
_SHARED_READERS = 4


def _file_size(view: GraphView, _: Consumer) -> Iterator[Breach]:
    size = view.file_bytes
    if size >= PROTOBUF_LIMIT:
        yield Breach("", "", f"{size} bytes in one file", "below 2 GiB without external data")


def _external_location(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for name, tensor in view.initializers.items():
        entries = external_entries(tensor)
        if entries is None:
            continue
        location = entries.get("location", "")
        path = PurePosixPath(location)
        if not location or path.is_absolute() or ".." in path.parts or "\\" in location:
            allowed = "a relative path inside the model's folder"
            yield Breach("", name, f"location {location!r}", allowed)
        unknown = sorted(set(entries) - _ENTRY_KEYS)
        if unknown:
            yield Breach("", name, f"keys {', '.join(unknown)}", ", ".join(sorted(_ENTRY_KEYS)))


def _external_length(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for name, tensor in view.initializers.items():
        entries = external_entries(tensor)
        size = tensor_bytes(tensor.data_type, tensor.dims)
        if entries is None or size is None:
            continue
        file = view.path.parent / entries.get("location", "")
        if not file.is_file():
            yield Breach("", name, f"{file.name} is missing", "the data file beside the model")
            continue
        stored, offset = file.stat().st_size, int(entries.get("offset", 0))
        length = int(entries.get("length", stored - offset))
        if length != size or offset + length > stored:
            found = f"{length} bytes at {offset} of {stored}"
            yield Breach("", name, found, f"{size} bytes inside the file")


def _valid_onnx(view: GraphView, _: Consumer) -> Iterator[Breach]:
    if not view.nodes:
        return
    try:
        checker.check_model(view.skeleton)
    except checker.ValidationError as error:
        yield Breach("", "", str(error).strip().splitlines()[0], "a graph of the ONNX standard")
    if view.inference_error is not None:
        yield Breach("", "", view.inference_error, "types and shapes that follow")


def _unnamed_dimension(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for name in view.inputs:
        shape = view.shape(name)
        if shape is None:
            yield Breach("", name, "an input without a shape", "a number or a name per dimension")
        elif None in shape:
            found = f"dimension {shape.index(None)} has neither number nor name"
            yield Breach("", name, found, "a number or a name")


def _dynamic_batch(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for name in view.inputs:
        shape = view.shape(name)
        if not shape or isinstance(shape[0], int):
            continue
        ids = len(shape) == 2 and view.dtype(name) not in _FLOATS
        if ids or len(shape) >= 3:
            yield Breach("", name, f"batch {shape[0] or '?'}", "a fixed number")


def _computed_reshape(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Reshape"):
        source = view.producer(node.input[1])
        if source is None or source.op_type != "Concat" or view.is_constant(node.input[1]):
            continue
        parts = [view.producer(name) for name in source.input]
        behind = [p and view.producer_op(p.input[0]) for p in parts if p is not None and p.input]
        if any(op in ("Gather", "Slice", "Shape") for op in behind):
            found = "a shape joined from Shape, Gather and Concat"
            yield breach(node, node.input[1], found, "an initializer with 0 and -1")


def _half_norm(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("ReduceMean"):
        square = view.producer(node.input[0])
        if square is None or view.dtype(node.input[0]) != TensorProto.FLOAT16:
            continue
        is_square = square.op_type == "Pow" or (
            square.op_type == "Mul" and square.input[0] == square.input[1]
        )
        if is_square:
            found = "mean of squares in FLOAT16"
            yield breach(node, node.input[0], found, "FLOAT, between Casts")


def _int4_behind_attention(view: GraphView, _: Consumer) -> Iterator[Breach]:
    contexts = {context.output[0] for _scores, _softmax, context in attention_products(view)}
    for product, _dq in int4_products(view):
        reshape = view.producer(product.data.name)
        if reshape is None or reshape.op_type != "Reshape" or view.rank(product.data.name) != 3:
            continue
        transpose = view.producer(reshape.input[0])
        if transpose is None or transpose.op_type != "Transpose":
            continue
        if transpose.input[0] in contexts:
            found = "INT4 product in three dimensions behind attention"
            yield breach(product.node, product.data.name, found, "two dimensions: Reshape [-1, K]")


def _repeat_node(view: GraphView, name: str) -> NodeProto | None:
    """What repeats key or value heads in front of an attention product."""
    node = view.producer(name)
    while node is not None and node.op_type in _MOVES:
        node = view.producer(node.input[0])
    if node is None:
        return None
    by_map = node.op_type == "Gather" and view.is_constant(node.input[1])
    return node if node.op_type == "Tile" or by_map else None


def _repeated_heads(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for scores, _softmax, context in attention_products(view):
        for node in (_repeat_node(view, scores.input[1]), _repeat_node(view, context.input[1])):
            if node is not None:
                found = f"heads repeated by {node.op_type}"
                yield breach(node, node.output[0], found, "Unsqueeze, Expand and Reshape")


def _grouped_product(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for scores, softmax, _context in attention_products(view):
        masked = any(n.op_type in ("Add", "Where") for n in view.consumers(scores.output[0]))
        if view.rank(scores.output[0]) == 5 and masked:
            found = "masked attention in five dimensions"
            yield breach(
                softmax, scores.output[0], found, "four dimensions, heads repeated by Expand"
            )


def _shared_tables(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for gather in view.ops("Gather"):
        table, ids = gather.input[0], gather.input[1]
        rotary = view.is_initializer(table) and view.rank(table) == 2 and not view.is_constant(ids)
        if not rotary or view.dtype(table) not in _FLOATS:
            continue
        for node in view.consumers(gather.output[0]):
            if node.op_type not in ("Unsqueeze", "Reshape", "Split"):
                continue
            for name in node.output:
                readers = [n for n in view.consumers(name) if n.op_type == "Mul"]
                if len(readers) >= _SHARED_READERS:
                    found = f"{node.op_type} between Gather and {len(readers)} products"
                    yield breach(node, name, found, "Gather in the final shape")


def _scaled_scores(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for scores, _softmax, _context in attention_products(view):
        for node in view.consumers(scores.output[0]):
            if node.op_type in ("Mul", "Div"):
                found = f"{node.op_type} behind the scores"
                yield breach(node, node.output[0], found, "Mul of the query in front of them")


def _float32_output(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for name in view.outputs:
        node = view.producer(name)
        if node is None or node.op_type != "Cast":
            continue
        if attribute(node, "to", 0) == TensorProto.FLOAT:
            yield breach(node, name, "an output cast to FLOAT", "the type of the graph")


def _is_norm(view: GraphView, name: str) -> bool:
    node = view.producer(name)
    if node is None:
        return False
    if node.op_type in ("LayerNormalization", "RMSNormalization"):
        return True
    scaled = node.op_type == "Mul" and any(
        view.is_constant(n) and view.rank(n) == 1 for n in node.input
    )
    return scaled and any(view.producer_op(n) in ("Cast", "Div", "Mul") for n in node.input)


def _late_slice(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for name in view.outputs:
        product = view.producer(name)
        if product is None or product.op_type not in ("MatMul", "Gemm"):
            continue
        node = view.producer(product.input[0])
        if (
            node is not None
            and node.op_type in ("Slice", "Gather")
            and _is_norm(view, node.input[0])
        ):
            found = f"{node.op_type} behind the last norm"
            yield breach(node, node.output[0], found, "the last position taken before the norm")


def _attention_on_whole_cache(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Attention"):
        if view.producer_op(node.input[1]) == "TensorScatter":
            found = "Attention over every slot of the cache"
            yield breach(node, node.input[1], found, "Slice to the valid length in between")


def _trt_only(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.nodes:
        if node.domain == "trt" or node.op_type.startswith("TRT_"):
            yield breach(
                node, argument(node, 0), node.op_type, "operators of ONNX or com.microsoft"
            )


RULES: tuple[Rule, ...] = (
    Rule(
        "X-01",
        "file above protobuf's limit",
        "error",
        EVERYWHERE,
        "Save the weights as external data.",
        _file_size,
    ),
    Rule(
        "X-02",
        "external data outside the model's folder",
        "error",
        EVERYWHERE,
        "Save external data beside the model under a relative name.",
        _external_location,
    ),
    Rule(
        "X-03",
        "external data of the wrong length",
        "error",
        EVERYWHERE,
        "Copy the data file again: it is missing, cut off or of another export.",
        _external_length,
    ),
    Rule(
        "X-04",
        "graph that the ONNX checker refuses",
        "warning",
        EVERYWHERE,
        "Mend the exporter: other tools will refuse the file too.",
        _valid_onnx,
    ),
    Rule(
        "G-01",
        "dimension without a name",
        "warning",
        TENSORRT,
        "Name it: equal names are what ties the shapes of a profile together.",
        _unnamed_dimension,
    ),
    Rule(
        "G-02",
        "shape computed from shapes",
        "info",
        TENSORRT,
        "Write Reshape with 0 for a kept and -1 for the free dimension.",
        _computed_reshape,
    ),
    Rule(
        "G-03",
        "dynamic batch",
        "info",
        TENSORRT,
        "Fix the batch where one size is enough: it saves two kernels per layer.",
        _dynamic_batch,
    ),
    Rule(
        "G-04",
        "RMS norm in float16",
        "warning",
        TENSORRT,
        "Cast to FLOAT before squaring: values above 255 overflow.",
        _half_norm,
    ),
    Rule(
        "G-05",
        "INT4 output projection in three dimensions",
        "warning",
        TENSORRT,
        "Reshape to [-1, K] in front and back behind: else the weight is expanded at every run.",
        _int4_behind_attention,
    ),
    Rule(
        "G-06",
        "key and value heads repeated by copying",
        "warning",
        TENSORRT,
        "Repeat by Unsqueeze, Expand and Reshape: then the kernel reads the shared heads.",
        _repeated_heads,
    ),
    Rule(
        "G-07",
        "grouped attention in five dimensions",
        "warning",
        TENSORRT,
        "Repeat key and value heads by Expand: with a mask this form is not fused.",
        _grouped_product,
    ),
    Rule(
        "G-08",
        "rotary tables reshaped behind Gather",
        "warning",
        TENSORRT,
        "Unsqueeze position_ids instead: from the second layer on it costs three kernels each.",
        _shared_tables,
    ),
    Rule(
        "G-09",
        "scores scaled behind their product",
        "info",
        TENSORRT,
        "Scale the query: it is the form that every release is known to fuse.",
        _scaled_scores,
    ),
    Rule(
        "G-10",
        "output cast to float32",
        "info",
        TENSORRT,
        "Return the graph's type and convert on the host: it saves a kernel.",
        _float32_output,
    ),
    Rule(
        "G-11",
        "norm of positions that are not used",
        "info",
        TENSORRT,
        "Take the last position before the norm: one kernel instead of two over every row.",
        _late_slice,
    ),
    Rule(
        "R-02",
        "Attention over the whole cache",
        "warning",
        ("ort",),
        "Slice the cache to the valid length: ONNX Runtime computes every slot.",
        _attention_on_whole_cache,
    ),
    Rule(
        "R-03",
        "operator of TensorRT alone",
        "error",
        ("ort",),
        "Export for target ort.",
        _trt_only,
    ),
)
