"""Proves that caches of finished answers give the answers of cold runs, run only what is new, and are taken by the
longest beginning: python -m pytest tests/runtime/test_kept.py
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kept_support import ROUNDINGS, TARGETS, answer, picture, said, write_chat_folder

from qvlm_runtime import Model, Stream, load
from qvlm_runtime.kept import KeptCaches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=TARGETS)
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(folder, request.param, threads=1, verify=False) as opened:
        yield opened


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
