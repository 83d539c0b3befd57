"""Proves that the embedding examples run and do what they say: python -m pytest tests/runtime/test_examples.py"""

import asyncio
import dataclasses
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_support import write_folder
from serve_support import Brake, png

import qvlm_runtime
from qvlm_runtime import Model, load

ROOT = Path(qvlm_runtime.__file__).parent.parent
EXAMPLES = ROOT / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose only target runs on every supported ONNX Runtime: the examples load the default."""
    path = tmp_path_factory.mktemp("model")
    manifest = write_folder(path, max_context=128)
    targets = {"rtx": manifest.targets["rtx"]}
    only = dataclasses.replace(manifest, targets=targets)
    (path / "manifest.json").write_text(only.to_json())
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with load(folder, threads=1) as opened:
        yield opened


def as_script(name: str, *arguments: str, stdin: bytes = b"") -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        input=stdin, capture_output=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.stdout.decode(), done.stderr.decode()


def ppm(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return b"P6\n7 5\n255\n" + pixels.tobytes()


def test_the_camera_loop_answers_every_frame(folder: Path, model: Model) -> None:
    stream = ppm(1) + ppm(1) + ppm(2)
    module = example("camera_loop")
    hits = model.feature_cache.hits
    answers = list(module.watch(model, io.BytesIO(stream), "What?"))
    assert len(answers) == 3 and answers[0] == answers[1]
    assert model.feature_cache.hits == hits + 1, "the frame that did not change"
    printed, _ = as_script("camera_loop", str(folder), "What?", stdin=stream)
    assert printed == "".join(f"{answer}\n" for answer in answers)


def test_the_async_service_answers_all_and_keeps_its_limit(
    folder: Path, model: Model, tmp_path: Path
) -> None:
    questions = [f"{n}?" for n in range(5)]
    expected = [model.generate(q, [png(3)], max_new_tokens=64).text for q in questions]
    used = []
    original = model.stream

    def stream(*arguments: Any, **options: Any) -> Any:
        made = original(*arguments, **options)
        used.append(model.budget.used)
        return made

    async def ask() -> list[str]:
        service = example("async_service").Service(model, at_once=2)
        return list(await asyncio.gather(*(service.answer(q, png(3)) for q in questions)))

    model.stream = stream  # type: ignore[method-assign]
    try:
        assert asyncio.run(ask()) == expected
    finally:
        del model.stream
    assert len(used) == 5 and max(used) <= 2 * model.cache_bytes(71) and model.budget.used == 0
    (tmp_path / "a.png").write_bytes(png(3))
    printed, _ = as_script("async_service", str(folder), str(tmp_path / "a.png"), *questions)
    lines = [f"{q}\t{answer}\n" for q, answer in zip(questions, expected, strict=True)]
    assert printed == "".join(lines)


def test_the_async_service_keeps_its_deadline(model: Model) -> None:
    service = example("async_service").Service(model, seconds=0.2)
    with Brake() as brake:
        brake.on()
        threading.Timer(0.5, brake.off).start()
        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(service.answer("a", png()))
    assert brake.runs <= 1 and model.budget.used == 0


def test_the_batch_job_goes_on_where_it_was_cut(folder: Path, model: Model, tmp_path: Path) -> None:
    images, whole, cut = tmp_path / "images", tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    images.mkdir()
    for n in range(4):
        (images / f"{n}.png").write_bytes(png(n))
    (images / "broken.png").write_bytes(b"no image")
    (images / "notes.txt").write_text("not asked about")
    job, told = example("batch_folder"), list[str]()
    assert job.run(model, images, whole, "What?", told.append) == 5
    assert told[-1] == "5/5 broken.png"
    records = [json.loads(line) for line in whole.read_text().splitlines()]
    expected = model.generate("What?", [images / "2.png"], max_new_tokens=64).text
    assert records[2] == {"image": "2.png", "answer": expected, "finish": "length"}
    assert "not an image" in records[4]["error"]
    cut.write_bytes(whole.read_bytes()[: whole.read_bytes().index(b"2.png") + 30])
    told.clear()
    assert job.run(model, images, cut, "What?", told.append) == 3
    assert told == ["3/5 2.png", "4/5 3.png", "5/5 broken.png"]
    assert cut.read_bytes() == whole.read_bytes()
    printed, progress = as_script("batch_folder", str(folder), str(images), str(cut), "What?")
    assert printed == "" and progress == "\n", "nothing is left to do"


def test_the_batch_job_that_is_killed_goes_on_and_asks_nothing_twice(
    folder: Path, model: Model, tmp_path: Path
) -> None:
    images, whole, killed = tmp_path / "images", tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    images.mkdir()
    for n in range(40):
        (images / f"{n:03}.png").write_bytes(png(n))
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "batch_folder.py"), folder, images, killed, "What?"],
        stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    while process.poll() is None and (not killed.exists() or killed.read_bytes().count(b"\n") < 3):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was still at work"
    done = killed.read_bytes().count(b"\n")
    assert 3 <= done < 40
    job, told = example("batch_folder"), list[str]()
    assert job.run(model, images, killed, "What?", told.append) == 40 - done
    assert job.run(model, images, whole, "What?", told.append) == 40
    assert killed.read_bytes() == whole.read_bytes()
