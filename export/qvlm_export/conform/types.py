"""Rules on number formats: what a tensor may be, and which types an operator may mix (strong typing)."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from qvlm_export.conform.rule import ONLY_10_3, TENSORRT, Breach, Consumer, Rule, breach
from qvlm_export.conform.view import GraphView, attribute, dtype_name, label

FLOAT8 = {
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E5M2FNUZ,
}
QUANTIZED = {TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT4E2M1} | FLOAT8
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_NOT_IMPORTED = {
    TensorProto.UINT4,
    TensorProto.INT16,
    TensorProto.UINT16,
    TensorProto.UINT32,
    TensorProto.UINT64,
    TensorProto.STRING,
    TensorProto.COMPLEX64,
    TensorProto.COMPLEX128,
}
# Inputs that must agree: slice of the inputs that hold data.
_SAME_TYPE = {
    **dict.fromkeys(
        ("MatMul", "Add", "Mul", "Sub", "Div", "Max", "Min", "Sum", "Mean"), slice(None)
    ),
    **dict.fromkeys(("Gemm", "Conv", "ConvTranspose", "Concat", "PRelu"), slice(None)),
    **dict.fromkeys(("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"), slice(None)),
    "Where": slice(1, None),
}
# First GPU generation with BFLOAT16 and INT4 weights.
_BFLOAT16_SM = 80
# Operators that may read a quantized tensor; cast is for INT8 alone.
_QUANTIZED_READERS = {"DequantizeLinear", "QuantizeLinear"}


def _initializer_type(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for name, tensor in view.initializers.items():
        if tensor.data_type in _NOT_IMPORTED:
            found = dtype_name(tensor.data_type)
            node = next(iter(view.consumers(name)), None)
            allowed = "FLOAT, FLOAT16, BFLOAT16, INT64, INT32, BOOL, or INT8, INT4, FLOAT8 in front of DequantizeLinear"
            yield Breach(label(node) if node else "", name, found, allowed)


def _quantized_reader(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.nodes:
        if node.op_type in _QUANTIZED_READERS or node.op_type.startswith("TRT_"):
            continue
        for name in node.input:
            dtype = view.dtype(name) if name else None
            if dtype in QUANTIZED and not (node.op_type == "Cast" and dtype == TensorProto.INT8):
                found = f"{dtype_name(dtype)} tensor read by {node.op_type}"
                yield breach(node, name, found, "read by DequantizeLinear only")


def _mixed_types(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops(*_SAME_TYPE):
        names = [name for name in list(node.input)[_SAME_TYPE[node.op_type]] if name]
        found = {view.dtype(name) for name in names} - {None}
        if len(found) > 1:
            listing = ", ".join(f"{name} {dtype_name(view.dtype(name))}" for name in names)
            yield breach(node, names[-1], f"{node.op_type} of {listing}", "one type")


def _norm_types(view: GraphView, _: Consumer) -> Iterator[Breach]:
    norms = (
        "LayerNormalization",
        "InstanceNormalization",
        "RMSNormalization",
        "GroupNormalization",
    )
    for node in view.ops(*norms):
        data = view.dtype(node.input[0])
        for name in node.input[1:]:
            found = view.dtype(name) if name else None
            if None not in (data, found) and found != data:
                yield breach(node, name, dtype_name(found), f"{dtype_name(data)}, as the data")


def _rank(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.nodes:
        for name in node.output:
            rank = view.rank(name) if name else None
            if rank is not None and rank > 8:
                yield breach(node, name, f"rank {rank}", "at most 8")


def _double(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for name, tensor in view.initializers.items():
        if tensor.data_type == TensorProto.DOUBLE:
            yield Breach("", name, "DOUBLE initializer", "FLOAT (TensorRT stores it as FLOAT)")
    for node in view.nodes:
        for name in node.output:
            if view.dtype(name) == TensorProto.DOUBLE and not view.is_initializer(name):
                yield breach(node, name, "DOUBLE tensor", "FLOAT (TensorRT computes it as FLOAT)")


def _range_types(view: GraphView, _: Consumer) -> Iterator[Breach]:
    allowed = {TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT}
    for node in view.ops("Range"):
        found = {view.dtype(name) for name in node.input} - {None}
        if len(found) > 1 or not found <= allowed:
            names = ", ".join(sorted(dtype_name(dtype) for dtype in found))
            yield breach(node, node.output[0], f"Range of {names}", "one of INT32, INT64, FLOAT")


def _uint8(view: GraphView, _: Consumer) -> Iterator[Breach]:
    readers = _QUANTIZED_READERS | {"Cast"}
    for node in view.nodes:
        for name in node.input:
            if name and view.dtype(name) == TensorProto.UINT8 and node.op_type not in readers:
                yield breach(
                    node, name, f"UINT8 tensor read by {node.op_type}", "read by Cast only"
                )


def _cast_type(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("Cast"):
        to = attribute(node, "to", 0)
        if to in _NOT_IMPORTED | QUANTIZED - {TensorProto.INT8}:
            yield breach(
                node,
                node.output[0],
                f"Cast to {dtype_name(to)}",
                "QuantizeLinear, or a stored tensor",
            )


def _four_bit_float(view: GraphView, _: Consumer) -> Iterator[Breach]:
    number = {TensorProto.FLOAT4E2M1, getattr(TensorProto, "FLOAT8E8M0", TensorProto.FLOAT4E2M1)}
    for name, tensor in view.initializers.items():
        if tensor.data_type in number:
            yield Breach("", name, dtype_name(tensor.data_type), "INT4, INT8 or FLOAT8E4M3FN")
    for node in view.nodes:
        for name in node.output:
            if view.dtype(name) in number and not view.is_initializer(name):
                yield breach(node, name, dtype_name(view.dtype(name)), "INT4, INT8 or FLOAT8E4M3FN")


def _float32_product(view: GraphView, _: Consumer) -> Iterator[Breach]:
    for node in view.ops("MatMul", "Gemm", "Conv", "ConvTranspose"):
        name = node.input[1]
        if view.is_initializer(name) and view.dtype(name) == TensorProto.FLOAT:
            yield breach(node, name, "FLOAT weight", "FLOAT16, BFLOAT16 or quantized")


def _old_hardware(view: GraphView, consumer: Consumer) -> Iterator[Breach]:
    old = [sm for sm in consumer.sm if sm < _BFLOAT16_SM]
    if not old:
        return
    for name in (
        *view.initializers,
        *view.inputs,
        *(n for node in view.nodes for n in node.output),
    ):
        if view.dtype(name) in (TensorProto.BFLOAT16, TensorProto.INT4):
            node = view.producer(name) or next(iter(view.consumers(name)), None)
            found = f"{dtype_name(view.dtype(name))} on sm{old[0]}"
            yield Breach(
                label(node) if node else "", name, found, f"FLOAT16 or INT8 below sm{_BFLOAT16_SM}"
            )


RULES: tuple[Rule, ...] = (
    Rule(
        "T-01",
        "initializer of a type that cannot be imported",
        "error",
        TENSORRT,
        "Store it as INT64, INT32 or a float type; 4-bit weights as INT4.",
        _initializer_type,
    ),
    Rule(
        "T-02",
        "quantized tensor read by something other than DequantizeLinear",
        "error",
        TENSORRT,
        "Put DequantizeLinear directly behind it, e.g. Gather(DequantizeLinear(table)), not the reverse.",
        _quantized_reader,
    ),
    Rule(
        "T-03",
        "operands of different types",
        "error",
        TENSORRT,
        "Cast one of them: with strong typing nothing is converted silently.",
        _mixed_types,
    ),
    Rule(
        "T-04",
        "normalization scale or bias of another type than the data",
        "error",
        TENSORRT,
        "Store scale and bias in the type of the data.",
        _norm_types,
    ),
    Rule(
        "T-05",
        "more than eight dimensions",
        "error",
        TENSORRT,
        "Reshape to fewer dimensions.",
        _rank,
    ),
    Rule("T-06", "DOUBLE tensors", "warning", TENSORRT, "Compute in FLOAT.", _double),
    Rule(
        "T-07",
        "Range of other or mixed types",
        "error",
        TENSORRT,
        "Give start, limit and delta in one of INT32, INT64, FLOAT.",
        _range_types,
    ),
    Rule(
        "T-08",
        "UINT8 tensor used before a Cast",
        "error",
        TENSORRT,
        "UINT8 is a type of network inputs and outputs only: Cast it first.",
        _uint8,
    ),
    Rule(
        "T-09",
        "Cast to a type without arithmetic",
        "error",
        TENSORRT,
        "Quantize with QuantizeLinear, or store the tensor in this type.",
        _cast_type,
    ),
    Rule(
        "T-10",
        "4-bit or 8-bit exponent float before 10.8",
        "error",
        ONLY_10_3,
        "Use INT4 or INT8 weights on this release.",
        _four_bit_float,
    ),
    Rule(
        "T-11",
        "float32 weights",
        "info",
        TENSORRT,
        "Export float weights as FLOAT16: float32 products cost twice the memory and most of the speed.",
        _float32_product,
    ),
    Rule(
        "T-12",
        "BFLOAT16 or INT4 without hardware",
        "error",
        TENSORRT,
        "Export FLOAT16 with INT8 weights for this device.",
        _old_hardware,
    ),
)
