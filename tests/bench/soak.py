"""A long load on one model folder: does memory grow, is a cache left, is every answer the serial one?

Two parts, each bounded in count:
  runtime   short generations in this process, 10,000 of them: greedy and sampled, with and without images (more
            images than the feature cache holds), conversations, streams that are left, cancelled ones.
  server    requests to a `qvlm-serve` process from several clients, 3,600 of them: one every two seconds for two
            hours, as fast as they go. Whole and streamed answers, clients that are killed, that read slowly, bodies
            that are malformed or too large, decompression bombs, paths that leave the image folder.
Every answer is compared with the one the same question got alone at the start. Resident memory is read after a
warm-up of a tenth and at the end, with the growth between; a run fails on a wrong answer, a cache that is left beside
those that the server says it keeps and was told to, or growth above 16 MiB: less than 5 kB an answer, where one leaked
cache of the demo model has more.

Run: python tests/bench/soak.py OUT [--generations 10000] [--requests 3600] [--clients 6] [--target ort] [--json]
Linux only (/proc). Exit 1 if something was wrong.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import gc
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qvlm_runtime import FeatureCache, Model, load

GROWTH = 16 << 20
IMAGES = 12  # every second one is asked about
KEPT = 4  # of which the feature cache holds this many
KEPT_CACHES = 3
KINDS = 24
NEW_TOKENS = 6
SECONDS = 120.0


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)


def encoded(seed: int) -> str:
    out = io.BytesIO()
    Image.fromarray(picture(seed)).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def options(kind: int) -> dict[str, Any]:
    """A third of the kinds is sampled, with a seed of its own."""
    chosen: dict[str, Any] = {"temperature": 1.2, "seed": kind} if kind % 3 == 2 else {}
    return chosen


def question(kind: int) -> str:
    return f"What about {kind}?"


# --- the runtime ---------------------------------------------------------------------------------


def generations(folder: Path, target: str | None, count: int) -> dict[str, Any]:
    """The first part; what it measured."""
    one = FeatureCache()
    with load(folder, target, threads=1, feature_cache=one) as model:
        model.generate("a", [picture(0)], max_new_tokens=1)
        model.feature_cache = FeatureCache(one.bytes * KEPT)
        serial = [ask(model, kind) for kind in range(KINDS)]
        talks = [talk(model, kind) for kind in range(4)]
        wrong, warm, chance = 0, 0, random.Random(0)
        start = time.perf_counter()
        for n in range(count):
            if n == count // 10:
                gc.collect()
                warm = resident(os.getpid())
            kind = chance.randrange(KINDS)
            if n % 50 == 7:
                wrong += talk(model, n // 50 % 4) != talks[n // 50 % 4]
            elif n % 10 == 3:
                leave(model, kind, n)
            else:
                wrong += ask(model, kind) != serial[kind]
            show("generations", n + 1, count)
        gc.collect()
        return {
            "generations": count,
            "seconds": round(time.perf_counter() - start, 1),
            "wrong": wrong,
            "growth_bytes": resident(os.getpid()) - warm,
            "resident_bytes": resident(os.getpid()),
            "cache_bytes_left": model.budget.used,
            "image_hits": model.feature_cache.hits,
            "image_misses": model.feature_cache.misses,
        }


def ask(model: Model, kind: int) -> tuple[int, ...]:
    images = [picture(kind % IMAGES)] if kind % 2 else []
    return model.generate(
        question(kind), images, max_new_tokens=NEW_TOKENS, **options(kind)
    ).token_ids


def talk(model: Model, kind: int) -> list[str]:
    with model.conversation() as opened:
        first = opened.ask(question(kind), [picture(kind)], max_new_tokens=NEW_TOKENS).text
        return [first, opened.ask("And then?", max_new_tokens=NEW_TOKENS).text]


def leave(model: Model, kind: int, n: int) -> None:
    """Read some of an answer, then cancel, close or drop it."""
    stream = model.stream(question(kind), max_new_tokens=40)
    for _ in range(n // 10 % 4):
        next(stream, None)
    if n % 3 == 0:
        stream.cancel()
        list(stream)
    elif n % 3 == 1:
        stream.close()


# --- the server ----------------------------------------------------------------------------------


@contextlib.contextmanager
def server(folder: Path, target: str | None, root: Path, clients: int) -> Iterator[tuple[int, int]]:
    """A qvlm-serve process; its port and process id."""
    command = [sys.executable, "-m", "qvlm_runtime.serve.cli", str(folder), "--port", "0",
               "--threads", "1", "--image-root", str(root), "--max-queue", str(2 * clients),
               "--max-body-bytes", "2000000", "--max-body-seconds", "5",
               "--kept-caches", str(KEPT_CACHES)]  # fmt: skip
    command += ["--target", target] if target else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r":(\d+)$", line.strip())
        if found is None:
            raise SystemExit(f"soak: qvlm-serve did not start ({line.strip()})")
        yield int(found[1]), process.pid
    finally:
        process.terminate()
        process.wait(60)


def body(kind: int, stream: bool) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": question(kind)}]
    if kind % 2:
        parts.insert(0, {"type": "image_url", "image_url": {"url": encoded(kind % IMAGES)}})
    messages = [{"role": "user", "content": parts}]
    return {"messages": messages, "max_tokens": NEW_TOKENS, "stream": stream, **options(kind)}


def post(port: int, data: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        kind = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", data, kind)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def answer(port: int, kind: int, stream: bool) -> str:
    """The text of an answer; its status if it is not 200."""
    status, data = post(port, json.dumps(body(kind, stream)).encode())
    if status != 200:
        return f"status {status}"
    if not stream:
        return str(json.loads(data)["choices"][0]["message"]["content"])
    events = [line[6:] for line in data.decode().split("\n\n") if line.startswith("data: {")]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    return "".join(delta.get("content", "") for delta in deltas)


def opened(port: int, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    )
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
    return connection


def killed(port: int, kind: int, chance: random.Random) -> str:
    connection = opened(port, json.dumps({**body(kind, True), "max_tokens": 60}).encode())
    connection.settimeout(chance.uniform(0.001, 0.2))
    with contextlib.suppress(TimeoutError):
        connection.recv(chance.randrange(1, 400))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    return "killed"


def slow(port: int, kind: int) -> str:
    """Reads a few bytes at a time; the answer still has to be whole."""
    connection = opened(port, json.dumps(body(kind, True)).encode())
    received = b""
    while b"[DONE]" not in received:
        piece = connection.recv(200)
        if not piece:
            break
        received += piece
        time.sleep(0.005)
    connection.close()
    return "slow" if b"[DONE]" in received or b" 429 " in received else "slow answer cut"


def hostile(port: int, n: int) -> str:
    """A request that must be refused; its status is a 4xx."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + bytes(4)
    urls = [
        "data:image/png;base64," + base64.b64encode(bomb).decode(),
        "file:///etc/passwd",
        "../../etc/passwd",
        "http://127.0.0.1:1/x.png",
    ]
    bodies = [b"{", b"[" * 20_000, b'{"messages": 3}', b"x" * 2_100_000]
    if n % 8 < 4:
        part = {"type": "image_url", "image_url": {"url": urls[n % 4]}}
        data = json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()
    else:
        data = bodies[n % 4]
    try:
        status, _ = post(port, data)
    except (ConnectionError, http.client.HTTPException):
        status = 413  # refused and closed while the body was still being sent
    return "refused" if 400 <= status < 500 else f"hostile request got {status}"


def requests(folder: Path, target: str | None, count: int, clients: int) -> dict[str, Any]:
    """The second part; what it measured."""
    outcomes, lock = Counter[str](), threading.Lock()
    with (
        tempfile.TemporaryDirectory() as root,
        server(folder, target, Path(root), clients) as (port, pid),
    ):
        serial = [answer(port, kind, False) for kind in range(KINDS)]

        def one(n: int) -> None:
            kind, chance = n % KINDS, random.Random(n)
            if n % 10 == 3:
                outcome = killed(port, kind, chance)
            elif n % 10 == 6:
                outcome = hostile(port, n // 10)
            elif n % 20 == 9:
                outcome = slow(port, kind)
            else:
                text = answer(port, kind, bool(n % 2))
                outcome = text if text.startswith("status 429") else (
                    "right" if text == serial[kind] else f"wrong: {text[:40]!r}"
                )  # fmt: skip
            with lock:
                outcomes[outcome] += 1
                show("requests", sum(outcomes.values()), count)

        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(one, range(count // 10)))
            settled(port)
            warm = resident(pid)
            list(pool.map(one, range(count // 10, count)))
        left, kept = settled(port)
        return {
            "requests": count,
            "seconds": round(time.perf_counter() - start, 1),
            "outcomes": dict(sorted(outcomes.items())),
            "wrong": sum(n for name, n in outcomes.items() if name.startswith(("wrong", "hostile", "slow a"))),
            "growth_bytes": resident(pid) - warm,
            "resident_bytes": resident(pid),
            "cache_bytes_left": left,
            "kept_caches": kept,
            "prompt_tokens_reused": metric(port, "prompt_tokens_reused_total"),
            "prompt_tokens_run": metric(port, "prompt_tokens_run_total"),
        }  # fmt: skip


def metric(port: int, name: str) -> int:
    """A number of the server's /metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return int(float(re.findall(rf"^qvlm_{name} (\S+)$", text, re.MULTILINE)[0]))


def settled(port: int) -> tuple[int, int]:
    """Wait until no answer runs; bytes of caches that are left beside the kept ones, and how many are kept.

    A kept one too many counts as left.
    """
    deadline = time.monotonic() + SECONDS
    while metric(port, "answers_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    kept = metric(port, "kept_caches")
    left = metric(port, "cache_bytes") - metric(port, "kept_cache_bytes")
    return left + max(0, kept - KEPT_CACHES), kept


def show(what: str, done: int, count: int) -> None:
    if done % max(1, count // 100) == 0:
        print(f"\r{what} {done}/{count}", end="", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--generations", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=3_600)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--target")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped run stops its server
    parts: list[Callable[[], dict[str, Any]]] = []
    if args.generations:
        parts.append(lambda: generations(args.folder, args.target, args.generations))
    if args.requests:
        parts.append(lambda: requests(args.folder, args.target, args.requests, args.clients))
    results = []
    for part in parts:
        results.append(part())
        print(file=sys.stderr)
        for name, value in results[-1].items():
            print(f"{name:20} {value}")
    bad = [r for r in results if r["wrong"] or r["cache_bytes_left"] or r["growth_bytes"] > GROWTH]
    print("FAILED" if bad else "passed")
    if args.json:
        print(json.dumps(results))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
