"""What the tests of qvlm-serve share: a server on a free port of 127.0.0.1 in a thread, raw requests, a brake on
the toy engine (which is too fast to be interrupted otherwise), and pictures as data URLs.
"""

from __future__ import annotations

import base64
import gc
import http.client
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from qvlm_runtime.decoder import DecoderState
from qvlm_runtime.ort import OrtBinding
from qvlm_runtime.serve.app import App

WAIT = 30.0  # seconds after which a test that waits for a state has failed


@contextmanager
def serving(app: App) -> Iterator[int]:
    """Serve an app; gives the port."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, ws="none", log_level="critical", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(WAIT)
            app.close()
            assert not thread.is_alive(), "the server did not stop"


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline, "the state was not reached"
        time.sleep(0.002)


def request(
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers (lower case) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, response.read(), found
    finally:
        connection.close()


def chat_body(text: str = "What?", urls: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    parts.append({"type": "text", "text": text})
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, **fields}


def post(
    port: int, body: Any, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Ask for a completion; status, JSON and headers."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"content-type": "application/json", **(headers or {})}
    status, answer, found = request(port, "POST", "/v1/chat/completions", data, given)
    return status, json.loads(answer), found


def png(seed: int = 0, size: tuple[int, int] = (9, 7), form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def data_url(encoded: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


class Brake:
    """Holds every run of the engine while it is on; counts runs. Use as a context manager."""

    def __init__(self) -> None:
        self.runs = 0
        self._last: int | None = None
        self._open = threading.Event()
        self._open.set()
        self._original = OrtBinding.run

    def on(self) -> None:
        self._open.clear()

    def after(self, runs: int) -> None:
        """Go on once that many further runs have begun."""
        self._last = self.runs + runs

    def off(self) -> None:
        self._last = None
        self._open.set()

    def __enter__(self) -> Brake:
        brake = self

        def run(binding: OrtBinding) -> None:
            brake.runs += 1
            if brake.runs == brake._last:
                brake.on()
            assert brake._open.wait(WAIT), "the brake was not taken off"
            brake._original(binding)

        OrtBinding.run = run  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        OrtBinding.run = self._original  # type: ignore[method-assign]
        self.off()


def raw(port: int, body: Any, **fields: str) -> socket.socket:
    """A connection on which a whole request was sent and nothing read."""
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{port}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT)
    connection.sendall(head.encode() + data)
    return connection


def caches() -> int:
    """Decoder states that are alive in this process."""
    # type(), as isinstance asks other libraries' lazy objects for their class, which may warn.
    return sum(type(thing) is DecoderState for thing in gc.get_objects())


def only_kept(app: App) -> bool:
    """Whether the model's caches are those that the server keeps, and their memory what it says."""
    gc.collect()
    return caches() == len(app.kept) and app.model.budget.used == app.kept.nbytes


def kill(connection: socket.socket) -> None:
    """Reset the connection, as the end of a killed process may do."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
