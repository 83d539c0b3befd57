"""A bfloat16 graph as a float32 one, so that it can be replayed where bfloat16 does not run.

ONNX Runtime's CPU provider has no bfloat16 arithmetic. The twin has the same nodes and the same
constants, each bfloat16 number written as the float32 of equal value, so a replay shows whether the
graph computes what it should with the constants it has. What it does not show is the rounding of
activations to bfloat16 on the device.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from qvlm.progress import silent
from qvlm_export.weights import write_model


def float32_twin(path: Path, folder: Path) -> Path:
    """Write the twin of graph ``path`` into ``folder`` under the same name; ExportError if the disk
    refuses. One tensor is in memory at a time.
    """
    model = ir.load(path)
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype == ir.DataType.BFLOAT16 and value.const_value is not None:
            value.const_value = _widened(value.const_value)
            value.dtype = ir.DataType.FLOAT
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    twin = folder / path.name
    write_model(model, twin, silent)
    return twin


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def make() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(make, ir.DataType.FLOAT, shape, name=tensor.name)
