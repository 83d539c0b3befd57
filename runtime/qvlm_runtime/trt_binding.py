"""What one stream of TensorRT runs is bound to: device memory, pieces of it, and host arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qvlm_runtime.backend import Array, Buffer, DeviceArray, host_dtype
from qvlm_runtime.cuda import Device, Memory

Shape = tuple[int, ...]


class TrtBuffer:
    """Device memory of one dtype, with the second half of a double buffer once one is needed."""

    def __init__(self, gpu: Device, memory: Memory | DeviceArray, elements: int, dtype: str):
        self._gpu = gpu
        self._memory = memory
        self._twin: Memory | None = None
        self.elements = elements
        self.dtype = host_dtype(dtype)
        self.itemsize = self.dtype.itemsize
        self.nbytes = elements * self.itemsize

    @property
    def address(self) -> int:
        """Where element 0 is now."""
        return self._memory.address

    @property
    def borrowed(self) -> bool:
        """Whether another library owns the memory, and may reuse it as soon as it is let go."""
        return isinstance(self._memory, DeviceArray)

    def read(self, start: int, shape: Sequence[int]) -> Array:
        """Copy of the piece that begins at element ``start``."""
        return self._gpu.read(self.address + start * self.itemsize, tuple(shape), self.dtype)

    def twin_address(self) -> int:
        """Where a graph that cannot write in place puts the next contents."""
        if self._twin is None:
            self._twin = self._gpu.allocate(self.nbytes, "the second buffer of the cache")
        return self._twin.address

    def exchange(self) -> None:
        """The twin holds the contents now."""
        assert self._twin is not None and isinstance(self._memory, Memory)
        self._memory, self._twin = self._twin, self._memory


@dataclass
class Place:
    """A piece of a buffer; its address follows the buffer's."""

    buffer: TrtBuffer
    start: int
    shape: Shape

    @property
    def address(self) -> int:
        return self.buffer.address + self.start * self.buffer.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.buffer.itemsize


class TrtBinding:
    """Tensors of one stream of runs: host arrays with a device copy, and pieces of buffers."""

    def __init__(self, execute: Callable[[TrtBinding], None]) -> None:
        self._execute = execute
        self.hosts: dict[str, Array] = {}
        self.places: dict[str, Place] = {}
        self._staging: dict[str, Memory] = {}

    def host(self, name: str, array: Array) -> None:
        """Bind an input to a contiguous host array, copied to the device at every run."""
        self.places.pop(name, None)
        self.hosts[name] = array

    def fetch(self, name: str, array: Array) -> None:
        """Bind an output to a contiguous host array, filled by every run."""
        self.host(name, array)

    def place(self, name: str, buffer: Buffer, start: int, shape: Sequence[int]) -> None:
        """Bind an input or output to a piece of a buffer of this backend."""
        assert isinstance(buffer, TrtBuffer), "a buffer belongs to the backend that made it"
        assert start + math.prod(shape) <= buffer.elements, "the piece leaves its buffer"
        self.hosts.pop(name, None)
        self.places[name] = Place(buffer, start, tuple(shape))

    def run(self) -> None:
        """Run the engine once."""
        self._execute(self)

    def shape(self, name: str) -> Shape | None:
        """Shape of what is bound to ``name``."""
        if name in self.places:
            return self.places[name].shape
        return self.hosts[name].shape if name in self.hosts else None

    def staging(self, gpu: Device, name: str, nbytes: int) -> int:
        """Address of this binding's own device memory for ``name``; it grows, and is kept."""
        memory = self._staging.get(name)
        if memory is None or memory.nbytes < nbytes:
            memory = self._staging[name] = gpu.allocate(nbytes, f"the copy of {name}")
        return memory.address
