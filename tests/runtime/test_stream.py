"""Proves what an application needs of one answer: cancellation within one token, timeouts, chunked
prefill, async streams and the cache budget; every answer is that of a cold, whole run:
python -m pytest tests/runtime/test_stream.py
"""

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_support import SCATTERS, model_spec, write_folder

import qvlm_runtime
from qvlm_runtime import CapacityError, Model, PromptError, load
from qvlm_runtime.ort import OrtBinding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_folder(path, max_context=256)
    return path


@pytest.fixture(params=["ort", "rtx"] if SCATTERS else ["rtx"])
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    """Both cache forms."""
    with load(folder, request.param, threads=1, verify=False) as opened:
        yield opened


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every run of a decoder."""
    runs: list[int] = []
    original = OrtBinding.run

    def run(self: OrtBinding) -> None:
        original(self)
        runs.append(1)

    monkeypatch.setattr(OrtBinding, "run", run)
    return runs


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (8, 9, 3), np.uint8) for _ in range(count)]


LONG = "a question " * 6


# --- prefill -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 7, 69, 1000])
def test_a_prompt_in_pieces_gives_the_same_answer(
    model: Model, steps: list[int], chunk: int
) -> None:
    whole = model.generate(LONG, pictures(2), max_new_tokens=20)
    before = len(steps)
    pieces = model.generate(LONG, pictures(2), max_new_tokens=20, prefill_chunk=chunk)
    assert pieces.token_ids == whole.token_ids
    tokens = whole.timings.prompt_tokens
    assert len(steps) - before == -(-tokens // chunk) + pieces.timings.decode_steps


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pieces_bound_the_memory_of_a_long_prompt(tmp_path: Path) -> None:
    """Attention scores of 3,000 tokens at once are 2 heads x 3000 x 3000 x 4 bytes = 72 MB, several times over
    (scaled, masked, softmax); in pieces of 100 each is 2.4 MB."""
    write_folder(tmp_path, max_context=3100)
    peaks = {}
    for chunk in (None, 100):
        code = (
            "from pathlib import Path\nfrom qvlm_runtime import load\n"
            f"model = load({str(tmp_path)!r}, 'rtx', threads=1, verify=False)\n"
            f"model.generate('x' * 3000, max_new_tokens=1, prefill_chunk={chunk})\n"
            # Not ru_maxrss: a child begins with its parent's.
            "status = Path('/proc/self/status').read_text()\n"
            "print(status.split('VmHWM:')[1].split()[0])"
        )
        root = str(Path(qvlm_runtime.__file__).parent.parent)
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks[chunk] = int(done.stdout) * 1024
    assert peaks[None] - peaks[100] > 72 << 20


# --- ends ----------------------------------------------------------------------------------------


def test_a_cancelled_answer_computes_no_further_token(model: Model, steps: list[int]) -> None:
    whole = model.generate("tell", max_new_tokens=60)
    for read in (0, 1, 5):
        steps.clear()
        stream = model.stream("tell", max_new_tokens=60)
        text = "".join(next(stream) for _ in range(read))
        ran = len(steps)
        stream.cancel()
        text += "".join(stream)
        assert len(steps) == ran
        assert stream.generation.finish == "cancelled" and stream.generation.text == text
        assert whole.token_ids[:ran] == stream.generation.token_ids


def test_a_cancel_from_another_thread_ends_within_one_token(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is held inside the third step while another thread cancels: no fourth one runs."""
    original, entered, go = OrtBinding.run, threading.Event(), threading.Event()
    runs: list[int] = []

    def run(self: OrtBinding) -> None:
        runs.append(1)
        if len(runs) == 3:
            entered.set()
            assert go.wait(20)
        original(self)

    monkeypatch.setattr(OrtBinding, "run", run)
    stream = model.stream("tell", max_new_tokens=60)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    assert entered.wait(20)
    stream.cancel()
    go.set()
    reader.join(20)
    assert len(runs) == 3 and len(stream.generation.token_ids) == 3
    assert stream.generation.finish == "cancelled"


def test_a_cancel_stops_between_the_pieces_of_a_prompt(model: Model, steps: list[int]) -> None:
    stream = model.stream(LONG, max_new_tokens=5, prefill_chunk=10)
    halts = iter([False] * 4 + [True] * 9)
    stream._answer._halt = lambda: next(halts)  # type: ignore[method-assign]
    assert list(stream) == [] and len(steps) == 3


def test_a_timeout_keeps_the_text_so_far(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model.generate("tell", max_new_tokens=60)
    now = [100.0]
    monkeypatch.setattr("qvlm_runtime.stream.time.monotonic", lambda: now[0])
    stream = model.stream("tell", max_new_tokens=60, timeout=3.0)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        now[0] += 1
    done = stream.generation
    assert done.finish == "timeout" and done.text == "".join(pieces)
    assert done.token_ids == whole.token_ids[: len(done.token_ids)] and len(pieces) < 10


@pytest.mark.parametrize(
    "option",
    [
        *({"timeout": 0}, {"timeout": np.inf}, {"timeout": "1 s"}),
        *({"prefill_chunk": 0}, {"max_new_tokens": 0}, {"max_new_tokens": 2.5}),
    ],
)
def test_limits_out_of_range_name_themselves(model: Model, option: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=next(iter(option))):
        model.stream("a", **option)


def test_a_token_that_the_vocabulary_lacks_cannot_be_biased(model: Model) -> None:
    with pytest.raises(PromptError, match="logit_bias: token 260, expected ids below 260"):
        model.stream("a", logit_bias={260: 1.0})


# --- async ---------------------------------------------------------------------------------------


def test_async_streams_side_by_side_equal_serial_answers(model: Model) -> None:
    prompts = [f"{n} things" for n in range(6)]
    expected = [model.generate(p, pictures(1, n), max_new_tokens=25) for n, p in enumerate(prompts)]

    async def one(n: int) -> tuple[str, tuple[int, ...]]:
        stream = model.astream(prompts[n], pictures(1, n), max_new_tokens=25)
        text = "".join([piece async for piece in stream])
        return text, stream.generation.token_ids

    async def everything() -> list[tuple[str, tuple[int, ...]]]:
        return list(await asyncio.gather(*(one(n) for n in range(6))))

    assert asyncio.run(everything()) == [(done.text, done.token_ids) for done in expected]


def test_a_cancelled_task_frees_its_cache_within_one_token(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, entered, go = OrtBinding.run, threading.Event(), threading.Event()
    runs: list[int] = []

    def run(self: OrtBinding) -> None:
        runs.append(1)
        entered.set()
        assert go.wait(20)
        original(self)

    monkeypatch.setattr(OrtBinding, "run", run)

    async def scenario() -> None:
        task = asyncio.create_task(model.agenerate("tell", max_new_tokens=60))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert model.budget.used > 0, "the step that runs still has its cache"
        go.set()
        for _ in range(2000):
            if model.budget.used == 0:
                return
            await asyncio.sleep(0.005)

    asyncio.run(scenario())
    assert len(runs) == 1 and model.budget.used == 0


def test_async_cancel_and_aclose(model: Model) -> None:
    async def scenario() -> tuple[str, int]:
        stream = model.astream("tell", max_new_tokens=60)
        await stream.open()
        text = await stream.__anext__()
        stream.cancel()
        text += "".join([piece async for piece in stream])
        left = model.astream("tell", max_new_tokens=60)
        await left.__anext__()
        used = model.budget.used
        await left.aclose()
        assert stream.generation.finish == "cancelled" and stream.generation.text == text
        return text, used

    text, used = asyncio.run(scenario())
    assert text and used > 0 and model.budget.used == 0


def test_an_async_request_that_is_refused_says_why(model: Model) -> None:
    with pytest.raises(PromptError, match="temperature"):
        asyncio.run(model.agenerate("a", temperature=-1.0))


# --- memory --------------------------------------------------------------------------------------


def test_the_size_of_a_cache_is_known_and_is_what_it_takes(model: Model) -> None:
    spec = model_spec()
    expected = 100 * 2 * spec.layers * spec.kv_heads * spec.head_dim * 4
    assert model.cache_bytes(100) == expected
    state = model.decoder.start(100)
    layers = state._cache.layers  # type: ignore[attr-defined]
    assert sum(buffer.array.nbytes for pair in layers for buffer in pair) == expected


def test_what_exceeds_the_limit_is_refused_before_anything_runs(folder: Path) -> None:
    with load(folder, "rtx", verify=False) as probe:
        one = probe.cache_bytes(40)
    with load(folder, "rtx", verify=False, cache_limit=2 * one) as model:
        options: dict[str, Any] = {"max_new_tokens": 40 - 4}  # "ab" is four tokens here
        streams = [model.stream("ab", **options) for _ in range(2)]
        assert model.budget.used == 2 * one
        with pytest.raises(CapacityError, match=rf"{one} bytes does not fit: {2 * one} of"):
            model.stream("ab", **options)
        streams[0].close()
        assert model.generate("ab", **options).token_ids
        del streams
        gc.collect()
        assert model.budget.used == 0
        with pytest.raises(CapacityError):
            model.conversation(max_rows=81)


@pytest.mark.parametrize("how", ["read", "close", "drop", "with", "fault", "unread"])
def test_every_way_out_of_a_stream_frees_its_cache(
    model: Model, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    stream = model.stream("ab", max_new_tokens=9)
    assert model.budget.used > 0
    if how == "read":
        list(stream)
    elif how == "close":
        next(stream)
        stream.close()
        assert list(stream) == []
    elif how == "with":
        with stream:
            next(stream)
    elif how == "fault":
        model.decoder.session.close()
        with pytest.raises(Exception, match="closed"):
            next(stream)
    else:
        if how == "drop":
            next(stream)
        del stream
    assert model.budget.used == 0
