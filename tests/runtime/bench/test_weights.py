"""Proves that the reader of ONNX files without onnx agrees with onnx, and what it counts as read and
as multiplied: python -m pytest tests/runtime/bench/test_weights.py
"""

from math import prod
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from runtime_support import FORMS, model_spec, target_spec, toy_decoder, toy_weights

from qvlm_runtime.bench.weights import GraphWeights, graph_weights
from qvlm_runtime.errors import FolderError


def written(folder: Path, nodes: list, tensors: list, external: bool = False) -> Path:
    graph = helper.make_graph(nodes, "g", [], [], initializer=tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    path = folder / "g.onnx"
    onnx.save(model, path, save_as_external_data=external, size_threshold=0)
    return path


def tensor(name: str, *dims: int, dtype: int = TensorProto.FLOAT) -> onnx.TensorProto:
    return helper.make_tensor(name, dtype, dims, [0] * prod(dims))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("external", [False, True])
def test_a_decoder_reads_all_but_its_tables(tmp_path: Path, form: str, external: bool) -> None:
    spec = model_spec()
    path = tmp_path / "decoder.onnx"
    model = toy_decoder(spec, target_spec(form))
    onnx.save(model, path, save_as_external_data=external, size_threshold=0)
    weights = toy_weights(spec)
    products = sum(weights[n].size for n in ("wq", "wk", "wv", "wo", "head"))
    # scale and minus are scalars that are read; the two tables are only gathered from.
    assert graph_weights(path) == GraphWeights(4 * products + 8, products)


def test_integers_count_by_their_bits_and_scales_are_no_weights(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w4", "s4"], ["w"], axis=0, block_size=4),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("DequantizeLinear", ["w8", "s8"], ["v"]),
        helper.make_node("Conv", ["y", "kernel"], ["z"]),
        helper.make_node("Add", ["z", "position"], ["p"]),
    ]
    tensors = [
        tensor("w4", 8, 5, dtype=TensorProto.INT4),
        tensor("s4", 2, 5),
        tensor("w8", 5, 3, dtype=TensorProto.INT8),
        tensor("s8"),
        tensor("kernel", 2, 3, 2, 2, dtype=TensorProto.FLOAT16),
        tensor("position", 4, 3),
    ]
    found = graph_weights(written(tmp_path, nodes, tensors))
    assert found == GraphWeights(20 + 40 + 15 + 4 + 48 + 48, 40 + 15 + 24)


def test_a_tied_table_is_read_whole_and_an_unused_tensor_is_not(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Transpose", ["table"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    path = written(tmp_path, nodes, [tensor("table", 7, 4), tensor("unused", 9)])
    assert graph_weights(path) == GraphWeights(4 * 28, 28)


def test_every_type_of_onnx_has_a_size(tmp_path: Path) -> None:
    names = {"FLOAT": np.float32, "FLOAT16": np.float16, "INT64": np.int64, "INT32": np.int32}
    names |= {"UINT8": np.uint8, "INT8": np.int8, "BOOL": np.bool_, "DOUBLE": np.float64}
    for dtype in names.values():
        array = np.zeros((3, 5), dtype)
        node = helper.make_node("Neg", ["a"], ["b"])
        path = written(tmp_path, [node], [numpy_helper.from_array(array, "a")])
        assert graph_weights(path).nbytes == array.nbytes


@pytest.mark.parametrize(
    "content", [b"", b"not a protobuf at all", b"\x3a\xff\xff\xff\x7f", b"\x08"]
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(FolderError, match="not an ONNX model"):
        graph_weights(path)
    with pytest.raises(FolderError, match="not readable"):
        graph_weights(tmp_path / "absent.onnx")
