"""The INT8 product is exact, and the slow kernel is asked for only where the fast one is not."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qvlm_runtime import int8_kernel, ort
from qvlm_runtime.backend import EXACT, open_session
from qvlm_runtime.int8_kernel import saturates

ENTRY = "session.x64quantprecision"


def test_the_product_that_is_tried_is_a_matmulinteger() -> None:
    model = onnx.load_from_string(int8_kernel._PRODUCT)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["MatMulInteger"]
    types_ = [value.type.tensor_type.elem_type for value in model.graph.input]
    assert types_ == [TensorProto.UINT8, TensorProto.INT8]


class Product:
    """A kernel: the exact result, or what pairs added in 16 bits make of it."""

    def __init__(self, wrong_rows: int) -> None:
        self.wrong_rows = wrong_rows

    def run(self, outputs: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        a, b = feed["a"].astype(np.int64), feed["b"].astype(np.int64)
        products = a[:, :, None] * b[None]
        if len(a) == self.wrong_rows:
            pairs = products.reshape(len(a), -1, 2, b.shape[1]).sum(2)
            return [np.clip(pairs, -(2**15), 2**15 - 1).sum(1)]
        return [products.sum(1)]


def module(wrong_rows: int) -> Any:
    found: Any = types.ModuleType("onnxruntime")
    found.SessionOptions = onnxruntime.SessionOptions
    found.InferenceSession = lambda *_, **__: Product(wrong_rows)
    return found


@pytest.mark.parametrize(("wrong_rows", "expected"), [(0, False), (1, True), (8, True)])
def test_a_wrong_kernel_is_found_whether_it_is_for_one_row_or_for_several(
    wrong_rows: int, expected: bool
) -> None:
    assert saturates(module(wrong_rows)) is expected


def test_it_agrees_with_the_processors_flags() -> None:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("no x86 flags here")
    assert saturates(onnxruntime) is not bool({"avx512_vnni", "avx_vnni"} & set(flags))


def write_linear(path: Path, rows: int) -> None:
    """x [rows, 64] in INT8, a weight of 127 everywhere: the form ``w8a8`` graphs have."""
    initializers = [
        numpy_helper.from_array(np.full((64, 32), 127, np.int8), "w"),
        numpy_helper.from_array(np.float32(1), "one"),
        numpy_helper.from_array(np.int8(0), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["w", "one", "zero"], ["wq"]),
        helper.make_node("MatMul", ["xq", "wq"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 64])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, 32])]
    graph = helper.make_graph(nodes, "linear", inputs, outputs, initializers)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path
    )


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_the_largest_product_is_exact(tmp_path: Path, rows: int) -> None:
    """It needs 24 bits: every float32 on the way is exact."""
    write_linear(tmp_path / "linear.onnx", rows)
    session = open_session(tmp_path / "linear.onnx", threads=1, accuracy_level=EXACT)
    assert (session.run({"x": np.full((rows, 64), 127, np.float32)})["y"] == 127 * 127 * 64).all()


@pytest.mark.parametrize(("wrong", "asked"), [(True, "1"), (False, "0")])
def test_the_exact_kernel_is_asked_for_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool, asked: str
) -> None:
    write_linear(tmp_path / "linear.onnx", 1)
    monkeypatch.setattr(ort, "saturates", lambda _: wrong)
    session = ort.OrtSession(tmp_path / "linear.onnx", threads=1, accuracy_level=EXACT)
    options = session.native().get_session_options()
    assert options.get_session_config_entry(ENTRY) == asked
