"""Proves that a cache of a finished answer holds exactly the rows that were written, however the answer ended, has one
user, and makes room when memory is short: python -m pytest tests/runtime/test_kept_ends.py
"""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kept_support import ROUNDINGS, TARGETS, answer, picture, said, write_chat_folder

from qvlm_runtime import CapacityError, FeatureCache, Model, PromptError, SessionError, load
from qvlm_runtime.decoder import Decoder, DecoderState
from qvlm_runtime.kept import KeptCaches
from qvlm_runtime.ort import OrtBinding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=TARGETS)
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(folder, request.param, threads=1, verify=False) as opened:
        yield opened


# --- how an answer ends --------------------------------------------------------------------------


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = staticmethod(time.perf_counter)

    def advance(self) -> None:
        self.now += 10.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("qvlm_runtime.stream.time", found)
    return found


class Runs:
    """Does something behind a later run of the engine."""

    def __init__(self) -> None:
        self.count = 0
        self.planned: dict[int, Callable[[], None]] = {}

    def after(self, runs: int, action: Callable[[], None]) -> None:
        self.planned[self.count + runs] = action


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Runs:
    original, runs = OrtBinding.run, Runs()

    def run(self: OrtBinding) -> None:
        original(self)
        runs.count += 1
        runs.planned.get(runs.count, lambda: None)()

    monkeypatch.setattr(OrtBinding, "run", run)
    return runs


LONG = "a question " * 3  # 1 + 33 + 1 tokens: eight whole chunks of 4 and 3 tokens more


@pytest.mark.parametrize("how", ["cancel", "timeout"])
@pytest.mark.parametrize(("runs", "rows"), [(1, 4), (5, 20), (9, 35), (10, 36), (12, 38)])
def test_an_answer_that_is_ended_keeps_the_rows_that_were_written(
    model: Model, engine: Runs, clock: Clock, how: str, runs: int, rows: int
) -> None:
    with KeptCaches(model, 1) as kept:
        stream = kept.stream(LONG, max_new_tokens=9, prefill_chunk=4, timeout=5.0)
        engine.after(runs, stream.cancel if how == "cancel" else clock.advance)
        done = stream.read()
        assert done.finish == {"cancel": "cancelled"}.get(how, how)
        (context,) = kept._idle
        assert context.rows == context.state.length == rows
        assert done.timings.run_tokens == min(rows, 35)
        assert_rows(model, context)
        again = kept.stream(LONG, max_new_tokens=9).read()
        assert again.timings.cached_tokens == min(rows, 34)
        assert again.token_ids == model.generate(LONG, max_new_tokens=9).token_ids


def assert_rows(model: Model, context: Any) -> None:
    """The rows of a cache are those of the tokens that it says it holds."""
    fresh = model.decoder.start(context.rows)
    fresh.step(context._held)
    for ours, theirs in zip(context.state.cache_rows(0), fresh.cache_rows(0), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2 * ROUNDINGS * np.abs(theirs).max())


@pytest.mark.parametrize("read", [0, 1, 3])
def test_an_answer_that_is_left_keeps_the_rows_that_were_written(model: Model, read: int) -> None:
    with KeptCaches(model, 1) as kept:
        answer(kept, LONG)
        stream = kept.stream(LONG + "b", max_new_tokens=9)
        for _ in range(read):
            next(stream)
        stream.close()
        (context,) = kept._idle
        # Not begun, it still holds what it shared; the last token that was given was not run.
        assert context.rows == context.state.length
        assert context.rows == (36 + len(stream.token_ids) - 1 if read else 34)
        assert_rows(model, context)
        expected = model.generate(LONG + "bc", max_new_tokens=9).token_ids
        assert kept.stream(LONG + "bc", max_new_tokens=9).read().token_ids == expected


def test_an_answer_that_never_ran_leaves_no_empty_cache(model: Model) -> None:
    with KeptCaches(model, 2) as kept:
        kept.stream("a").close()
        stream = kept.stream("a", timeout=1e-9)
        assert stream.read().finish == "timeout"
        assert len(kept) == model.budget.used == 0


@pytest.mark.parametrize("runs", [1, 2, 5])
@pytest.mark.parametrize("before", [False, True])
def test_an_answer_whose_engine_fails_drops_its_cache(
    model: Model, engine: Runs, runs: int, before: bool
) -> None:
    """A new one, or one that was kept."""

    def fail() -> None:
        raise SessionError("the engine failed")

    with KeptCaches(model, 2) as kept:
        if before:
            answer(kept, "a" * 9)
        stream = kept.stream("a" * 50, max_new_tokens=9, prefill_chunk=20)
        assert len(kept) == 0
        engine.after(runs, fail)
        with pytest.raises(SessionError, match="the engine failed"):
            stream.read()
        assert bool(stream.timings.cached_tokens) == before
        assert len(kept) == model.budget.used == 0


def test_a_stream_that_is_dropped_frees_its_cache(model: Model) -> None:
    with KeptCaches(model, 1) as kept:
        stream = kept.stream(LONG)
        next(stream)
        assert model.budget.used > 0
        del stream
        assert len(kept) == len(kept._used) == model.budget.used == 0


def test_what_is_refused_takes_no_cache(model: Model) -> None:
    with KeptCaches(model, 1) as kept:
        answer(kept, LONG)
        (context,) = kept._idle
        with pytest.raises(PromptError, match="exceed the cache"):
            kept.stream(LONG, max_new_tokens=300)
        assert kept._idle == [context] and context.rows == 38


def test_a_cache_that_rests_holds_no_image_features(folder: Path) -> None:
    with load(folder, TARGETS[-1], threads=1, verify=False) as model, KeptCaches(model, 1) as kept:
        stream = kept.stream([said("user", "a", picture(1))], max_new_tokens=3)
        next(stream)
        (features,) = model.feature_cache._entries.values()
        buffer = weakref.ref(features.buffer)
        model.feature_cache = FeatureCache(0)
        del features
        gc.collect()
        assert buffer() is not None
        stream.read()
        del stream
        gc.collect()
        assert buffer() is None and len(kept) == 1


# --- memory --------------------------------------------------------------------------------------


def opened(folder: Path, target: str, rows: int) -> Model:
    """A model whose caches may have so many rows together."""
    with load(folder, target, threads=1, verify=False) as probe:
        limit = probe.cache_bytes(rows)
    return load(folder, target, threads=1, verify=False, cache_limit=limit)


@pytest.mark.parametrize("target", TARGETS)
def test_kept_caches_make_room_before_an_answer_is_refused(folder: Path, target: str) -> None:
    with opened(folder, target, 100) as model, KeptCaches(model, 9) as kept:
        for name in "abc":  # 30 rows each
            answer(kept, name * 18, max_new_tokens=10)
        _, b, c = kept._idle
        answer(kept, "d" * 18, max_new_tokens=10)
        assert kept._idle[:2] == [b, c] and len(kept) == 3, "the longest unused made room"
        # A conversation that grows: the others make room, and its own rows stay.
        assert answer(kept, "b" * 60, max_new_tokens=30) == 19
        assert kept._idle == [b] and model.budget.used == model.cache_bytes(92)
        # It shrinks to what is asked.
        assert answer(kept, "b" * 18, max_new_tokens=10) == 19
        assert kept._idle == [b] and model.budget.used == model.cache_bytes(30)


@pytest.mark.parametrize("target", TARGETS)
def test_an_answer_that_can_have_no_memory_drops_no_cache(folder: Path, target: str) -> None:
    with opened(folder, target, 100) as model, KeptCaches(model, 9) as kept:
        answer(kept, "a" * 18, max_new_tokens=10)
        running = kept.stream("b" * 18, max_new_tokens=40)  # 60 rows
        next(running)
        for text in ("c" * 18, "a" * 19):
            with pytest.raises(CapacityError, match="does not fit"):
                kept.stream(text, max_new_tokens=30)
        assert len(kept) == 1 and kept._idle[0].rows == 1 + 18 + 1 + 9
        assert answer(kept, "a" * 19) == 19
        running.close()
        assert kept.stream("c" * 18, max_new_tokens=70).read().finish == "length"


def test_kept_caches_make_room_on_a_machine_whose_memory_ends(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that has no memory says SessionError: no limit told the budget."""
    room = model.cache_bytes(70)
    original = Decoder.start

    def start(self: Decoder, capacity: int, *rest: Any) -> DecoderState:
        if model.budget.used > room:  # what is asked now is counted
            raise SessionError("out of device memory")
        return original(self, capacity, *rest)

    monkeypatch.setattr(Decoder, "start", start)
    with KeptCaches(model, 9) as kept:
        for name in "abc":
            answer(kept, name * 18, max_new_tokens=10)
        assert len(kept) == 2
        with pytest.raises(SessionError, match="out of device memory"):
            kept.stream("d" * 60, max_new_tokens=30)
        assert len(kept) == model.budget.used == 0


@pytest.mark.parametrize("fault", [MemoryError, SessionError])
def test_a_cache_that_cannot_be_moved_is_dropped(
    model: Model, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    def resize(self: DecoderState, capacity: int) -> None:
        raise fault

    expected = model.generate("a" * 20, max_new_tokens=9).token_ids
    with KeptCaches(model, 2) as kept:
        answer(kept, "a" * 18)
        (context,) = kept._idle
        monkeypatch.setattr(DecoderState, "resize", resize)
        done = kept.stream("a" * 20, max_new_tokens=9).read()
        assert done.token_ids == expected and done.timings.cached_tokens == 0
        assert context not in kept._idle and len(kept) == 1
        assert model.budget.used == kept.nbytes


def test_one_answer_at_a_time_takes_a_cache(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that choose at once would choose the same."""
    original, inside, most = KeptCaches._prepared, [0], [0]

    def prepared(self: KeptCaches, *rest: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.05)  # the other thread's time to come in
        inside[0] -= 1
        return original(self, *rest)

    monkeypatch.setattr(KeptCaches, "_prepared", prepared)
    with KeptCaches(model, 2) as kept, ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda text: answer(kept, text), ["a" * 9, "a" * 10]))
        assert most == [1]
