"""One GPU through cuda-python: memory, one stream, and CUDA graphs. The only file that imports cuda.

Everything a process does on the GPU goes through one ``Device``, on its one stream and under its
one lock, so the vision engine's output is in place when the decoder reads it, without the host
waiting in between. The host waits in ``synchronize`` and nowhere else.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from qvlm_runtime.backend import Array
from qvlm_runtime.errors import SessionError

# TensorRT asks it of every address; cudaMalloc gives it.
ALIGNMENT = 256

_first: dict[str, Device] = {}
_opening = threading.Lock()


def device() -> Device:
    """The process's GPU, opened at the first call. SessionError if there is none."""
    with _opening:
        if "gpu" not in _first:
            _first["gpu"] = Device()
        return _first["gpu"]


def forget_device() -> None:
    """Drop the opened GPU; what was allocated on it stays alive with its owners."""
    with _opening:
        _first.clear()


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise SessionError(
            f"CUDA: cuda-python is not installed ({error}). pip install 'qvlm[tensorrt]'"
        ) from error
    return runtime


class Memory:
    """``nbytes`` of device memory at ``address``, freed with the object."""

    def __init__(self, cuda: Any, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        # At exit the driver frees everything itself, and may be gone before this runs.
        weakref.finalize(self, cuda.cudaFree, address).atexit = False


class Device:
    """The current CUDA device. ``with`` it around every sequence of calls that must not mix.

    capability: 87 for compute capability 8.7.
    """

    def __init__(self) -> None:
        self._cuda = cuda = _runtime()
        self._lock = threading.RLock()
        self.ordinal = int(self._call("cudaGetDevice"))
        kinds = cuda.cudaDeviceAttr
        major, minor = (
            int(self._call("cudaDeviceGetAttribute", kind, self.ordinal))
            for kind in (
                kinds.cudaDevAttrComputeCapabilityMajor,
                kinds.cudaDevAttrComputeCapabilityMinor,
            )
        )
        self.capability = 10 * major + minor
        self._stream = self._call("cudaStreamCreateWithFlags", cuda.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def __enter__(self) -> Device:
        self._lock.acquire()
        self._call("cudaSetDevice", self.ordinal)  # each thread has its own current device
        return self

    def __exit__(self, *reason: object) -> None:
        self._lock.release()

    def _call(self, name: str, *args: Any) -> Any:
        """Call a function of the CUDA runtime; its value, or SessionError with CUDA's reason."""
        try:
            error, *values = getattr(self._cuda, name)(*args)
        except RuntimeError as failure:  # cuda-python's own: it finds no driver library
            raise SessionError(
                f"CUDA: {failure}, expected an NVIDIA driver. Use the backend 'ort' here."
            ) from failure
        if error != self._cuda.cudaError_t.cudaSuccess:
            old = error == self._cuda.cudaError_t.cudaErrorInsufficientDriver
            hint = " Install a cuda-bindings of the driver's CUDA generation." if old else ""
            raise SessionError(f"CUDA: {name} failed ({self._reason(error)}).{hint}")
        return values[0] if values else None

    def _reason(self, error: Any) -> str:
        _, text = self._cuda.cudaGetErrorString(error)
        return text.decode() if isinstance(text, bytes) else str(text)

    def allocate(self, nbytes: int, purpose: str) -> Memory:
        """Zeroed memory. SessionError that says what it was for and what is free, if there is none."""
        size = max(nbytes, ALIGNMENT)
        error, address = self._cuda.cudaMalloc(size)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            free, total = self.memory()
            raise SessionError(
                f"out of device memory: {purpose} needs {nbytes / 1e6:.1f} MB, {free / 1e6:.1f} of "
                f"{total / 1e6:.1f} MB are free. Close other programs, or export with a smaller "
                "--max-context."
            )
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise SessionError(f"CUDA: {purpose}: cudaMalloc failed ({self._reason(error)})")
        memory = Memory(self._cuda, int(address), nbytes)
        self._call("cudaMemsetAsync", memory.address, 0, size, self._stream)
        return memory

    def memory(self) -> tuple[int, int]:
        """Bytes free and bytes in all, of every process together."""
        _, free, total = self._cuda.cudaMemGetInfo()
        return int(free), int(total)

    def upload(self, address: int, array: Array) -> None:
        """Enqueue a copy of a contiguous host array; the array may change when this returns."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        source = array.ctypes.data
        self._call("cudaMemcpyAsync", address, source, array.nbytes, kind, self._stream)

    def download(self, array: Array, address: int) -> None:
        """Enqueue a copy into a contiguous host array; it is there after ``synchronize``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue a copy inside the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, nbytes, kind, self._stream)

    def read(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A host copy, waited for."""
        array = np.empty(shape, dtype)
        with self:
            self.download(array, address)
            self.synchronize()
        return array

    def synchronize(self) -> None:
        """Wait for everything enqueued."""
        self._call("cudaStreamSynchronize", self._stream)

    def synchronize_all(self) -> None:
        """Wait for every stream of the process, also those of other libraries."""
        self._call("cudaDeviceSynchronize")

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """An executable CUDA graph of what ``enqueue`` puts on the stream; nothing runs yet."""
        cuda = self._cuda
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except BaseException:
            # Capture must end, or the stream stays unusable; its own error says less than the first.
            cuda.cudaStreamEndCapture(self._stream)
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        """Enqueue an executable graph."""
        self._call("cudaGraphLaunch", graph, self._stream)

    def destroy(self, graph: Any) -> None:
        """Release an executable graph."""
        self._call("cudaGraphExecDestroy", graph)


class Repeated:
    """Work that becomes a CUDA graph when it repeats.

    A graph holds shapes and addresses as they were at capture. ``key`` names all of them: work
    under a new key is enqueued plainly (TensorRT needs one such run after any change), the same key
    a second time is captured, and from then on the graph is launched. Another key drops the graph.
    """

    def __init__(self, gpu: Device) -> None:
        self._gpu = gpu
        self._key: Hashable = None
        self._graph: Any = None

    def run(self, key: Hashable, enqueue: Callable[[], None]) -> None:
        """Enqueue the work, by graph where it has one."""
        if key != self._key:
            self.drop()
            enqueue()
            self._key = key
            return
        if self._graph is None:
            self._graph = self._gpu.capture(enqueue)
        self._gpu.launch(self._graph)

    def drop(self) -> None:
        """Forget the graph."""
        self._key = None
        if self._graph is not None:
            graph, self._graph = self._graph, None
            self._gpu.destroy(graph)
