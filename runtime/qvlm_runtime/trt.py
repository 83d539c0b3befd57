"""Plans on TensorRT and on TensorRT for RTX: opening them, their profiles, and one run.

The calls used exist in TensorRT 10.3 to 11.4 and in TensorRT for RTX 1.7 (a test holds the table).

One execution context per optimization profile (prefill, decode, extend), made when first needed.
Only one runs at a time, so all work in one block of device memory, as large as the largest asks.
A run sets shapes and addresses that differ from the last, enqueues, and waits once, if the host
reads something. Cache tensors are bound by address: in the append form the new rows right behind
the past; in the scatter form past and present at one address where the engine aliases them
(release 10.15 and later), else into a second buffer that changes places with the first.

A run whose shapes and addresses repeat becomes a CUDA graph. In the append form the past grows by a
row a step, so no step repeats and none is captured; the scatter form's decode step is.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qvlm_runtime.backend import Array, Buffer, DeviceArray, TensorInfo, host_dtype
from qvlm_runtime.cuda import ALIGNMENT, Memory, Repeated, device
from qvlm_runtime.errors import SessionError
from qvlm_runtime.trt_binding import Place, Shape, TrtBinding, TrtBuffer
from qvlm_runtime.trt_library import NAMES, message_log, tensorrt_module

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


@dataclass
class _Context:
    """One profile's execution context, and what was last set in it."""

    native: Any
    repeated: Repeated
    shapes: dict[str, Shape] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)


class TrtSession:
    """One plan. Bindings of several threads take turns on the device."""

    def __init__(self, path: Path, backend: str) -> None:
        self._path = path
        self._trt = trt = tensorrt_module(backend, str(path))
        self._name = f"{NAMES[backend]} {trt.__version__}"
        self._gpu = device()
        self._log = message_log(trt)
        self._contexts: dict[int, _Context] = {}
        self._arena: Memory | None = None
        with self._gpu:
            self._runtime = trt.Runtime(self._log)
            self._engine: Any = self._deserialize()
            engine = self._engine
            names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
            modes = {name: engine.get_tensor_mode(name) for name in names}
            self.inputs = self._tensors(n for n in names if modes[n] == trt.TensorIOMode.INPUT)
            self.outputs = self._tensors(n for n in names if modes[n] == trt.TensorIOMode.OUTPUT)
            self._on_host = {
                n for n in names if engine.get_tensor_location(n) == trt.TensorLocation.HOST
            }
            self._ranges = [self._profile(i) for i in range(engine.num_optimization_profiles)]
            # Absent before 10.15: those releases alias nothing.
            aliased = getattr(engine, "get_aliased_input_tensor", None)
            self._aliases = {n: aliased(n) for n in self.outputs} if aliased else {}
            need = max(
                engine.get_device_memory_size_for_profile_v2(i) for i in range(len(self._ranges))
            )
            self._arena = self._gpu.allocate(need, f"{path}: the engine's activations")

    def _deserialize(self) -> Any:
        try:
            with (
                self._path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
            ):
                engine = self._runtime.deserialize_cuda_engine(plan)
        except (OSError, ValueError) as error:
            raise SessionError(f"{self._path}: not readable ({error})") from error
        if engine is None:
            raise self._failure(
                "cannot open this plan",
                "Plans run on the release and GPU they were built for: qvlm-export build",
            )
        return engine

    def _failure(self, what: str, hint: str) -> SessionError:
        reason = self._log.errors() or "no reason given"
        return SessionError(f"{self._path}: {self._name} {what} ({reason}). {hint}")

    def _tensors(self, names: Any) -> dict[str, TensorInfo]:
        infos = {}
        for name in names:
            kind = self._engine.get_tensor_dtype(name).name
            if kind not in _DTYPES:
                raise SessionError(
                    f"{self._path}: tensor {name} is {kind}, expected one of {', '.join(_DTYPES)}. "
                    "Export with float16."
                )
            dims = tuple(int(n) for n in self._engine.get_tensor_shape(name))
            infos[name] = TensorInfo(_DTYPES[kind], tuple(None if n < 0 else n for n in dims))
        return infos

    def _profile(self, index: int) -> dict[str, tuple[Shape, Shape]]:
        """Least and largest shape of every input under one profile."""
        ranges = {}
        for name, info in self.inputs.items():
            if None in info.shape:
                least, _, most = self._engine.get_tensor_profile_shape(name, index)
                ranges[name] = tuple(map(int, least)), tuple(map(int, most))
            else:
                fixed = tuple(n for n in info.shape if n is not None)
                ranges[name] = fixed, fixed
        return ranges

    def execute(self, binding: TrtBinding) -> None:
        """Enqueue one run of a binding; wait for it only if the binding fetches an output."""
        with self._gpu as gpu:
            context = self._prepare({n: self._bound_shape(binding, n) for n in self.inputs})
            exchanged = self._addresses(context, binding)
            for name in self.inputs:
                if name in binding.hosts and name not in self._on_host:
                    gpu.upload(context.addresses[name], binding.hosts[name])
                elif name in binding.places:
                    self._into_scratch(context, binding.places[name], name)
            context.repeated.run(self._key(context, binding), lambda: self._enqueue(context))
            for name in self.outputs:
                if name in binding.hosts:
                    gpu.download(binding.hosts[name], context.addresses[name])
                elif name not in exchanged:
                    self._out_of_scratch(context, binding.places[name], name)
            for buffer in exchanged.values():
                buffer.exchange()
            fetched = any(name in binding.hosts for name in self.outputs)
            if fetched or any(place.buffer.borrowed for place in binding.places.values()):
                gpu.synchronize()

    def _bound_shape(self, binding: TrtBinding, name: str) -> Shape:
        shape = binding.shape(name)
        if shape is None:
            raise SessionError(f"{self._path}: tensor {name} is not bound, expected an array.")
        return shape

    def _prepare(self, shapes: Mapping[str, Shape]) -> _Context:
        """The context of the narrowest profile that takes these input shapes, with the shapes set."""
        if self._engine is None:
            raise SessionError(f"{self._path}: the session is closed. Load the folder again.")
        fitting = [
            (sum(math.prod(most) for _, most in ranges.values()), index)
            for index, ranges in enumerate(self._ranges)
            if all(_within(shapes[n], *ranges[n]) for n in shapes)
        ]
        if not fitting:
            raise SessionError(f"{self._path}: {self._misfit(shapes)}")
        _, index = min(fitting)
        context = self._contexts.get(index) or self._open_context(index)
        if context.shapes != shapes:
            for name, shape in shapes.items():
                if context.shapes.get(name) != shape and not context.native.set_input_shape(
                    name, shape
                ):
                    raise self._failure(f"refuses shape {list(shape)} of {name}", "Build again.")
            if missing := context.native.infer_shapes():
                raise self._failure(f"cannot infer shapes, {missing} lack a value", "Build again.")
            context.shapes = dict(shapes)
        return context

    def _misfit(self, shapes: Mapping[str, Shape]) -> str:
        """Which tensor no profile takes; the last profile is the widest."""
        for name, shape in shapes.items():
            if not any(_within(shape, *ranges[name]) for ranges in self._ranges):
                taken = " or ".join(f"{list(a)} to {list(b)}" for a, b in
                                    dict.fromkeys(r[name] for r in self._ranges))  # fmt: skip
                return f"{name} has shape {list(shape)}, expected {taken}. Use a shorter prompt."
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        return f"no profile takes the shapes {listed} together. Build the engine again."

    def _open_context(self, index: int) -> _Context:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        native = self._engine.create_execution_context(strategy)
        if native is None:
            raise self._failure("has no memory for an execution context", "Close other programs.")
        assert self._arena is not None
        native.set_device_memory(self._arena.address, self._arena.nbytes)
        if not native.set_optimization_profile_async(index, self._gpu.stream):
            raise self._failure(f"refuses profile {index}", "Build the engine again.")
        context = self._contexts[index] = _Context(native, Repeated(self._gpu))
        return context

    def _addresses(self, context: _Context, binding: TrtBinding) -> dict[str, TrtBuffer]:
        """Set every address; the outputs that go to a twin, with the buffers to exchange after."""
        exchanged: dict[str, TrtBuffer] = {}
        taken = {p.address: n for n, p in binding.places.items() if n in self.inputs and p.nbytes}
        for name in (*self.inputs, *self.outputs):
            shape = self._bound_shape(binding, name)
            if name in self.outputs:
                expected = tuple(int(n) for n in context.native.get_tensor_shape(name))
                if shape != expected:
                    raise SessionError(
                        f"{self._path}: {name} is bound with shape {list(shape)}, the engine gives "
                        f"{list(expected)}. Export again with this version of qvlm."
                    )
            place = binding.places.get(name)
            if place is None:
                array = binding.hosts[name]
                address = (
                    int(array.ctypes.data)
                    if name in self._on_host
                    else binding.staging(self._gpu, name, array.nbytes)
                )
            elif name in self.outputs and taken.get(place.address, name) != name:
                if self._aliases.get(name) == taken[place.address]:
                    address = place.address
                else:
                    address = place.buffer.twin_address()
                    exchanged[name] = place.buffer
            elif place.address % ALIGNMENT and place.nbytes:
                address = binding.staging(self._gpu, name, place.nbytes)
            else:
                address = place.address - place.address % ALIGNMENT
            if context.addresses.get(name) != address:
                if not context.native.set_tensor_address(name, address):
                    raise self._failure(f"refuses the address of {name}", "Report this.")
                context.addresses[name] = address
        return exchanged

    def _into_scratch(self, context: _Context, place: Place, name: str) -> None:
        if place.nbytes and context.addresses[name] != place.address:
            self._gpu.copy(context.addresses[name], place.address, place.nbytes)

    def _out_of_scratch(self, context: _Context, place: Place, name: str) -> None:
        if place.nbytes and context.addresses[name] != place.address:
            self._gpu.copy(place.address, context.addresses[name], place.nbytes)

    def _key(self, context: _Context, binding: TrtBinding) -> Hashable:
        """Everything a captured run fixes: shapes, addresses, and shape values read on the host."""
        values = tuple(binding.hosts[n].tobytes() for n in sorted(self._on_host & set(self.inputs)))
        return (
            tuple(context.shapes.items()),
            tuple(sorted(context.addresses.items())),
            values,
        )

    def _enqueue(self, context: _Context) -> None:
        if not context.native.execute_async_v3(self._gpu.stream):
            raise self._failure("cannot run this plan", "Build the engine again.")

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run once on host arrays and return every output."""
        binding = TrtBinding(self.execute)
        for name, array in feed.items():
            binding.host(name, np.ascontiguousarray(array))
        with self._gpu:
            context = self._prepare({n: self._bound_shape(binding, n) for n in self.inputs})
            results = {}
            for name, info in self.outputs.items():
                shape = tuple(int(n) for n in context.native.get_tensor_shape(name))
                results[name] = np.empty(shape, host_dtype(info.dtype))
                binding.fetch(name, results[name])
            self.execute(binding)
        return results

    def buffer(self, elements: int, dtype: str) -> TrtBuffer:
        """Allocate zeros on the device; bfloat16 is read back as its bits."""
        with self._gpu:
            size = elements * host_dtype(dtype).itemsize
            memory = self._gpu.allocate(size, "a buffer of the cache or of image features")
        return TrtBuffer(self._gpu, memory, elements, dtype)

    def upload(self, array: Array) -> TrtBuffer:
        """A device copy of a host array."""
        dense = np.ascontiguousarray(array)
        buffer = self.buffer(dense.size, dense.dtype.name)
        with self._gpu:
            self._gpu.upload(buffer.address, dense)
        return buffer

    def join(self, buffers: Sequence[Buffer]) -> TrtBuffer:
        """One buffer from several, copied inside the device."""
        pieces = [buffer for buffer in buffers if isinstance(buffer, TrtBuffer)]
        assert len(pieces) == len(buffers), "a buffer belongs to the backend that made it"
        joined = self.buffer(sum(piece.elements for piece in pieces), pieces[0].dtype.name)
        at = joined.address
        with self._gpu:
            for piece in pieces:
                size = piece.elements * piece.itemsize
                self._gpu.copy(at, piece.address, size)
                at += size
        return joined

    def borrow(self, array: DeviceArray) -> TrtBuffer:
        """A buffer over another library's CUDA memory. Waits for the work that library enqueued."""
        with self._gpu:
            self._gpu.synchronize_all()
        return TrtBuffer(self._gpu, array, math.prod(array.shape), array.dtype)

    def in_place(self, output: str, source: str) -> bool:
        """True where the engine says that it writes the output over the input (10.15 and later)."""
        return self._aliases.get(output) == source

    def binding(self) -> TrtBinding:
        """A fresh binding."""
        return TrtBinding(self.execute)

    def close(self) -> None:
        """Release contexts, engine and activations."""
        with self._gpu:
            self._gpu.synchronize()
            for context in self._contexts.values():
                context.repeated.drop()
            self._contexts.clear()
            self._engine = None
            self._runtime = None
            self._arena = None


def _within(shape: Shape, least: Shape, most: Shape) -> bool:
    return len(shape) == len(least) and all(
        a <= n <= b for n, a, b in zip(shape, least, most, strict=True)
    )
