"""The key/value cache of one generation, in the three forms of the folder contract (manifest.py).

scatter  one buffer [1, kv_heads, C, head_dim] per tensor, bound as past and as present: the graph
         writes its new rows in place and is told where (write_index) and how far to read (kv_len).
grown    the same on the CPU for a graph that reads all of C: the buffer has room for the capacity
         and is bound as a view of C rows, C the next multiple of STEP. Values are columns,
         [1, kv_heads, head_dim, C].
append   one sequence-major buffer [1, C, kv_heads, head_dim] per tensor: the past is its first P
         rows, and the graph's output, the new rows only, is bound right behind them.

No form copies a row for a step; "grown" moves them once every STEP rows, when C changes. ``resize``
moves the valid rows once, into buffers of another capacity.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from qvlm_runtime.backend import Array, Binding, Buffer, HostBuffer, Session, host_dtype
from qvlm_runtime.manifest import CacheForm, ModelSpec, TargetSpec

# Rows by which the view of a cache that grows gets longer: half of them are read for nothing.
STEP = 128


class Cache(Protocol):
    """Rows [0, length) are valid. ``capacity`` is the number of rows there is room for."""

    length: int
    capacity: int

    def bind(self, binding: Binding, new: int) -> None:
        """Bind what the next run needs to write ``new`` rows behind the valid ones."""

    def advance(self, new: int) -> None:
        """The run wrote ``new`` rows: they are valid now."""

    def rewind(self, length: int) -> None:
        """Only the first ``length`` rows are valid from now on; the others are written over."""

    def resize(self, capacity: int) -> None:
        """Make room for ``capacity`` rows, no fewer than are valid; these stay.

        One tensor at a time is there twice. SessionError or MemoryError without the memory: the
        cache must not be used then.
        """

    def rows(self, layer: int) -> tuple[Array, Array]:
        """Copies of a layer's valid keys and values, each F [1, kv_heads, length, head_dim]."""


def cache_tensors(model: ModelSpec, target: TargetSpec) -> tuple[list[str], list[str]]:
    """Names of the cache inputs and outputs of a decoder graph."""
    pairs = [(kind, i) for i in range(model.layers) for kind in ("key", "value")]
    extra = [] if target.cache == "append" else ["write_index", "kv_len"]
    return [f"past_{k}_{i}" for k, i in pairs] + extra, [f"present_{k}_{i}" for k, i in pairs]


def make_cache(session: Session, model: ModelSpec, target: TargetSpec, capacity: int) -> Cache:
    """An empty cache for ``capacity`` rows in the form the target's graph has."""
    kinds: dict[CacheForm, type[ScatterCache | AppendCache]] = {
        "scatter": ScatterCache,
        "grown": GrownCache,
        "append": AppendCache,
    }
    return kinds[target.cache](session, model, target, capacity)


def cache_bytes(model: ModelSpec, target: TargetSpec, capacity: int) -> int:
    """What the buffers of a cache of ``capacity`` rows take, in bytes."""
    row = 2 * model.layers * model.kv_heads * model.head_dim
    return capacity * row * host_dtype(target.dtype).itemsize


class _Buffers:
    """One buffer per layer for keys and one for values, each capacity * kv_heads * head_dim."""

    def __init__(
        self, session: Session, model: ModelSpec, target: TargetSpec, capacity: int
    ) -> None:
        self.length = 0
        self.capacity = capacity
        self.kv_heads, self.head_dim = model.kv_heads, model.head_dim
        self._session, self._dtype = session, target.dtype
        tensors = [f"{kind}_{i}" for i in range(model.layers) for kind in ("key", "value")]
        self._names = [(f"past_{tensor}", f"present_{tensor}") for tensor in tensors]
        self._buffers = [self._buffer(capacity) for _ in tensors]
        self._on_host = all(isinstance(buffer, HostBuffer) for buffer in self._buffers)

    @property
    def layers(self) -> list[tuple[Buffer, Buffer]]:
        """The buffers of each layer's keys and values."""
        return list(zip(self._buffers[::2], self._buffers[1::2], strict=True))

    def advance(self, new: int) -> None:
        self.length += new

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self.length, "only rows that were written are valid"
        self.length = length

    def resize(self, capacity: int) -> None:
        assert capacity >= self.length, "the valid rows stay"
        for i, (past, _) in enumerate(self._names):
            self._buffers[i] = self._moved(past, self._buffers[i], capacity)
        self.capacity = capacity

    def _buffer(self, rows: int) -> Buffer:
        return self._session.buffer(rows * self.kv_heads * self.head_dim, self._dtype)

    def _moved(self, past: str, buffer: Buffer, capacity: int) -> Buffer:
        """A buffer for ``capacity`` rows that holds the valid rows of the tensor ``past``."""
        raise NotImplementedError


class ScatterCache(_Buffers):
    """Head-major buffers, written in place. Binds the buffers once and two numbers per run."""

    def __init__(
        self, session: Session, model: ModelSpec, target: TargetSpec, capacity: int
    ) -> None:
        super().__init__(session, model, target, capacity)
        self._write_index = np.zeros(1, np.int64)
        self._kv_len = np.zeros(1, np.int64)
        self._bound_to: Binding | None = None
        self._view = self._viewed(0, capacity)

    def bind(self, binding: Binding, new: int) -> None:
        """Bind the whole view (first time), and say where the rows go."""
        if self._bound_to is not binding:
            for (past, present), buffer in zip(self._names, self._buffers, strict=True):
                shape = self._shape(past, self._view)
                binding.place(past, buffer, 0, shape)
                binding.place(present, buffer, 0, shape)
            binding.host("write_index", self._write_index)
            binding.host("kv_len", self._kv_len)
            self._bound_to = binding
        self._write_index[0] = self.length
        self._kv_len[0] = self.length + new

    def resize(self, capacity: int) -> None:
        """Move the rows; the buffers are bound again at the next run."""
        super().resize(capacity)
        self._view, self._bound_to = self._viewed(self.length, capacity), None

    def _viewed(self, length: int, capacity: int) -> int:
        """Rows of the tensors that are bound when ``length`` rows must fit in."""
        return capacity

    def _shape(self, past: str, rows: int) -> tuple[int, ...]:
        """Shape of the tensor ``past`` with so many rows."""
        return (1, self.kv_heads, rows, self.head_dim)

    def _as_rows(self, past: str, tensor: Array) -> Array:
        """View of the tensor ``past`` as [1, kv_heads, rows, head_dim]."""
        return tensor

    def _valid(self, past: str, buffer: Buffer) -> Array:
        """The valid rows, as [1, kv_heads, length, head_dim]: where they lie, or a copy from a GPU."""
        read = buffer.piece if isinstance(buffer, HostBuffer) else buffer.read
        return self._as_rows(past, read(0, self._shape(past, self._view)))[:, :, : self.length]

    def _moved(self, past: str, buffer: Buffer, capacity: int) -> Buffer:
        """The layout depends on the rows of the view, so it is made anew, on the host."""
        rows = self._valid(past, buffer)
        moved = np.zeros(capacity * self.kv_heads * self.head_dim, rows.dtype)
        shape = self._shape(past, self._viewed(self.length, capacity))
        view = moved[: math.prod(shape)].reshape(shape)
        self._as_rows(past, view)[:, :, : self.length] = rows
        return self._session.upload(moved)

    def rows(self, layer: int) -> tuple[Array, Array]:
        """Copies of the valid keys and values."""
        at = slice(2 * layer, 2 * layer + 2)
        pairs = zip(self._names[at], self._buffers[at], strict=True)
        key, value = (self._valid(past, buffer).copy() for (past, _), buffer in pairs)
        return key, value


class GrownCache(ScatterCache):
    """Head-major keys, and values as columns, each a view of as many rows as are valid and a few.

    Moving the valid rows into a larger view copies the cache once in STEP tokens, which read it
    STEP times meanwhile. In a GPU's memory, which the host does not move, the view is the whole.
    """

    def bind(self, binding: Binding, new: int) -> None:
        """Bind views that the new rows fit in, and say where they go."""
        view = self._viewed(self.length + new, self.capacity)
        if view != self._view:
            pairs = [(past, b) for (past, _), b in zip(self._names, self._buffers, strict=True)]
            kept = [self._valid(past, buffer).copy() for past, buffer in pairs]
            self._view, self._bound_to = view, None
            for (past, buffer), rows in zip(pairs, kept, strict=True):
                self._valid(past, buffer)[:] = rows
        super().bind(binding, new)

    def _viewed(self, length: int, capacity: int) -> int:
        return min(capacity, -(-length // STEP) * STEP) if self._on_host else capacity

    def _shape(self, past: str, rows: int) -> tuple[int, ...]:
        if past.startswith("past_key"):
            return (1, self.kv_heads, rows, self.head_dim)
        return (1, self.kv_heads, self.head_dim, rows)

    def _as_rows(self, past: str, tensor: Array) -> Array:
        return tensor if past.startswith("past_key") else tensor.swapaxes(2, 3)


class AppendCache(_Buffers):
    """Sequence-major buffers; past and new rows are neighbouring pieces of one buffer."""

    def bind(self, binding: Binding, new: int) -> None:
        """Bind the first ``length`` rows as past and the next ``new`` rows as output."""
        past_shape = (1, self.length, self.kv_heads, self.head_dim)
        new_shape = (1, new, self.kv_heads, self.head_dim)
        behind = self.length * self.kv_heads * self.head_dim
        for (past, present), buffer in zip(self._names, self._buffers, strict=True):
            binding.place(past, buffer, 0, past_shape)
            binding.place(present, buffer, behind, new_shape)

    def _moved(self, past: str, buffer: Buffer, capacity: int) -> Buffer:
        """A GPU's buffer gets longer where it is; else only what is valid is copied."""
        if capacity > self.capacity and not self._on_host:
            return self._session.join([buffer, self._buffer(capacity - self.capacity)])
        row = self.kv_heads * self.head_dim
        rows = buffer.read(0, (self.length * row,))
        moved = np.zeros(capacity * row, rows.dtype)
        moved[: len(rows)] = rows
        return self._session.upload(moved)

    def rows(self, layer: int) -> tuple[Array, Array]:
        """Copies of the valid keys and values."""
        shape = (1, self.length, self.kv_heads, self.head_dim)
        key, value = (buffer.read(0, shape).transpose(0, 2, 1, 3) for buffer in self.layers[layer])
        return key, value
