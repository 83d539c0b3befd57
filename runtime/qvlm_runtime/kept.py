"""The caches of finished answers, kept for prompts that begin as theirs did.

A client of a server without sessions sends its whole conversation at every turn. Its last answer's
cache is among those kept, and the turn runs only what is new.

A request takes the idle cache that shares most rows with its prompt, if these are at least half of
its prompt or half of what the cache holds: then the request saves more than the other conversation
loses, or that one loses the smaller part. Else it gets a new cache; where ``count`` exist already,
the idle one that was not used for the longest time, with the rows that it shares. A cache that an
answer uses is not among the idle ones, so two answers never share one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qvlm_runtime.context import Context, RowKey
from qvlm_runtime.errors import CapacityError, SessionError
from qvlm_runtime.options import OptionArguments, Options
from qvlm_runtime.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from qvlm_runtime.model import Model, Question


class KeptCaches:
    """At most ``count`` caches, idle and in use; more only while more answers run at once. 0 keeps none.

    A cache has the rows that its answer asks for, also where it is used again: the rows it keeps are
    moved. Safe to use from several threads. Close it before the model.
    """

    def __init__(self, model: Model, count: int) -> None:
        self._model = model
        self._count = count
        self._idle: list[Context] = []  # the longest unused first
        self._used = weakref.WeakSet[Context]()  # a stream that is dropped counts no more
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Caches that are idle."""
        return len(self._idle)

    @property
    def nbytes(self) -> int:
        """Memory of the idle caches."""
        return sum(context.nbytes for context in list(self._idle))

    def most_bytes(self, at_once: int) -> int:
        """The most that caches take, idle and in use, while at most ``at_once`` answers run."""
        rows, limit = self._model.decoder.max_rows, self._model.budget.limit
        most = max(self._count, at_once) * self._model.cache_bytes(rows)
        return most if limit is None else min(most, limit)

    def stream(
        self, question: Question, images: Sequence[Any] = (), **options: Unpack[OptionArguments]
    ) -> Stream:
        """As ``Model.stream``, with the same answer, but for the time that kept rows save.

        The cache is kept at the end, with the rows that were written; after an engine's failure it
        is dropped. CapacityError only when no idle cache is left that could make room.
        """
        model = self._model
        request = model.request(question, images, Options(**options), model.decoder.max_rows)
        keys = request.prompt.keys()
        context = self._take(keys, len(keys) + request.limit)
        return Stream(model, request, context, lambda failed: self._give(context, failed))

    def close(self) -> None:
        """Drop the idle caches, and those in use when their answers end."""
        with self._lock:
            self._count = 0
            while self._idle:
                self._drop(self._idle[0])

    def __enter__(self) -> KeptCaches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _take(self, keys: Sequence[RowKey], rows: int) -> Context:
        """A cache for ``rows`` rows that is nobody else's, with the rows it shares with ``keys``."""
        # Held while rows are moved: only other answers that begin or end wait for it.
        with self._lock:
            while True:
                chosen = self._choice(keys)
                try:
                    context = self._prepared(chosen, keys, rows)
                    break
                except CapacityError:
                    if not self._dropped(chosen, rows):
                        raise
                except (SessionError, MemoryError):  # the machine's memory, which no limit told
                    if chosen is None and not self._idle:
                        raise
                    if chosen is None:
                        self._drop(self._idle[0])
            self._used.add(context)
            return context

    def _choice(self, keys: Sequence[RowKey]) -> Context | None:
        """The idle cache to use, None for a new one."""
        usable = []
        for context in self._idle:
            same = context.common(keys)
            if 2 * same >= min(len(keys), context.rows):
                usable.append((same, -context.rows, context))
        if usable:
            return max(usable, key=lambda found: found[:2])[2]
        full = len(self._idle) + len(self._used) >= self._count
        return self._idle[0] if self._idle and full else None

    def _prepared(self, chosen: Context | None, keys: Sequence[RowKey], rows: int) -> Context:
        """The chosen idle cache with the room of ``rows`` rows, or a new one.

        CapacityError leaves the chosen one idle; after another error it is dropped.
        """
        if chosen is None:
            return Context(self._model.decoder, rows, self._model.budget)
        place = self._idle.index(chosen)
        self._idle.remove(chosen)
        try:
            chosen.prepare(keys, rows)
        except CapacityError:
            self._idle.insert(place, chosen)
            raise
        except BaseException:
            chosen.close()
            raise
        return chosen

    def _dropped(self, chosen: Context | None, rows: int) -> bool:
        """Drop the longest unused of the other idle caches, unless all together are too few bytes."""
        others = [context for context in self._idle if context is not chosen]
        budget, needed = self._model.budget, self._model.cache_bytes(rows)
        hopeless = budget.limit is not None and budget.used - self.nbytes + needed > budget.limit
        if hopeless or not others:
            return False
        self._drop(others[0])
        return True

    def _drop(self, context: Context) -> None:
        self._idle.remove(context)
        context.close()

    def _give(self, context: Context, failed: bool) -> None:
        """Take a cache back from an answer."""
        with self._lock:
            self._used.discard(context)
            if failed or self._count == 0 or context.rows == 0:
                context.close()
                return
            context.rest()
            self._idle.append(context)
            while len(self._idle) > max(0, self._count - len(self._used)):
                self._drop(self._idle[0])
