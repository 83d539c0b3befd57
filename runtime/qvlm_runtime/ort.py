"""Graphs on ONNX Runtime's CPU provider; the only file that imports onnxruntime.

Buffers are NumPy arrays and bindings carry raw addresses, so an output bound to an input's piece of
a buffer is written in place: TensorScatter then touches the new rows only. Weights in external data
are found by ONNX Runtime beside the graph file.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qvlm_runtime.backend import Array, Binding, Buffer, TensorInfo
from qvlm_runtime.cores import thread_limit
from qvlm_runtime.errors import SessionError
from qvlm_runtime.prepared import prepared_entries, prepared_graph

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
_LOG_ERROR = 3  # ORT's severity scale: warnings about unused initializers are not for a user


class OrtBuffer:
    """A flat NumPy array; ``array`` is the storage itself."""

    def __init__(self, elements: int, dtype: str) -> None:
        self.array = np.zeros(elements, dtype)
        self.address = int(self.array.ctypes.data)

    def piece(self, start: int, shape: Sequence[int]) -> Array:
        """View of the piece that begins at element ``start``; ValueError if it does not fit."""
        return self.array[start : start + math.prod(shape)].reshape(shape)

    def read(self, start: int, shape: Sequence[int]) -> Array:
        """Copy of the piece that begins at element ``start``."""
        return self.piece(start, shape).copy()


class OrtBinding:
    """An ONNX Runtime IOBinding over host memory. Keeps every bound array alive."""

    def __init__(self, session: OrtSession) -> None:
        self._session = session
        self._binding = session.native().io_binding()
        self._kept: dict[str, Array] = {}

    def host(self, name: str, array: Array) -> None:
        """Bind an input to a contiguous host array."""
        self._kept[name] = array
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def fetch(self, name: str, array: Array) -> None:
        """Bind an output to a contiguous host array."""
        self._kept[name] = array
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def place(self, name: str, buffer: Buffer, start: int, shape: Sequence[int]) -> None:
        """Bind an input or output to a piece of a buffer of this session."""
        assert isinstance(buffer, OrtBuffer), "a buffer belongs to the session that made it"
        array = buffer.array
        assert start + math.prod(shape) <= array.size, "the piece leaves its buffer"
        self._kept[name] = array
        is_input = name in self._session.inputs
        bind = self._binding.bind_input if is_input else self._binding.bind_output
        address = buffer.address + start * array.itemsize
        bind(name, "cpu", 0, array.dtype.type, tuple(shape), address)

    def run(self) -> None:
        """Run the graph once."""
        try:
            self._session.native().run_with_iobinding(self._binding)
        except SessionError:
            raise
        except Exception as error:
            raise self._session.failure("run", error) from error


class OrtSession:
    """One ONNX graph. ``run`` and bindings may be used from several threads at once."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None,
        accuracy_level: int,
        profile: Path | None = None,
        prepared: Path | None = None,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise SessionError(
                f"{path}: onnxruntime is not installed ({error}). pip install 'qvlm[runtime]'"
            ) from error
        self._path = path
        self._version = onnxruntime.__version__
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _LOG_ERROR
        options.intra_op_num_threads = threads or thread_limit() or 0  # 0: ONNX Runtime's choice
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        for entry, value in _entries(accuracy_level).items():
            options.add_session_config_entry(entry, value)
        graph = path
        try:
            if prepared is not None:
                graph = prepared_graph(
                    path, prepared, self._version, accuracy_level, self._write_prepared
                )
                options.graph_optimization_level = (
                    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
                )
            self._native: Any = onnxruntime.InferenceSession(
                str(graph), options, providers=["CPUExecutionProvider"]
            )
        except SessionError:
            raise
        except Exception as error:
            raise self.failure("open", error) from error
        self.inputs = {t.name: _info(t) for t in self._native.get_inputs()}
        self.outputs = {t.name: _info(t) for t in self._native.get_outputs()}
        self._output_names = list(self.outputs)

    def _write_prepared(self, target: Path, accuracy_level: int) -> None:
        """Open the graph once so that ONNX Runtime writes what it made of it."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _LOG_ERROR
        options.optimized_model_filepath = str(target)
        for entry, value in (_entries(accuracy_level) | prepared_entries(target)).items():
            options.add_session_config_entry(entry, value)
        onnxruntime.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])

    def native(self) -> Any:
        """The InferenceSession; SessionError after close."""
        if self._native is None:
            raise SessionError(f"{self._path}: the session is closed. Load the folder again.")
        return self._native

    def failure(self, verb: str, error: Exception) -> SessionError:
        """One line for whatever ONNX Runtime raised; its exceptions share no base of their own."""
        reason = " ".join(str(error).split())
        return SessionError(
            f"{self._path}: ONNX Runtime {self._version} cannot {verb} this graph ({reason})"
        )

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run once on host arrays and return every output."""
        native = self.native()
        try:
            values = native.run(None, dict(feed))
        except Exception as error:
            raise self.failure("run", error) from error
        return dict(zip(self._output_names, values, strict=True))

    def buffer(self, elements: int, dtype: str) -> OrtBuffer:
        """Allocate zeros on the host. Pages are taken when they are first written."""
        return OrtBuffer(elements, dtype)

    def binding(self) -> Binding:
        """A fresh IOBinding."""
        return OrtBinding(self)

    def close(self) -> None:
        """Release the graph."""
        self._native = None


def _entries(accuracy_level: int) -> dict[str, str]:
    """Session config entries that change the kernels."""
    return {
        "session.qdq_matmulnbits_accuracy_level": str(accuracy_level),
        # Without VNNI the INT8 kernel adds pairs of products in 16 bits, which saturate: a tenth of
        # the result was off on AVX2. This asks for the exact kernel there, and changes nothing
        # where VNNI or AMX is present.
        "session.x64quantprecision": "1",
    }


def executed_operators(
    path: Path, feed: Mapping[str, Array], accuracy_level: int
) -> dict[str, int]:
    """How often each operator ran in one run, after ONNX Runtime's own fusions, from its profile.

    Tells whether a quantized product became MatMulNBits or MatMulIntegerToFloat. SessionError if
    the graph does not open or run.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = OrtSession(
            path, threads=None, accuracy_level=accuracy_level, profile=Path(folder) / "profile"
        )
        session.run(feed)
        events = json.loads(Path(session.native().end_profiling()).read_text(encoding="utf-8"))
        session.close()
    ran = (e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time"))
    return dict(Counter(ran))


def _info(node: Any) -> TensorInfo:
    dims = tuple(dim if isinstance(dim, int) else None for dim in node.shape)
    return TensorInfo(_DTYPES.get(node.type, node.type), dims)
