"""What the runtime asks of an inference engine: the Session protocol, and open_session.

An engine owns its memory (``Buffer``), so a cache lives where the engine computes and the same
cache code drives a CPU and a GPU. A ``Binding`` belongs to one generation; a ``Session`` is shared
by all of them and is safe to use from several threads, each with its own binding. Sessions of one
backend share their memory: a buffer of one may be placed in a binding of another, so image features
go from the vision graph to the decoder without leaving the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime.errors import SessionError

Array = NDArray[Any]

# ONNX Runtime's `session.qdq_matmulnbits_accuracy_level`. 4 quantizes the activations of an INT4
# MatMul to int8 inside the kernel: twice the decode speed on a CPU, for a relative error of about
# 5e-3 in that product. 1 keeps them in float32: what a replay of goldens must use, because there
# the kernel's own rounding would hide the exporter's. No other engine reads this number.
FAST = 4
EXACT = 1

# Engines that run graphs, and engines that run plans built for one GPU.
GRAPH_BACKENDS = ("ort", "ort-cuda")
PLAN_BACKENDS = ("tensorrt", "tensorrt-rtx")
BACKENDS = GRAPH_BACKENDS + PLAN_BACKENDS


@dataclass(frozen=True)
class TensorInfo:
    """One graph input or output: numpy's dtype name, and dims (an int, or None if dynamic)."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class DeviceArray:
    """A dense C-ordered array in another library's CUDA memory. ``owner`` keeps it alive."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    owner: Any


class Buffer(Protocol):
    """A dense allocation of one dtype in the engine's memory, zero at first."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""

    def read(self, start: int, shape: Sequence[int]) -> Array:
        """Copy of the piece that begins at element ``start``."""


@runtime_checkable
class HostBuffer(Buffer, Protocol):
    """A buffer in host memory, which may be written where it is."""

    def piece(self, start: int, shape: Sequence[int]) -> Array:
        """View of the piece that begins at element ``start``."""


class Binding(Protocol):
    """The tensors of one stream of runs. What was bound stays bound until it is bound again."""

    def host(self, name: str, array: Array) -> None:
        """Bind an input to a contiguous host array. It is read at every run, not here."""

    def fetch(self, name: str, array: Array) -> None:
        """Bind an output to a contiguous host array, filled by every run."""

    def place(self, name: str, buffer: Buffer, start: int, shape: Sequence[int]) -> None:
        """Bind an input or output to a piece of a buffer. Several names may share one piece."""

    def run(self) -> None:
        """Run the graph once. SessionError names the graph and the reason."""


class Session(Protocol):
    """One opened graph or engine."""

    @property
    def inputs(self) -> Mapping[str, TensorInfo]:
        """Graph inputs by name."""

    @property
    def outputs(self) -> Mapping[str, TensorInfo]:
        """Graph outputs by name."""

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run once on host arrays and return every output. SessionError on failure."""

    def buffer(self, elements: int, dtype: str) -> Buffer:
        """Allocate ``elements`` zeros."""

    def upload(self, array: Array) -> Buffer:
        """A buffer that holds a host array's elements. The array must not change afterwards."""

    def join(self, buffers: Sequence[Buffer]) -> Buffer:
        """A new buffer with the elements of several of one dtype, one behind the other."""

    def borrow(self, array: DeviceArray) -> Buffer:
        """A buffer over memory of another library. SessionError if it is not this engine's kind."""

    def in_place(self, output: str, source: str) -> bool:
        """Whether ``output`` may be placed where input ``source`` is; where not, binding both to one
        buffer makes the engine keep a second one as large.
        """

    def binding(self) -> Binding:
        """A fresh binding, for one thread."""

    def close(self) -> None:
        """Release the graph; a later run raises SessionError."""


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    accuracy_level: int = FAST,
    backend: str = "ort",
    prepared: Path | None = None,
) -> Session:
    """Open a graph (backends ort, ort-cuda) or a plan (tensorrt, tensorrt-rtx).

    ``threads`` None leaves the number to the engine. prepared: a folder where ONNX Runtime keeps its
    own form of the graph for the CPU, see prepared.py; other backends keep none. SessionError if it
    fails.
    """
    if backend in GRAPH_BACKENDS:
        from qvlm_runtime.ort import OrtSession

        on_gpu = backend == "ort-cuda"
        return OrtSession(
            path,
            threads=threads,
            accuracy_level=accuracy_level,
            on_gpu=on_gpu,
            prepared=None if on_gpu else prepared,
        )
    if backend in PLAN_BACKENDS:
        from qvlm_runtime.trt import TrtSession

        return TrtSession(path, backend)
    raise SessionError(f"{path}: no backend {backend!r}, expected one of {', '.join(BACKENDS)}")


def missing_tensors(
    session: Session, where: str, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    """SessionError naming the tensors of the folder contract that a graph lacks or adds."""
    for kind, has, wants in (
        ("inputs", set(session.inputs), set(inputs)),
        ("outputs", set(session.outputs), set(outputs)),
    ):
        if has != wants:
            raise SessionError(
                f"{where}: {kind} differ from the folder contract; absent {sorted(wants - has)}, "
                f"unknown {sorted(has - wants)}. Export again with this version of qvlm."
            )


def host_dtype(name: str) -> np.dtype[Any]:
    """NumPy's type for a tensor type; bfloat16, which NumPy lacks, as its bits in uint16."""
    return np.dtype("uint16" if name == "bfloat16" else name)


def as_host(value: Any, dtype: str | np.dtype[Any]) -> Array:
    """A C-contiguous array of that dtype, without a copy where it already is one.

    bfloat16 comes as its bits (uint16), rounded to nearest even; bits go through as they are.
    """
    if dtype != "bfloat16":
        return np.ascontiguousarray(value, dtype=dtype)
    if np.asarray(value).dtype == np.uint16:
        return np.ascontiguousarray(value)
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def as_float32(array: Array, dtype: str) -> NDArray[np.float32]:
    """A float32 copy of what the engine gave in ``dtype``."""
    if dtype != "bfloat16":
        return array.astype(np.float32)
    return (array.astype(np.uint32) << 16).view(np.float32)
