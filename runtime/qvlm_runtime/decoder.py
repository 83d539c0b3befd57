"""One decoder graph and the state of one sequence in it: tokens in, logits and cache rows out.

This is the level below text: it knows no tokenizer, no sampling and no limits of a request. verify
and the evaluation use it to replay a prompt token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime.backend import (
    Array,
    Buffer,
    Session,
    as_float32,
    as_host,
    host_dtype,
    missing_tensors,
)
from qvlm_runtime.cache import cache_bytes, cache_tensors, make_cache
from qvlm_runtime.errors import PromptError
from qvlm_runtime.manifest import ModelSpec, TargetSpec
from qvlm_runtime.positions import AXES

_TOKENS = ("input_ids", "image_index", "position_ids")


@dataclass(frozen=True)
class Features:
    """Image features where the engine computes: ``rows`` times feature_size elements.

    Written once, by the vision graph; several sequences may read them at once.
    """

    buffer: Buffer
    rows: int

    @property
    def nbytes(self) -> int:
        """Memory they take."""
        return self.buffer.nbytes

    @staticmethod
    def join(session: Session, pieces: Sequence[Features]) -> Features:
        """The features of several images one behind the other."""
        if len(pieces) == 1:
            return pieces[0]
        buffer = session.join([piece.buffer for piece in pieces])
        return Features(buffer, sum(piece.rows for piece in pieces))


class Decoder:
    """An opened decoder graph. Shared by all sequences; holds nothing that changes."""

    def __init__(
        self, session: Session, model: ModelSpec, target: TargetSpec, where: str = "decoder"
    ) -> None:
        past, present = cache_tensors(model, target)
        missing_tensors(session, where, [*_TOKENS, "image_features", *past], ["logits", *present])
        self.session = session
        self.model = model
        self.target = target
        self.where = where

    @property
    def max_rows(self) -> int:
        """Cache rows a sequence can have: the model's context, or the graph's fixed C if less."""
        fixed = self._fixed_rows
        return self.model.max_context if fixed is None else min(fixed, self.model.max_context)

    @property
    def _fixed_rows(self) -> int | None:
        scatter = self.target.cache == "scatter"
        return self.session.inputs["past_key_0"].shape[2] if scatter else None

    def capacity(self, rows: int) -> int:
        """Rows of a cache that has room for ``rows``: so many, or the graph's fixed C."""
        return self._fixed_rows or rows

    def cache_bytes(self, capacity: int) -> int:
        """Bytes that the cache of a sequence with room for ``capacity`` rows takes, with the second
        buffers of an engine that does not write in place.
        """
        nbytes = cache_bytes(self.model, self.target, self.capacity(capacity))
        if self.target.cache == "append":
            return nbytes
        pairs = list(zip(*cache_tensors(self.model, self.target), strict=False))
        twins = sum(not self.session.in_place(present, past) for past, present in pairs)
        return nbytes + nbytes * twins // len(pairs)

    def start(self, capacity: int, features: Features | Array | None = None) -> DecoderState:
        """Begin a sequence with room for ``capacity`` rows.

        features: F [M, feature_size], the rows image_index counts, on the host or where the engine
        computes; None for a prompt without images.
        PromptError if capacity exceeds ``max_rows``.
        """
        if capacity > self.max_rows:
            raise PromptError(
                f"{self.where}: {capacity} tokens do not fit the cache, at most {self.max_rows}. "
                "Use a shorter prompt or fewer new tokens."
            )
        return DecoderState(self, self.capacity(capacity), features)


class DecoderState:
    """The state of one sequence: its cache, its binding and the buffers of a decode step."""

    def __init__(self, decoder: Decoder, capacity: int, features: Features | Array | None) -> None:
        model, dtype = decoder.model, decoder.target.dtype
        self._session, self._feature_size = decoder.session, model.feature_size
        self._cache = make_cache(decoder.session, model, decoder.target, capacity)
        self._binding = decoder.session.binding()
        self._dtype = dtype
        self._no_features = self._uploaded(np.zeros((1, model.feature_size), np.float32))
        self.set_features(features)
        self._logits = np.empty((1, 1, model.vocab_size), host_dtype(dtype))
        self._binding.fetch("logits", self._logits)
        # A decode step changes numbers in arrays that stay bound, so it binds no token tensor.
        self._axes = AXES[model.positions]
        self._one = {name: np.full((1, 1), -1, np.int64) for name in _TOKENS}
        self._one["position_ids"] = np.zeros((self._axes, 1), np.int64)
        self._bound_one = False
        # [n] is the position of a text token behind the first n rows: rewinding keeps it true.
        self._next = np.zeros(capacity + 1, np.int64)

    def set_features(self, features: Features | Array | None) -> None:
        """Replace the rows that image_index counts in later steps, None for none.

        features: F [M, feature_size], on the host or where the engine computes.
        """
        if features is None:
            features = self._no_features
        elif not isinstance(features, Features):
            features = self._uploaded(features)
        shape = (features.rows, self._feature_size)
        self._binding.place("image_features", features.buffer, 0, shape)

    def _uploaded(self, rows: Array) -> Features:
        return Features(self._session.upload(as_host(rows, self._dtype)), len(rows))

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return self._cache.capacity

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self._cache.rewind(length)

    def resize(self, capacity: int) -> None:
        """Make room for ``capacity`` rows, no fewer than are valid; what was seen stays.

        SessionError or MemoryError without the memory: the state must not be used then.
        """
        self._cache.resize(capacity)
        positions = np.zeros(capacity + 1, np.int64)
        positions[: self.length + 1] = self._next[: self.length + 1]
        self._next = positions

    @property
    def length(self) -> int:
        """Tokens seen so far, the rows of the cache that are valid."""
        return self._cache.length

    def step(
        self,
        token_ids: Sequence[int] | Array,
        image_index: Sequence[int] | Array | None = None,
        positions: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Run S tokens behind those seen; return the logits of the last one, float32 [vocab].

        image_index: S rows of the features, -1 for text; None means all text. positions: int64
        [1 or 3, S] as positions.py gives them; None counts up from the largest seen, which is right
        for text. PromptError if the cache has no room for S more rows, SessionError if the engine
        fails.
        """
        count, cache = len(token_ids), self._cache
        if cache.length + count > cache.capacity:
            raise PromptError(
                f"{cache.length} + {count} tokens do not fit the cache of {cache.capacity} rows. "
                "Use a shorter prompt or fewer new tokens."
            )
        start, first = cache.length, int(self._next[cache.length])
        if count == 1 and image_index is None and positions is None:
            self._one["input_ids"][0, 0] = token_ids[0]
            self._one["position_ids"][:] = first
            self._next[start + 1] = first + 1
            if not self._bound_one:
                self._bind_tokens(self._one)
                self._bound_one = True
        else:
            index = np.full(count, -1) if image_index is None else image_index
            if positions is None:
                text = np.arange(first, first + count, dtype=np.int64)
                positions = np.tile(text, (self._axes, 1))
            ids = as_host(token_ids, "int64")[None]
            values = (ids, as_host(index, "int64")[None], as_host(positions, "int64"))
            self._bind_tokens(dict(zip(_TOKENS, values, strict=True)))
            self._bound_one = False
            largest = np.maximum.accumulate(positions.max(axis=0)) + 1
            self._next[start + 1 : start + count + 1] = np.maximum(largest, first)
        cache.bind(self._binding, count)
        self._binding.run()
        cache.advance(count)
        return as_float32(self._logits[0, 0], self._dtype)

    def cache_rows(self, layer: int) -> tuple[Array, Array]:
        """Copies of the valid keys and values, each F [1, kv_heads, length, head_dim]."""
        return self._cache.rows(layer)

    def _bind_tokens(self, arrays: dict[str, NDArray[np.int64]]) -> None:
        for name, array in arrays.items():
            self._binding.host(name, array)
