"""The server as an ASGI application: routes, one answer at a time for each turn, and its end.

An answer ends in one of four ways: it is complete; the client leaves; its time is over, which a
client that does not read also reaches; it fails. In all of them the generation stops within one
token, and its cache is kept for the next turn of its conversation (kept.py) or free before the
server's turn is given on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvlm_runtime.aio import AsyncStream
from qvlm_runtime.errors import CapacityError, ImageError, PromptError
from qvlm_runtime.kept import KeptCaches
from qvlm_runtime.model import Model
from qvlm_runtime.serve import asgi, page
from qvlm_runtime.serve.access import Access
from qvlm_runtime.serve.asgi import Disconnected, HttpError, Receive, Scope, Send
from qvlm_runtime.serve.gate import Gate, busy
from qvlm_runtime.serve.images import image_bytes
from qvlm_runtime.serve.limits import Limits
from qvlm_runtime.serve.metrics import Metrics
from qvlm_runtime.serve.protocol import Ask, Reply, parse_request
from qvlm_runtime.stream import Stream

_LEFT = 499  # what the metrics call a request whose client left
_LAST_WORD_SECONDS = 1.0
_log = logging.getLogger(__name__)


@dataclass
class _Exchange:
    """What was sent of one response."""

    send: Send
    started: bool = False
    complete: bool = False
    is_stream: bool = False

    async def __call__(self, message: dict[str, Any]) -> None:
        self.started = True
        await self.send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True


class App:
    """One model behind HTTP. ``close`` ends its threads and caches; the model is the caller's."""

    def __init__(
        self,
        model: Model,
        name: str,
        limits: Limits | None = None,
        access: Access | None = None,
        image_root: Path | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.limits = limits or Limits()
        self.access = access or Access()
        self.image_root = image_root
        self.gate = Gate(self.limits.concurrent, self.limits.queue, self.limits.queue_seconds)
        self.metrics = Metrics()
        self.kept = KeptCaches(model, self.limits.kept)
        self._threads = ThreadPoolExecutor(self.limits.concurrent, "qvlm-answer")
        self._routes: dict[str, tuple[str, Callable[..., Awaitable[None]]]] = {
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
            "/v1/models": ("GET", self._models),
            "/v1/chat/completions": ("POST", self._chat),
        }

    @property
    def most_cache_bytes(self) -> int:
        """The most memory that caches take, of answers that run and of those that ended."""
        return self.kept.most_bytes(self.limits.concurrent)

    def close(self) -> None:
        """Wait for the steps that run, end the threads and drop the caches."""
        self._threads.shutdown()
        self.kept.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        out = _Exchange(send)
        status = 200
        try:
            await self._route(scope, receive, out)
        except HttpError as error:
            status = error.status
            await _refuse(out, error)
        except Disconnected:
            status = _LEFT
        except Exception:
            status = 500
            _log.exception("request failed")
            await _refuse(
                out, HttpError(500, "internal error, see the server's log", "server_error")
            )
        finally:
            if scope["path"].startswith("/v1/"):
                self.metrics.request(status)

    async def _route(self, scope: Scope, receive: Receive, out: _Exchange) -> None:
        self.access.check_host(scope)
        path, method = scope["path"], scope["method"]
        shown = page.FILES.get(path)
        allowed, handler = self._routes.get(path, ("GET", None))
        if shown is None and handler is None:
            raise HttpError(404, "no such address.")
        if method != allowed:
            raise HttpError(405, f"expected {allowed}.", headers={"allow": allowed})
        if shown is not None:
            await page.respond(out, shown)
        elif handler is not None:
            if path != "/health":
                self.access.check_token(scope)
            await handler(scope, receive, out)

    async def _health(self, scope: Scope, receive: Receive, out: _Exchange) -> None:
        await asgi.respond_json(out, 200, {"status": "ok", "model": self.name})

    async def _models(self, scope: Scope, receive: Receive, out: _Exchange) -> None:
        card = {"id": self.name, "object": "model", "created": 0, "owned_by": "qvlm"}
        await asgi.respond_json(out, 200, {"object": "list", "data": [card]})

    async def _metrics(self, scope: Scope, receive: Receive, out: _Exchange) -> None:
        gauges = {
            "answers_running": self.gate.running,
            "requests_waiting": self.gate.waiting,
            "cache_bytes": self.model.budget.used,
            "cache_bytes_most": self.most_cache_bytes,
            "kept_caches": len(self.kept),
            "kept_cache_bytes": self.kept.nbytes,
            "image_features_bytes": self.model.feature_cache.bytes,
        }
        text = self.metrics.text(gauges).encode()
        await asgi.respond(out, 200, "text/plain; version=0.0.4", text)

    async def _chat(self, scope: Scope, receive: Receive, out: _Exchange) -> None:
        self.access.check_json(scope)
        limits = self.limits
        with self.gate.admitted():
            body = await asgi.read_body(scope, receive, limits.body_bytes, limits.body_seconds)
            ask = parse_request(asgi.parse(body), limits)
            del body
            if ask.model not in ("", self.name):
                raise HttpError(404, f"model: this server has {self.name!r}.")
            await self._while_connected(self._answered(ask, out), receive, out)

    async def _while_connected(
        self, work: Awaitable[None], receive: Receive, out: _Exchange
    ) -> None:
        """Run ``work`` to its end, or cancel it when the client leaves (Disconnected).

        A client that has its whole answer is told apart: it may leave while the turn is tidied up.
        """

        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and not out.complete:
                raise Disconnected
            await task
        finally:
            gone.cancel()
            await _ended(task)

    async def _answered(self, ask: Ask, out: _Exchange) -> None:
        async with self.gate.turn():
            stream = AsyncStream(lambda: self._begin(ask), self._threads)
            task = asyncio.ensure_future(self._send(ask, stream, out))
            try:
                done, _ = await asyncio.wait({task}, timeout=self.limits.request_seconds)
                if not done:
                    raise HttpError(
                        504, f"no answer within {self.limits.request_seconds:g} s.", "server_error"
                    )
                await task
            except (PromptError, ImageError) as error:
                raise HttpError(400, str(error)) from error
            except CapacityError as error:
                raise busy(503, str(error)) from error
            finally:
                # The turn goes on only when the step that runs has ended and the cache is free.
                await asyncio.shield(self._finished(task, stream))

    async def _finished(self, task: asyncio.Future[None], stream: AsyncStream) -> None:
        await _ended(task)
        await stream.aclose()
        if stream.opened:
            self.metrics.answer(stream.stream.timings, len(stream.stream.token_ids))

    def _begin(self, ask: Ask) -> Stream:
        """Decode the images and check the question; in a thread."""
        images = [
            image_bytes(url, self.image_root, self.limits, f"image {i + 1}")
            for i, url in enumerate(ask.urls)
        ]
        return self.kept.stream(ask.messages, images, **ask.options)

    async def _send(self, ask: Ask, stream: AsyncStream, out: _Exchange) -> None:
        await stream.open()
        reply = Reply(self.name, self.model.tokenizer.decode, self.model.stop_ids)
        scored = ask.options.get("logprobs") is not None
        if not ask.stream:
            await asgi.respond_json(out, 200, reply.whole(await stream.read(), scored))
            return
        out.is_stream = True
        await asgi.start(out, 200, "text/event-stream")
        await _event(out, reply.first())
        told = 0
        async for piece in stream:
            scores = stream.stream.scores[told:] if scored else None
            told += len(scores or ())
            await _event(out, reply.piece(piece, scores))
        done = stream.generation
        await _event(out, reply.last(done, done.scores[told:] if scored else None))
        if ask.include_usage:
            await _event(out, reply.usage_chunk(done))
        await out({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _ended(task: asyncio.Future[None]) -> None:
    """Cancel a task that still runs, and take its outcome so that asyncio does not report it."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


async def _event(out: _Exchange, value: Any, more: bool = True) -> None:
    body = b"data: " + asgi.dump(value) + b"\n\n"
    await out({"type": "http.response.body", "body": body, "more_body": more})


async def _refuse(out: _Exchange, error: HttpError) -> None:
    """An error response; in a stream that has begun, an error event that ends it."""
    if not out.started:
        await asgi.respond_json(out, error.status, error.body(), list(error.headers.items()))
        return
    if not out.is_stream:
        return  # half a body was sent: the connection can only break off
    try:
        await asyncio.wait_for(_event(out, error.body(), more=False), _LAST_WORD_SECONDS)
    except asyncio.TimeoutError:  # another class than TimeoutError in Python 3.10
        _log.info("a client that does not read was left")


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
