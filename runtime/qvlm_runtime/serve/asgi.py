"""The little of HTTP that the server needs, over ASGI: headers, a bounded body, JSON, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

# Nothing here may be framed, guessed at, cached by others or sent on as a referrer.
_HEADERS = (
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-store"),
)


class HttpError(Exception):
    """A refusal in the form of OpenAI's API."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error object."""
        error = {"message": str(self), "type": self.kind, "param": None, "code": self.status}
        return {"error": error}


class Disconnected(Exception):
    """The client left before its request was read."""


def header(scope: Scope, name: str) -> str:
    """A request header, "" if it is absent."""
    wanted = name.lower().encode()
    found = (value for key, value in scope["headers"] if key == wanted)
    return next(found, b"").decode("latin-1")


async def read_body(scope: Scope, receive: Receive, limit: int, seconds: float) -> bytes:
    """The whole body. HttpError 413 above ``limit`` bytes, 408 after ``seconds``; Disconnected."""
    too_large = HttpError(
        413, f"body: more than {limit} bytes. Send smaller images.", headers={"connection": "close"}
    )
    length = header(scope, "content-length")
    if length.isdecimal() and int(length) > limit:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            body += message.get("body", b"")
            if len(body) > limit:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)

    try:
        return await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:  # another class than TimeoutError in Python 3.10
        message = f"body: not complete after {seconds:g} s."
        raise HttpError(408, message, headers={"connection": "close"}) from None


async def start(send: Send, status: int, kind: str, extra: Sequence[tuple[str, str]] = ()) -> None:
    """Send the head of a response."""
    lines = [("content-type", kind), *_HEADERS, *extra]
    headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in lines]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def respond(
    send: Send, status: int, kind: str, body: bytes, extra: Sequence[tuple[str, str]] = ()
) -> None:
    """Send a whole response."""
    await start(send, status, kind, [("content-length", str(len(body))), *extra])
    await send({"type": "http.response.body", "body": body})


async def respond_json(
    send: Send, status: int, value: Any, extra: Sequence[tuple[str, str]] = ()
) -> None:
    """Send a JSON response."""
    await respond(send, status, "application/json", dump(value), extra)


def dump(value: Any) -> bytes:
    """JSON text in ASCII, so that no character of a request can fail to be encoded."""
    return json.dumps(value).encode()


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object. HttpError 400 if the bytes are none."""

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"body: not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise HttpError(400, f"body: got {type(value).__name__}, expected a JSON object.")
    return value
