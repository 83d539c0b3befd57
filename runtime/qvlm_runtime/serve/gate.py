"""How many requests are let in, and how many of them run at once."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from qvlm_runtime.serve.asgi import HttpError


class Gate:
    """Admission, then turns in the order of arrival. Belongs to one event loop."""

    def __init__(self, concurrent: int, queue: int, seconds: float) -> None:
        self.inside = 0
        self.running = 0
        self._concurrent = concurrent
        self._queue = queue
        self._seconds = seconds
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._waiting)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """HttpError 429 if as many requests are inside as may run and wait.

        Entered before the body is read, so that the memory of bodies is bounded too.
        """
        if self.inside >= self._concurrent + self._queue:
            raise busy(429, f"{self.inside} requests are being served.")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Run when no more than ``concurrent`` others do; HttpError 503 if that takes too long."""
        await self._enter()
        try:
            yield
        finally:
            self._leave()

    async def _enter(self) -> None:
        if self.running < self._concurrent:
            self.running += 1
            return
        mine = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        try:
            done, _ = await asyncio.wait([mine], timeout=self._seconds)
        except asyncio.CancelledError:
            self._abandon(mine)
            raise
        if not done:
            self._abandon(mine)
            raise busy(503, f"no turn after {self._seconds:g} s.", self._seconds)

    def _leave(self) -> None:
        """Hand the turn to the next in line, or give it up."""
        if self._waiting:
            self._waiting.popleft().set_result(None)
        else:
            self.running -= 1

    def _abandon(self, mine: asyncio.Future[None]) -> None:
        if mine.done():  # the turn was handed over in the moment of leaving
            self._leave()
        else:
            self._waiting.remove(mine)


def busy(status: int, reason: str, seconds: float = 1.0) -> HttpError:
    """A refusal for now."""
    retry = {"retry-after": str(math.ceil(seconds))}
    return HttpError(status, f"busy: {reason} Try again later.", "rate_limit_error", retry)
