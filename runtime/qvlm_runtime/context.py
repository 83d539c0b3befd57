"""A decoder state together with what its rows hold, so that a later prompt can keep the rows it shares.

A row's key is the token id, or for an image token the key of the picture and the row of its
features. Rows are kept up to the first key that differs: attention is causal, so a row depends on
nothing behind it. Both cache forms forget rows by a smaller length alone; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

from qvlm_runtime.budget import CacheBudget
from qvlm_runtime.decoder import Decoder, DecoderState
from qvlm_runtime.errors import SessionError

RowKey = int | tuple[str, int]


class Context:
    """One cache with room for ``capacity`` rows, its memory reserved from a budget."""

    def __init__(self, decoder: Decoder, capacity: int, budget: CacheBudget) -> None:
        """CapacityError if the budget has no room; PromptError if the graph has not so many rows."""
        self._decoder, self._budget = decoder, budget
        self._lease = budget.reserve(decoder.cache_bytes(capacity))
        try:
            self._state: DecoderState | None = decoder.start(capacity)
        except BaseException:
            self._lease.release()  # a traceback that is kept somewhere must not keep the bytes
            raise
        self._held: list[RowKey] = []

    @property
    def state(self) -> DecoderState:
        """The decoder state. SessionError after ``close``."""
        if self._state is None:
            raise SessionError("the conversation is closed. Begin another one.")
        return self._state

    @property
    def rows(self) -> int:
        """Rows that are valid; 0 after ``close``."""
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Memory reserved for the cache; 0 after ``close``."""
        return self._lease.size

    def common(self, keys: Sequence[RowKey]) -> int:
        """How many rows from the first on are those of ``keys``.

        At least the last key is not among them: it must be run for its logits.
        """
        limit = min(len(self._held), len(keys) - 1)
        return next((i for i in range(limit) if self._held[i] != keys[i]), limit)

    def reuse(self, keys: Sequence[RowKey]) -> int:
        """Forget the rows that differ from ``keys``; return how many are left, as ``common`` does."""
        same = self.common(keys)
        self.state.rewind(same)
        del self._held[same:]
        return same

    def prepare(self, keys: Sequence[RowKey], rows: int) -> None:
        """Forget the rows that differ from ``keys``, and make the room that of ``rows`` rows, no more
        and no less, as if the context was new.

        CapacityError if the budget has no room: the context is then as it was. After another error it
        must be closed.
        """
        self._budget.resize(self._lease, self._decoder.cache_bytes(rows))
        self.reuse(keys)  # what is forgotten need not be moved
        capacity = self._decoder.capacity(rows)
        if capacity != self.state.capacity:
            self.state.resize(capacity)

    def record(self, keys: Sequence[RowKey]) -> None:
        """Say what was run since ``reuse``: the whole sequence; rows that were not run are cut."""
        if self._state is not None:
            self._held = list(keys[: self._state.length])

    def rest(self) -> None:
        """Let go of the last prompt's image features, which the rows do not need any more."""
        self.state.set_features(None)

    def close(self) -> None:
        """Free the cache and give its memory back to the budget."""
        self._state = None
        self._held = []
        self._lease.release()
