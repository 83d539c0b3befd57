"""Proves that caches of finished answers give the answers of cold runs, run only what is new, are taken by the
longest beginning and never by two at once, hold exactly the rows that were written, and make room when memory is
short, for both cache forms: python -m pytest tests/runtime/test_kept.py
"""

import gc
import random
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_support import SCATTERS, write_folder

from qvlm_runtime import CapacityError, Model, SessionError, Stream, load
from qvlm_runtime.decoder import Decoder, DecoderState
from qvlm_runtime.kept import KeptCaches
from qvlm_runtime.ort import OrtBinding

TARGETS = ["ort", "rtx"] if SCATTERS else ["rtx"]
# As in test_decoder.py: roundings of one logit, of its largest magnitude.
ROUNDINGS = 4 * 12 * 2**-24
# As chat models write it: what opens an answer stays in the conversation.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}>{% endif %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_folder(path, max_context=256)
    (path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=TARGETS)
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(folder, request.param, threads=1, verify=False) as opened:
        yield opened


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)


def said(role: str, text: str, *images: Any) -> dict[str, Any]:
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


TURNS: list[tuple[str, list[np.ndarray]]] = [
    ("What is it?", [picture(1)]),
    ("And its colour?", []),
    ("Compare.", [picture(2), picture(3)]),
    ("Why?", []),
]
SCHEMA = {
    "type": "object",
    "properties": {"open": {"type": "boolean"}},
    "required": ["open"],
    "additionalProperties": False,
}


# --- the answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.3, "seed": 5}, {"prefill_chunk": 5}, {"presence_penalty": 1.5},
     {"logprobs": 3}, {"json_schema": SCHEMA}],
)  # fmt: skip
def test_a_turn_is_a_cold_run_s_answer_and_runs_what_a_conversation_runs(
    model: Model, options: dict[str, Any]
) -> None:
    if "json_schema" in options:
        pytest.importorskip("llguidance", reason="the extra [json] is not installed")
    cold: list[dict[str, Any]] = [said("system", "Be brief.")]
    with model.conversation("Be brief.") as talk, KeptCaches(model, 1) as kept:
        for turn, (question, images) in enumerate(TURNS):
            cold.append(said("user", question, *images))
            expected = model.generate(cold, max_new_tokens=17, **options)
            conversed = talk.ask(question, images, max_new_tokens=17, **options)
            done = kept.stream(cold, max_new_tokens=17, **options).read()
            assert done.token_ids == expected.token_ids, turn
            assert (done.text, done.finish) == (expected.text, expected.finish)
            assert_equal_scores(model, cold, done, expected)
            timings = done.timings
            assert timings.cached_tokens == conversed.timings.cached_tokens
            assert bool(turn) == (timings.cached_tokens > len("?Be brief."))
            assert timings.prompt_tokens == expected.timings.prompt_tokens
            assert timings.run_tokens == timings.prompt_tokens - timings.cached_tokens
            assert expected.timings.run_tokens == timings.prompt_tokens
            cold.append(said("assistant", done.text))
        assert len(kept) == 1
    assert model.budget.used == 0


def assert_equal_scores(model: Model, question: Any, done: Any, expected: Any) -> None:
    """Two logits differ by twice the roundings of one; a log-softmax takes the difference of two such."""
    assert len(done.scores) == len(expected.scores)
    if not done.scores:
        return
    prompt, timings = model.prepare(question), done.timings
    state = model.decoder.start(len(prompt.token_ids) + len(done.token_ids))
    state.set_features(model.features(prompt.pictures, timings))
    logits = [state.step(prompt.token_ids, prompt.image_index, prompt.positions)]
    logits += [state.step([token]) for token in done.token_ids[:-1]]
    bound = 4 * ROUNDINGS * max(float(np.abs(step).max()) for step in logits)
    for ours, theirs in zip(done.scores, expected.scores, strict=True):
        assert ours.token_id == theirs.token_id
        assert abs(ours.logprob - theirs.logprob) <= bound
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        for (_, one), (_, other) in zip(ours.top, theirs.top, strict=True):
            assert abs(one - other) <= bound


def test_another_image_in_the_same_place_is_run_again(model: Model) -> None:
    """Its tokens are the same placeholders; nothing behind the image may be kept."""
    texts = [said("user", "before", picture(n)) for n in (1, 2)]
    with KeptCaches(model, 1) as kept:
        for message in [texts[0], texts[1], texts[1], texts[0]]:
            done = kept.stream([message], max_new_tokens=12).read()
            assert done.token_ids == model.generate([message], max_new_tokens=12).token_ids
        again = kept.stream([texts[0]], max_new_tokens=12).read()
        assert again.timings.cached_tokens == again.timings.prompt_tokens - 1
        other = kept.stream([texts[1]], max_new_tokens=12).read()
        assert other.timings.cached_tokens == 1, "the row before the image"


# --- which cache ---------------------------------------------------------------------------------


def answer(kept: KeptCaches, text: str, **options: Any) -> int:
    """Cached rows of an answer."""
    options = {"max_new_tokens": 4, **options}
    return kept.stream(text, **options).read().timings.cached_tokens


def test_the_longest_beginning_is_taken(model: Model) -> None:
    with KeptCaches(model, 3) as kept:
        for text in ("a" * 20, "b" * 20, "b" * 9 + "c" * 11):
            answer(kept, text)
        three = list(kept._idle)
        assert len(three) == 3
        assert answer(kept, "b" * 9 + "c" * 12) == 1 + 20
        assert answer(kept, "b" * 21) == 1 + 20
        assert answer(kept, "a" * 30) == 1 + 20
        assert kept._idle == [three[2], three[1], three[0]]


def test_what_shares_too_little_takes_no_other_conversation_s_cache(model: Model) -> None:
    """With room a new one, else that which was not used for the longest time."""
    with KeptCaches(model, 2) as kept:
        assert answer(kept, "x" + "a" * 20) == answer(kept, "x" + "b" * 20) == 0
        first, second = kept._idle
        assert answer(kept, "x" + "a" * 21) == 22  # now used later than the other
        assert kept._idle == [second, first]
        assert answer(kept, "x" + "c" * 20) == 2, "the rows it shares all the same"
        assert kept._idle == [first, second]
        # Half of the prompt is enough, also behind a long answer; half of what is held, too.
        assert answer(kept, "x" + "a" * 21, max_new_tokens=100) == 23
        assert answer(kept, "x" + "a" * 11 + "d" * 11) == 13
        assert answer(kept, "x" + "a" * 11 + "d" * 3 + "e" * 70) == 16
        assert kept._idle == [second, first]


def test_a_smaller_loss_decides_between_equal_beginnings(model: Model) -> None:
    with KeptCaches(model, 2) as kept:
        streams = [kept.stream("a" * 20, max_new_tokens=n) for n in (30, 4)]
        for stream in streams:
            stream.read()
        short = min(kept._idle, key=lambda context: context.rows)
        answer(kept, "a" * 20, max_new_tokens=4)
        assert kept._idle[-1] is short


def test_no_more_than_the_count_are_kept_and_none_without(model: Model) -> None:
    for count in range(4):
        with KeptCaches(model, count) as kept:
            for n in range(5):
                answer(kept, f"{n}" * 20)
                assert len(kept) == min(n + 1, count)
                assert model.budget.used == kept.nbytes
            assert kept.nbytes == count * model.cache_bytes(1 + 20 + 1 + 4)
            again = answer(kept, "4" * 20)
            assert again == (21 if count else 0)
        assert model.budget.used == 0


def test_a_closed_pool_keeps_nothing_more(model: Model) -> None:
    kept = KeptCaches(model, 2)
    stream = kept.stream("a", max_new_tokens=3)
    next(stream)
    kept.close()
    stream.read()
    assert len(kept) == model.budget.used == 0


@pytest.fixture(scope="module")
def asked(model: Model) -> list[tuple[list[dict[str, Any]], tuple[int, ...]]]:
    """Eighteen prompts of six conversations that share beginnings, and their answers."""
    found = []
    for n in range(6):
        images = [picture(n)] if n > 3 else []
        talk = [said("user", f"{n % 3} " * 9 + "ab"[n % 2] * 4, *images)]
        for _ in range(3):
            done = model.generate(talk, max_new_tokens=8)
            found.append((list(talk), done.token_ids))
            talk += [said("assistant", done.text), said("user", "And?")]
    return found


def go_on(stream: Stream, what: str) -> bool:
    """Do something with a stream; whether it is still open."""
    if what == "step":
        return next(stream, None) is not None
    if what == "close":
        stream.close()
    elif what == "cancel":
        stream.cancel()
        list(stream)
    elif what == "read":
        stream.read()
    return False


def assert_counted(model: Model, kept: KeptCaches, count: int, running: int) -> None:
    in_use = set(kept._used)
    assert len(in_use) == running and not in_use & set(kept._idle), "a cache has one user"
    assert len(kept) + running <= max(count, running)
    assert model.budget.used == kept.nbytes + sum(context.nbytes for context in in_use)
    assert model.budget.used <= kept.most_bytes(3)
    assert all(context.rows == context.state.length > 0 for context in kept._idle)
    for context in (*in_use, *kept._idle):
        assert context.nbytes == model.cache_bytes(context.state.capacity)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_any_mixture_of_answers_is_right_and_counted(
    model: Model, asked: list[Any], count: int, seed: int
) -> None:
    """Streams side by side that are read, closed, cancelled and dropped."""
    chance = random.Random(seed)
    running: list[tuple[int, Stream]] = []
    reused = 0
    with KeptCaches(model, count) as kept:
        for _ in range(150):
            if len(running) < 3 and chance.random() < 0.4:
                n, chunk = chance.randrange(len(asked)), chance.choice([None, 3])
                stream = kept.stream(asked[n][0], max_new_tokens=8, prefill_chunk=chunk)
                running.append((n, stream))
            elif running:
                n, stream = running.pop(chance.randrange(len(running)))
                what = chance.choice(["step", "step", "read", "close", "cancel", "drop"])
                if go_on(stream, what):
                    running.append((n, stream))
                length = None if what == "read" else len(stream.token_ids)
                assert stream.token_ids == asked[n][1][:length]
                reused += stream.timings.cached_tokens
            stream = None  # type: ignore[assignment]
            assert_counted(model, kept, count, len(running))
        running.clear()
    assert bool(reused) == bool(count)
    assert model.budget.used == 0


def test_the_most_memory_is_known(folder: Path, model: Model) -> None:
    one = model.cache_bytes(256)
    assert [KeptCaches(model, n).most_bytes(2) for n in (0, 2, 5)] == [2 * one, 2 * one, 5 * one]
    with load(folder, model.target, threads=1, verify=False, cache_limit=3 * one) as limited:
        assert KeptCaches(limited, 5).most_bytes(2) == 3 * one


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
    from qvlm_runtime import PromptError

    with KeptCaches(model, 1) as kept:
        answer(kept, LONG)
        (context,) = kept._idle
        with pytest.raises(PromptError, match="exceed the cache"):
            kept.stream(LONG, max_new_tokens=300)
        assert kept._idle == [context] and context.rows == 38


def test_a_cache_that_rests_holds_no_image_features(folder: Path) -> None:
    from qvlm_runtime import FeatureCache

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
