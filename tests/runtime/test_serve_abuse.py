"""Proves that qvlm-serve survives its clients: storms of cancellations, killed and slow clients, floods, oversized
and malformed requests. Refused, and the server answers as before, with every cache free or kept:
python -m pytest tests/runtime/test_serve_abuse.py
"""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runtime_support import write_folder
from serve_support import (
    WAIT,
    Brake,
    chat_body,
    kill,
    only_kept,
    post,
    raw,
    request,
    serving,
    wait_for,
)

from qvlm_runtime import Model, load
from qvlm_runtime.serve.app import App
from qvlm_runtime.serve.limits import Limits

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")

# Times are long here, so that a slow machine changes no outcome; a test of a time sets its own.
LIMITS = Limits(body_bytes=200_000, concurrent=2, queue=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "toy"
    write_folder(path, max_context=256)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with load(folder, "rtx", threads=1, verify=False) as opened:
        yield opened


@pytest.fixture
def app(model: Model) -> App:
    return App(model, "toy", LIMITS)


@pytest.fixture
def port(app: App) -> Iterator[int]:
    with serving(app) as number:
        yield number
        assert_alive(app, number)


def assert_alive(app: App, port: int) -> None:
    """It answers right, and nothing is left of what was asked before."""
    wait_for(lambda: app.gate.running == app.gate.waiting == 0)
    assert only_kept(app)
    status, answer, _ = post(port, chat_body())
    expected = app.model.generate("What?", max_new_tokens=8).text
    assert status == 200 and answer["choices"][0]["message"]["content"] == expected


# --- clients that leave --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_generation_within_one_token(
    app: App, port: int, stream: bool
) -> None:
    with Brake() as brake:
        brake.on()
        connection = raw(port, chat_body(max_tokens=200, stream=stream))
        wait_for(lambda: brake.runs == 1)
        kill(connection)
        # The step that runs is held: the turn and the cache stay with it until it ends.
        other = raw(port, chat_body(max_tokens=1))
        wait_for(lambda: brake.runs == 2)
        assert app.gate.running == 2 and app.model.budget.used > 0
        kill(other)
        brake.off()
        wait_for(lambda: app.gate.running == 0)
        assert brake.runs <= 3, "one step each, and at most one begun before the reset was seen"


def test_a_storm_of_cancellations_leaves_nothing(app: App, port: int) -> None:
    """200 clients ask at once, are reset at random places, and the counters say what became of them."""

    def one(n: int) -> None:
        connection = raw(port, chat_body(f"{n}", max_tokens=200, stream=bool(n % 2)))
        if n % 3:
            connection.settimeout(0.01 * (n % 7))
            with suppress(TimeoutError, BlockingIOError):  # leaving before the first byte is a case
                connection.recv(1 + 40 * (n % 5))
        kill(connection)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(200)))
    # All have been heard before the gate is looked at: it is also empty before the last ones come.
    wait_for(lambda: sum(app.metrics._requests.values()) == 200)
    wait_for(lambda: app.gate.running == app.gate.waiting == 0)
    wait_for(lambda: only_kept(app))
    assert len(app.kept) <= LIMITS.concurrent
    assert set(app.metrics._requests) <= {200, 429, 499, 503}
    assert app.metrics._requests[499] > 0


def test_a_client_that_leaves_the_queue_gives_its_place_back(app: App, port: int) -> None:
    with Brake() as brake:
        brake.on()
        running = [raw(port, chat_body()) for _ in range(LIMITS.concurrent)]
        wait_for(lambda: brake.runs == 2)
        waiting = [raw(port, chat_body()) for _ in range(LIMITS.queue)]
        wait_for(lambda: app.gate.waiting == 3)
        kill(waiting.pop())
        wait_for(lambda: app.gate.waiting == 2)
        brake.off()
        for connection in (*running, *waiting):
            assert b" 200 OK" in connection.recv(1000)
            connection.close()


def test_a_flood_is_refused_with_a_time_to_retry(app: App, port: int) -> None:
    with Brake() as brake:
        brake.on()
        held = [raw(port, chat_body()) for _ in range(LIMITS.concurrent)]
        wait_for(lambda: brake.runs == 2)
        waiting = [raw(port, chat_body()) for _ in range(LIMITS.queue)]
        wait_for(lambda: app.gate.waiting == LIMITS.queue)
        status, answer, headers = post(port, chat_body())
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert answer["error"]["type"] == "rate_limit_error"
        assert request(port, "GET", "/health")[0] == 200, "health does not wait"
        brake.off()
        for connection in (*held, *waiting):
            assert b" 200 OK" in connection.recv(1000)
            connection.close()


def test_a_turn_that_does_not_come_is_503(model: Model) -> None:
    app = App(model, "toy", Limits(concurrent=1, queue_seconds=0.2))
    with serving(app) as port, Brake() as brake:
        brake.on()
        held = raw(port, chat_body())
        wait_for(lambda: brake.runs == 1)
        status, answer, headers = post(port, chat_body())
        assert status == 503 and headers["retry-after"] == "1"
        assert "no turn after 0.2 s" in answer["error"]["message"]
        brake.off()
        assert b" 200 OK" in held.recv(1000)
        held.close()
        assert_alive(app, port)


def test_no_memory_for_a_cache_is_503(folder: Path) -> None:
    with load(folder, "rtx", verify=False) as probe:
        one = probe.cache_bytes(7 + 8)
    with load(folder, "rtx", verify=False, cache_limit=one) as model:
        app = App(model, "toy", replace(LIMITS, kept_caches=0))
        with serving(app) as port, Brake() as brake:
            brake.on()
            held = raw(port, chat_body())
            wait_for(lambda: brake.runs == 1)
            status, answer, headers = post(port, chat_body())
            assert status == 503 and "retry-after" in headers
            assert "does not fit" in answer["error"]["message"]
            brake.off()
            held.recv(1000)
            held.close()
            wait_for(lambda: app.gate.running == 0)
            assert_alive(app, port)


# --- clients that are slow -----------------------------------------------------------------------


def test_a_body_that_does_not_arrive_is_given_up(model: Model) -> None:
    app = App(model, "toy", Limits(body_seconds=0.2))
    with serving(app) as port:
        connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        connection.sendall(head + b"Content-Type: application/json\r\nContent-Length: 900\r\n\r\n{")
        assert b" 408 " in connection.recv(2000)
        connection.close()
        wait_for(lambda: app.gate.inside == 0)


def test_bodies_that_arrive_slowly_are_counted_before_they_are_read(app: App, port: int) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: 9000\r\n\r\n{"
    held = []
    for n in range(LIMITS.concurrent + LIMITS.queue):
        held.append(socket.create_connection(("127.0.0.1", port), timeout=WAIT))
        held[-1].sendall(head)
        wait_for(lambda n=n: app.gate.inside == n + 1)
    status, _, headers = post(port, chat_body())
    assert status == 429 and "retry-after" in headers
    for connection in held:
        kill(connection)
    wait_for(lambda: app.gate.inside == 0)


def drive(app: App, body: dict[str, Any], blocks_at: int) -> list[dict[str, Any]]:
    """Run the app on a client that takes ``blocks_at`` messages and then no more; what it took."""
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }  # fmt: skip
    taken: list[dict[str, Any]] = []

    async def run() -> None:
        messages = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

        async def receive() -> dict[str, Any]:
            message = next(messages, None)
            if message is None:
                await asyncio.Event().wait()
            assert message is not None
            return message

        async def send(message: dict[str, Any]) -> None:
            if len(taken) == blocks_at:
                await asyncio.Event().wait()
            taken.append(message)

        await app(scope, receive, send)

    asyncio.run(asyncio.wait_for(run(), WAIT))
    return taken


@pytest.mark.parametrize("blocks_at", [1, 2, 5])
def test_a_client_that_does_not_read_loses_its_turn(model: Model, blocks_at: int) -> None:
    app = App(model, "toy", Limits(request_seconds=1.0))
    taken = drive(app, chat_body(max_tokens=100, stream=True), blocks_at)
    app.close()
    assert len(taken) == blocks_at and taken[0]["status"] == 200
    assert app.gate.running == 0 and model.budget.used == 0
    assert dict(app.metrics._requests) == {504: 1}
    generated = app.metrics._sums["generated_tokens_total"]
    assert generated <= blocks_at + 1, "it is not generated ahead of the reader"


def test_an_answer_that_takes_too_long_says_so(model: Model) -> None:
    for stream in (False, True):
        app = App(model, "toy", Limits(request_seconds=1.0))
        with Brake() as brake:
            brake.on()
            threading.Timer(2.0, brake.off).start()
            taken = drive(app, chat_body(max_tokens=100, stream=stream), 10**6)
        app.close()
        assert app.gate.running == 0 and model.budget.used == 0 and brake.runs == 1
        if stream:
            assert taken[0]["status"] == 200 and b"no answer within 1 s" in taken[-1]["body"]
            assert not taken[-1]["more_body"]
        else:
            assert taken[0]["status"] == 504


def test_an_engine_that_fails_is_one_500_without_its_paths(folder: Path, caplog: Any) -> None:
    model = load(folder, "rtx", verify=False)
    app = App(model, "toy", LIMITS)
    with serving(app) as port:
        model.decoder.session.close()
        status, answer, _ = post(port, chat_body())
        assert status == 500 and str(folder) not in json.dumps(answer)
        wait_for(lambda: app.gate.running == 0)
        assert (
            len(app.kept) == app.model.budget.used == 0
            and request(port, "GET", "/health")[0] == 200
        )
    assert "closed" in caplog.text


# --- requests that are too large or malformed ----------------------------------------------------


def test_a_body_above_the_limit_is_refused_before_it_is_read(port: int) -> None:
    connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    connection.sendall(
        head + b"Content-Type: application/json\r\nContent-Length: 9999999999\r\n\r\n"
    )
    assert b" 413 " in connection.recv(2000)
    connection.close()


def test_a_chunked_body_above_the_limit_is_refused(port: int) -> None:
    connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT)
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    )
    connection.sendall(head + b"Content-Type: application/json\r\n\r\n")
    answer = b""
    try:
        for _ in range(40):
            connection.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
    except OSError:
        pass  # the server has closed its side, which is the point
    try:
        answer = connection.recv(2000)
    except ConnectionResetError:
        answer = b" 413 (reset before it was read)"
    assert b" 413 " in answer
    connection.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"\0" * 1000,
    ],
)
def test_what_is_no_http_is_refused(port: int, garbage: bytes) -> None:
    connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT)
    connection.sendall(garbage)
    connection.shutdown(socket.SHUT_WR)
    try:
        answer = connection.recv(1000)
    except ConnectionResetError:
        answer = b""
    connection.close()
    assert answer == b"" or b" 4" in answer[:20]
