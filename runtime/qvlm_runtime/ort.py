"""Graphs on ONNX Runtime's CPU and CUDA providers; the only file that imports onnxruntime.

Bindings carry raw addresses, so an output bound to an input's piece of a buffer is written in
place: TensorScatter then touches the new rows only. Buffers are NumPy arrays on the CPU and
OrtValues in device memory with CUDA, where the cache and the image features stay. Weights in
external data are found by ONNX Runtime beside the graph file.
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

from qvlm_runtime import cuda
from qvlm_runtime.backend import Array, Binding, Buffer, DeviceArray, TensorInfo
from qvlm_runtime.cores import thread_limit
from qvlm_runtime.errors import SessionError
from qvlm_runtime.freed_memory import give_back
from qvlm_runtime.int8_kernel import saturates
from qvlm_runtime.prepared import kept_graph, prepared_entries, prepared_graph

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

    device = "cpu"

    def __init__(self, array: Array) -> None:
        self.array = array.reshape(-1)
        self.address = int(self.array.ctypes.data)
        self.size, self.dtype = self.array.size, self.array.dtype
        self.nbytes = self.array.nbytes

    def piece(self, start: int, shape: Sequence[int]) -> Array:
        """View of the piece that begins at element ``start``; ValueError if it does not fit."""
        return self.array[start : start + math.prod(shape)].reshape(shape)

    def read(self, start: int, shape: Sequence[int]) -> Array:
        """Copy of the piece that begins at element ``start``."""
        return self.piece(start, shape).copy()


class OrtCudaBuffer:
    """A flat piece of CUDA memory: an OrtValue's, or another library's."""

    device = "cuda"

    def __init__(self, value: Any, address: int, size: int, dtype: str) -> None:
        self._value = value  # keeps the memory
        self.address = address
        self.size, self.dtype = size, np.dtype(dtype)
        self.nbytes = size * self.dtype.itemsize

    def read(self, start: int, shape: Sequence[int]) -> Array:
        """Copy of the piece that begins at element ``start``; the whole buffer is copied for it."""
        array: Array = self._value.numpy()
        return array[start : start + math.prod(shape)].reshape(shape).copy()


class OrtBinding:
    """An ONNX Runtime IOBinding over raw addresses. Keeps everything bound alive."""

    def __init__(self, session: OrtSession) -> None:
        self._session = session
        self._binding = session.native().io_binding()
        self._kept: dict[str, Any] = {}
        self._hosts: dict[str, Array] = {}

    def host(self, name: str, array: Array) -> None:
        """Bind an input to a contiguous host array."""
        self._kept[name] = array
        if self._session.device == "cuda":
            self._hosts[name] = array
        else:
            self._bind_host(name, array)

    def _bind_host(self, name: str, array: Array) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def fetch(self, name: str, array: Array) -> None:
        """Bind an output to a contiguous host array."""
        self._kept[name] = array
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def place(self, name: str, buffer: Buffer, start: int, shape: Sequence[int]) -> None:
        """Bind an input or output to a piece of a buffer of this backend."""
        assert isinstance(buffer, OrtBuffer | OrtCudaBuffer), "a buffer belongs to its backend"
        assert start + math.prod(shape) <= buffer.size, "the piece leaves its buffer"
        self._kept[name] = buffer
        self._hosts.pop(name, None)
        is_input = name in self._session.inputs
        bind = self._binding.bind_input if is_input else self._binding.bind_output
        address = buffer.address + start * buffer.dtype.itemsize
        bind(name, buffer.device, 0, buffer.dtype.type, tuple(shape), address)

    def run(self) -> None:
        """Run the graph once."""
        try:
            # With CUDA a host input is copied to the device when it is bound, not when it is used.
            for name, array in self._hosts.items():
                self._bind_host(name, array)
            if self._session.device == "cuda":
                self._binding.synchronize_inputs()
            self._session.native().run_with_iobinding(self._binding)
            if self._session.device == "cuda":
                self._binding.synchronize_outputs()
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
        on_gpu: bool = False,
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
        self._module = onnxruntime
        self._version = onnxruntime.__version__
        self.device = "cuda" if on_gpu else "cpu"
        provider = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise SessionError(
                f"{path}: ONNX Runtime {self._version} has no {provider}. "
                "pip install onnxruntime-gpu in place of onnxruntime."
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _LOG_ERROR
        options.intra_op_num_threads = threads or thread_limit() or 0  # 0: ONNX Runtime's choice
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        self._entries = _entries(onnxruntime, accuracy_level)
        for entry, value in self._entries.items():
            options.add_session_config_entry(entry, value)
        graph = path
        try:
            if prepared is not None:
                graph = prepared_graph(
                    path, prepared, self._version, self._entries, self._write_prepared
                )
                options.graph_optimization_level = (
                    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
                )
            self._native: Any = onnxruntime.InferenceSession(
                str(graph), options, providers=[provider]
            )
        except SessionError:
            raise
        except Exception as error:
            raise self.failure("open", error) from error
        if provider not in self._native.get_providers():
            # It goes on with the CPU provider after a warning in its log.
            raise SessionError(
                f"{path}: ONNX Runtime {self._version} cannot start {provider}, expected a GPU, its "
                "driver, CUDA and cuDNN. Use the backend 'ort' here."
            )
        give_back()
        self.inputs = {t.name: _info(t) for t in self._native.get_inputs()}
        self.outputs = {t.name: _info(t) for t in self._native.get_outputs()}
        self._output_names = list(self.outputs)

    def _write_prepared(self, target: Path) -> None:
        """Open the graph once so that ONNX Runtime writes what it made of it."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _LOG_ERROR
        options.optimized_model_filepath = str(target)
        for entry, value in (self._entries | prepared_entries(target)).items():
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

    def buffer(self, elements: int, dtype: str) -> Buffer:
        """Allocate zeros. On the host, pages are taken when they are first written."""
        return self.upload(np.zeros(elements, dtype))

    def upload(self, array: Array) -> Buffer:
        """The array itself on the CPU, a device copy with CUDA."""
        flat = np.ascontiguousarray(array).reshape(-1)
        if self.device == "cpu":
            return OrtBuffer(flat)
        try:
            value = self._module.OrtValue.ortvalue_from_numpy(flat, "cuda", 0)
        except Exception as error:
            raise self.failure(f"allocate {flat.nbytes / 1e6:.1f} MB for", error) from error
        return OrtCudaBuffer(value, value.data_ptr(), flat.size, flat.dtype.name)

    def join(self, buffers: Sequence[Buffer]) -> Buffer:
        """One buffer from several. ONNX Runtime copies between the device and the host only, so
        with CUDA the pieces pass through the host.
        """
        pieces = []
        for buffer in buffers:
            assert isinstance(buffer, OrtBuffer | OrtCudaBuffer), "a buffer belongs to its backend"
            pieces.append(buffer.read(0, (buffer.size,)))
        return self.upload(np.concatenate(pieces))

    def borrow(self, array: DeviceArray) -> Buffer:
        """A buffer over another library's CUDA memory; waits for the work that library enqueued.

        SessionError on the CPU, or without cuda-python, which does the waiting.
        """
        if self.device == "cpu":
            raise SessionError(
                f"{self._path}: an image in CUDA memory, expected one on the host. "
                "Load with a CUDA backend, or copy the image to the host."
            )
        with cuda.device() as gpu:
            gpu.synchronize_all()
        return OrtCudaBuffer(array, array.address, math.prod(array.shape), array.dtype)

    def in_place(self, output: str, source: str) -> bool:
        """True: TensorScatter is told to write over its input, and every other output has its own
        place.
        """
        return True

    def binding(self) -> Binding:
        """A fresh IOBinding."""
        return OrtBinding(self)

    def close(self) -> None:
        """Release the graph."""
        self._native = None


def _entries(onnxruntime: Any, accuracy_level: int) -> dict[str, str]:
    """Session config entries that change the kernels."""
    return {
        "session.qdq_matmulnbits_accuracy_level": str(accuracy_level),
        "session.x64quantprecision": "1" if saturates(onnxruntime) else "0",
    }


def has_prepared(path: Path, folder: Path, accuracy_level: int) -> bool:
    """Whether ``folder`` holds the prepared form of the graph at ``path`` for this machine."""
    try:
        import onnxruntime
    except ImportError:  # opening the graph says so
        return False
    return kept_graph(
        path, folder, onnxruntime.__version__, _entries(onnxruntime, accuracy_level)
    ).is_file()


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
