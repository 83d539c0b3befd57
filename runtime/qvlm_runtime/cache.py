"""The key/value cache of one generation, in the two forms of the folder contract (manifest.py).

scatter  one buffer [1, kv_heads, C, head_dim] per tensor, bound as past and as present: the graph
         writes its new rows in place and is told where (write_index) and how far to read (kv_len).
append   one sequence-major buffer [1, C, kv_heads, head_dim] per tensor: the past is its first P
         rows, and the graph's output, the new rows only, is bound right behind them.

Neither form ever copies a row.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from qvlm_runtime.backend import Array, Binding, Buffer, Session, host_dtype
from qvlm_runtime.manifest import ModelSpec, TargetSpec


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

    def rows(self, layer: int) -> tuple[Array, Array]:
        """Copies of a layer's valid keys and values, each F [1, kv_heads, length, head_dim]."""


def cache_tensors(model: ModelSpec, target: TargetSpec) -> tuple[list[str], list[str]]:
    """Names of the cache inputs and outputs of a decoder graph."""
    pairs = [(kind, i) for i in range(model.layers) for kind in ("key", "value")]
    extra = ["write_index", "kv_len"] if target.cache == "scatter" else []
    return [f"past_{k}_{i}" for k, i in pairs] + extra, [f"present_{k}_{i}" for k, i in pairs]


def make_cache(session: Session, model: ModelSpec, target: TargetSpec, capacity: int) -> Cache:
    """An empty cache for ``capacity`` rows in the form the target's graph has."""
    if target.cache == "scatter":
        return ScatterCache(session, model, target, capacity)
    return AppendCache(session, model, target, capacity)


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
        elements = capacity * model.kv_heads * model.head_dim
        self.layers: list[tuple[Buffer, Buffer]] = [
            (session.buffer(elements, target.dtype), session.buffer(elements, target.dtype))
            for _ in range(model.layers)
        ]
        self._named = [
            (f"past_{kind}_{i}", f"present_{kind}_{i}", buffer)
            for i, pair in enumerate(self.layers)
            for kind, buffer in zip(("key", "value"), pair, strict=True)
        ]

    def advance(self, new: int) -> None:
        self.length += new

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self.length, "only rows that were written are valid"
        self.length = length


class ScatterCache(_Buffers):
    """Head-major buffers, written in place. Binds the buffers once and two numbers per run."""

    def __init__(
        self, session: Session, model: ModelSpec, target: TargetSpec, capacity: int
    ) -> None:
        super().__init__(session, model, target, capacity)
        self._write_index = np.zeros(1, np.int64)
        self._kv_len = np.zeros(1, np.int64)
        self._bound_to: Binding | None = None

    def bind(self, binding: Binding, new: int) -> None:
        """Bind the whole buffers (first time), and say where the rows go."""
        if self._bound_to is not binding:
            shape = (1, self.kv_heads, self.capacity, self.head_dim)
            for past, present, buffer in self._named:
                binding.place(past, buffer, 0, shape)
                binding.place(present, buffer, 0, shape)
            binding.host("write_index", self._write_index)
            binding.host("kv_len", self._kv_len)
            self._bound_to = binding
        self._write_index[0] = self.length
        self._kv_len[0] = self.length + new

    def rows(self, layer: int) -> tuple[Array, Array]:
        """Copies of the valid keys and values."""
        shape = (1, self.kv_heads, self.capacity, self.head_dim)
        key, value = (buffer.read(0, shape)[:, :, : self.length] for buffer in self.layers[layer])
        return key, value


class AppendCache(_Buffers):
    """Sequence-major buffers; past and new rows are neighbouring pieces of one buffer."""

    def bind(self, binding: Binding, new: int) -> None:
        """Bind the first ``length`` rows as past and the next ``new`` rows as output."""
        past_shape = (1, self.length, self.kv_heads, self.head_dim)
        new_shape = (1, new, self.kv_heads, self.head_dim)
        behind = self.length * self.kv_heads * self.head_dim
        for past, present, buffer in self._named:
            binding.place(past, buffer, 0, past_shape)
            binding.place(present, buffer, behind, new_shape)

    def rows(self, layer: int) -> tuple[Array, Array]:
        """Copies of the valid keys and values."""
        shape = (1, self.length, self.kv_heads, self.head_dim)
        key, value = (buffer.read(0, shape).transpose(0, 2, 1, 3) for buffer in self.layers[layer])
        return key, value
