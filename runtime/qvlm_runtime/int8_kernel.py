"""Whether ONNX Runtime's INT8 product is exact on this processor, found by trying it.

Its kernel for uint8 activations and int8 weights has two kinds. With VNNI or AMX (and on ARM) sums are kept in 32 bits
and are exact. Without, pairs of products are added in 16 bits, which saturate: 255 * 127 twice is 64,770, and becomes
32,767. For such processors ONNX Runtime offers an exact kernel (``session.x64quantprecision``), and takes it wherever
it is asked to, also where the fast one is exact: on AMD Zen 4, 577 x 1024 x 4096, two threads, 311 instead of 805
billion operations a second (float32: 180). So it is asked for only where the fast one is wrong.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

# MatMulInteger (opset 10) of a uint8 [m, k] and an int8 [k, n], as a serialized ModelProto.
_PRODUCT = (
    b'\x08\x04\x12\x00:b\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x01g'
    b"Z\x15\n\x01a\x12\x10\n\x0e\x08\x02\x12\n\n\x03\x12\x01m\n\x03\x12\x01k"
    b"Z\x15\n\x01b\x12\x10\n\x0e\x08\x03\x12\n\n\x03\x12\x01k\n\x03\x12\x01n"
    b"b\x15\n\x01y\x12\x10\n\x0e\x08\x06\x12\n\n\x03\x12\x01m\n\x03\x12\x01nB\x04\n\x00\x10\n"
)
# One row takes another kernel than several.
_ROWS = (1, 8)
_COLUMNS, _DEPTH = 32, 64


@cache
def saturates(onnxruntime: Any) -> bool:
    """True if the plain kernel gets the largest product wrong here. onnxruntime: the module, or what stands for it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(_PRODUCT, options, providers=["CPUExecutionProvider"])
    weights = np.full((_DEPTH, _COLUMNS), 127, np.int8)
    wanted = 255 * 127 * _DEPTH
    return any(
        (
            session.run(None, {"a": np.full((rows, _DEPTH), 255, np.uint8), "b": weights})[0]
            != wanted
        ).any()
        for rows in _ROWS
    )
