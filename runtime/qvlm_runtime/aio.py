"""Answers in an event loop: each step of a stream runs in a thread, the loop stays free.

When the awaiting task is cancelled, the step that is running ends by itself within one token and
frees the answer's cache; nothing is left to do for the caller.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from qvlm_runtime.stream import Generation, Stream

if TYPE_CHECKING:  # an application without an event loop does not pay for one at its start
    import asyncio
    from concurrent.futures import Executor

Value = TypeVar("Value")


class AsyncStream(AsyncIterator[str]):
    """Pieces of one answer's text, for ``async for``; ``generation`` when the last was read."""

    def __init__(self, start: Callable[[], Stream], executor: Executor | None = None) -> None:
        """start makes the stream, in a thread. executor: None is the event loop's own."""
        self._start = start
        self._executor = executor
        self._stream: Stream | None = None
        self._cancel = threading.Event()
        self._running: asyncio.Future[Any] | None = None

    async def open(self) -> None:
        """Check the request and reserve its cache now; raises what ``Model.stream`` raises."""
        await self._in_thread(self._begun)

    async def __anext__(self) -> str:
        piece = await self._in_thread(self._step)
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def read(self) -> Generation:
        """Read to the end and return the answer."""
        async for _ in self:
            pass
        return self.generation

    @property
    def opened(self) -> bool:
        """Whether the request was accepted."""
        return self._stream is not None

    @property
    def stream(self) -> Stream:
        """The stream itself, once it was opened."""
        assert self._stream is not None, "open or read the stream first"
        return self._stream

    @property
    def generation(self) -> Generation:
        """The finished answer. PromptError while pieces are still to be read."""
        return self.stream.generation

    def cancel(self) -> None:
        """End the answer before another token is computed."""
        self._cancel.set()
        if self._stream is not None:
            self._stream.cancel()

    async def aclose(self) -> None:
        """Cancel, wait for the step that is running, and free the cache."""
        import asyncio

        self.cancel()
        if self._running is not None:
            await asyncio.wait([self._running])
        if self._stream is not None:
            self._stream.close()

    def _begun(self) -> Stream:
        if self._stream is None:
            self._stream = self._start()
            if self._cancel.is_set():
                self._stream.cancel()
        return self._stream

    def _step(self) -> str | None:
        stream = self._begun()
        piece = next(stream, None)
        if stream.cancelled:  # it ends here: nobody may come back for the rest
            piece = ((piece or "") + "".join(stream)) or None
        return piece

    async def _in_thread(self, work: Callable[[], Value]) -> Value:
        import asyncio

        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        self._running = future
        future.add_done_callback(_retrieve)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self.cancel()
            raise


def _retrieve(future: asyncio.Future[Value]) -> None:
    """Take the exception of a step that nobody awaits any more, so that asyncio does not warn."""
    if not future.cancelled():
        future.exception()
