"""Proves that qvlm-serve under load answers as it does alone, and keeps nothing of an answer but the caches it
says:
python -m pytest tests/runtime/test_serve_load.py
"""

import gc
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from runtime_support import write_folder
from serve_support import (
    chat_body,
    data_url,
    kill,
    only_kept,
    png,
    post,
    raw,
    request,
    serving,
    wait_for,
)

from qvlm_runtime import load
from qvlm_runtime.serve.app import App
from qvlm_runtime.serve.limits import Limits

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")


def test_three_hundred_mixed_answers_equal_serial_ones_and_memory_stays(tmp_path: Path) -> None:
    """Eight clients; every fourth leaves early. A leaked cache alone would be 10 MB here."""
    write_folder(tmp_path / "toy", max_context=256)
    model = load(tmp_path / "toy", "rtx", threads=1, verify=False)
    app = App(model, "toy", Limits(concurrent=3, queue=300))
    rows = 256
    kinds: list[dict[str, Any]] = [
        {"text": "a", "urls": (data_url(png(1)),)},
        {"text": "bb", "urls": (data_url(png(2)), data_url(png(3)))},
        {"text": "c" * 40, "temperature": 1.5, "seed": 3},
        {"text": "d", "max_tokens": 40, "stop": ["7"]},
        {"text": "e", "presence_penalty": 1.0, "stream": True},
    ]

    def text_of(port: int, fields: dict[str, Any]) -> str:
        body = chat_body(**fields)
        if not body.get("stream"):
            status, answer, _ = post(port, body)
            assert status == 200
            content: str = answer["choices"][0]["message"]["content"]
            return content
        data = json.dumps(body).encode()
        kind = {"content-type": "application/json"}
        status, events, _ = request(port, "POST", "/v1/chat/completions", data, kind)
        lines = [line[6:] for line in events.decode().splitlines() if line.startswith("data: ")]
        assert status == 200 and lines[-1] == "[DONE]"
        chunks = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
        return "".join(chunk.get("content", "") for chunk in chunks)

    with serving(app) as port:
        serial = [text_of(port, fields) for fields in kinds]

        def one(n: int) -> None:
            if n % 4 == 3:
                kill(raw(port, chat_body("x" * (n % 50), max_tokens=rows // 2, stream=True)))
            else:
                assert text_of(port, kinds[n % 5]) == serial[n % 5], f"answer {n} differs"

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(100)))  # warm-up: thread stacks, arenas, both caches
            warm = resident()
            list(pool.map(one, range(100, 400)))
        wait_for(lambda: app.gate.running == app.gate.waiting == 0)
        gc.collect()
        grown = resident() - warm
        assert only_kept(app) and len(app.kept) == 3
        # 300 answers of 50 kB each (JSON, pixels, cache) that were kept would be 15 MB.
        assert grown < 8 << 20, f"{grown} bytes more after 300 answers"
    model.close()


def resident() -> int:
    """Resident bytes of this process; 0 where there is no /proc."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0
