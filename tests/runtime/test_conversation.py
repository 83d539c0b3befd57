"""Proves that conversations on a kept cache answer as cold runs do, run only new tokens, and never
cut a prompt in silence, for both cache forms: python -m pytest tests/runtime/test_conversation.py
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_support import FORMS, write_folder

from qvlm_runtime import Model, PromptError, SessionError, load
from qvlm_runtime.budget import CacheBudget
from qvlm_runtime.context import Context, RowKey

TARGETS = ["ort", "rtx"] if FORMS[0] == "scatter" else ["rtx"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_folder(path, max_context=256)
    return path


@pytest.fixture(scope="module", params=TARGETS)
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(folder, request.param, threads=1, verify=False) as opened:
        yield opened


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)


TURNS: list[tuple[str, list[np.ndarray]]] = [
    ("What is it?", [picture(1)]),
    ("And its colour?", []),
    ("Compare.", [picture(2), picture(3)]),
    ("Why?", []),
]


def parts(text: str, images: list[Any] | None = None) -> list[dict[str, Any]]:
    shown = [{"type": "image", "image": image} for image in images or []]
    return [*shown, {"type": "text", "text": text}]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 5}, {"prefill_chunk": 5}])
def test_every_turn_is_the_answer_of_a_cold_run(model: Model, options: dict[str, Any]) -> None:
    cold: list[dict[str, Any]] = [{"role": "system", "content": parts("Be brief.")}]
    with model.conversation("Be brief.") as talk:
        for turn, (question, images) in enumerate(TURNS):
            cold.append({"role": "user", "content": parts(question, images)})
            expected = model.generate(cold, max_new_tokens=12, **options)
            warm = talk.ask(question, images, max_new_tokens=12, **options)
            assert warm.token_ids == expected.token_ids, turn
            assert warm.timings.prompt_tokens == expected.timings.prompt_tokens
            # The toy template writes ">" behind a question that it later leaves out, so a turn
            # keeps everything up to the end of the question before.
            assert bool(turn) == (warm.timings.cached_tokens > 0)
            assert warm.timings.cached_tokens >= talk_rows(model, cold[:-2]) - 1
            cold.append({"role": "assistant", "content": parts(warm.text)})
    assert model.budget.used == 0


def talk_rows(model: Model, messages: list[dict[str, Any]]) -> int:
    return model.count_tokens(messages) if len(messages) > 1 else 1


def test_only_the_new_tokens_are_run(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvlm_runtime.decoder import DecoderState

    ran: list[int] = []
    original = DecoderState.step

    def step(self: DecoderState, token_ids: Any, *rest: Any) -> Any:
        ran.append(len(token_ids))
        return original(self, token_ids, *rest)

    monkeypatch.setattr(DecoderState, "step", step)
    with model.conversation() as talk:
        talk.ask("What is it?", [picture(1)], max_new_tokens=6)
        ran.clear()
        model.vision.run = None  # type: ignore[assignment,method-assign]
        try:
            done = talk.ask("Why?", max_new_tokens=6)
        finally:
            del model.vision.run
        assert ran[0] == done.timings.prompt_tokens - done.timings.cached_tokens
        assert done.timings.cached_tokens == len("What is it?") + 1 + 3
        assert (done.timings.images, done.timings.cached_images) == (1, 1)


def test_a_changed_past_is_run_again(model: Model) -> None:
    with model.conversation() as talk:
        talk.ask("What is it?", [picture(1)], max_new_tokens=6)
        talk.messages[0]["content"][0]["image"] = model.pictures([picture(9)])[0]
        warm = talk.ask("Why?", max_new_tokens=6)
        assert warm.timings.cached_tokens == 1, "the rows before the image that changed"
        cold = model.generate(talk.messages[:-1], max_new_tokens=6)
        assert warm.token_ids == cold.token_ids


def test_conversations_side_by_side_do_not_disturb_each_other(model: Model) -> None:
    alone = []
    for n in range(3):
        with model.conversation() as talk:
            alone.append([talk.ask(f"{n}{q}", i, max_new_tokens=8).text for q, i in TURNS])
    talks = [model.conversation() for _ in range(3)]
    texts: list[list[str]] = [[], [], []]
    for question, images in TURNS:
        streams = [
            talk.stream(f"{n}{question}", images, max_new_tokens=8) for n, talk in enumerate(talks)
        ]
        given_out = ["", "", ""]
        waiting = {0, 1, 2}
        while waiting:
            for n in sorted(waiting):
                piece = next(streams[n], None)
                if piece is None:
                    waiting.discard(n)
                else:
                    given_out[n] += piece
        for n in range(3):
            texts[n].append(given_out[n])
    assert texts == alone
    assert model.budget.used == sum(talk.cache_bytes for talk in talks) > 0
    for talk in talks:
        talk.close()
    assert model.budget.used == 0


def test_a_turn_that_is_left_changes_nothing_and_the_next_is_right(model: Model) -> None:
    with model.conversation() as talk:
        first = talk.ask("What is it?", [picture(1)], max_new_tokens=6)
        expected = talk.ask("Why?", max_new_tokens=6).token_ids
    for read in (0, 1, 3):
        with model.conversation() as talk:
            assert talk.ask("What is it?", [picture(1)], max_new_tokens=6).text == first.text
            stream = talk.stream("Something else", [picture(4)], max_new_tokens=6)
            for _ in range(read):
                next(stream)
            with pytest.raises(PromptError, match="is answering"):
                talk.stream("Why?")
            stream.close()
            assert len(talk.messages) == 2
            assert talk.ask("Why?", max_new_tokens=6).token_ids == expected


def test_a_stream_that_is_dropped_does_not_block(model: Model) -> None:
    with model.conversation() as talk:
        stream = talk.stream("What?", max_new_tokens=6)
        next(stream)
        del stream
        assert talk.ask("What?", max_new_tokens=6).text


def test_a_cancelled_turn_counts_with_the_text_so_far(model: Model) -> None:
    with model.conversation() as talk:
        stream = talk.stream("What is it?", max_new_tokens=30)
        text = next(stream)
        stream.cancel()
        text += "".join(stream)
        assert stream.generation.finish == "cancelled"
        assert talk.messages[-1] == {"role": "assistant", "content": parts(text)}
        cold = model.generate([*talk.messages, {"role": "user", "content": parts("Go on")}],
                              max_new_tokens=5)  # fmt: skip
        assert talk.ask("Go on", max_new_tokens=5).token_ids == cold.token_ids


def test_a_full_cache_is_an_error_that_says_so(model: Model) -> None:
    with model.conversation(max_rows=40) as talk:
        talk.ask("x" * 20, max_new_tokens=10)
        with pytest.raises(PromptError, match=r"cache (of )?40 rows"):
            talk.ask("y" * 10, max_new_tokens=10)
        assert len(talk.messages) == 2
        with pytest.raises(PromptError, match=r"at most 256"):
            model.conversation(max_rows=257)


def test_dropping_the_oldest_turns_is_told_and_equals_a_cold_run(model: Model) -> None:
    with model.conversation("S", max_rows=64, when_full="drop_oldest") as talk:
        dropped = []
        for n in range(6):
            before = list(talk.messages)
            done = talk.ask(f"{n}" * 12, [picture(n)], max_new_tokens=8)
            kept = [before[0], *before[1 + done.dropped_messages :]]
            assert talk.messages[:-2] == kept
            cold = model.generate(talk.messages[:-1], max_new_tokens=8)
            assert done.token_ids == cold.token_ids
            dropped.append(done.dropped_messages)
        assert talk.messages[0]["role"] == "system"
        assert sum(dropped) > 0 and dropped[0] == 0
        with pytest.raises(PromptError, match=r"cache (of )?64 rows"):
            talk.ask("z" * 60, max_new_tokens=8)


def test_conversations_in_an_event_loop_equal_serial_ones(model: Model) -> None:
    def serial(n: int) -> list[str]:
        with model.conversation() as talk:
            return [talk.ask(f"{n}{q}", i, max_new_tokens=6).text for q, i in TURNS]

    async def one(n: int) -> list[str]:
        with model.conversation() as talk:
            texts = [(await talk.aask(f"{n}{q}", i, max_new_tokens=6)).text for q, i in TURNS[:-1]]
            question, images = TURNS[-1]
            stream = talk.astream(f"{n}{question}", images, max_new_tokens=6)
            return [*texts, "".join([piece async for piece in stream])]

    async def everything() -> list[list[str]]:
        return list(await asyncio.gather(*(one(n) for n in range(4))))

    assert asyncio.run(everything()) == [serial(n) for n in range(4)]
    assert model.budget.used == 0


def test_a_closed_conversation_says_so(model: Model) -> None:
    talk = model.conversation()
    talk.close()
    talk.close()
    with pytest.raises(SessionError, match="conversation is closed"):
        talk.ask("a")


def test_the_size_is_known_before(model: Model) -> None:
    with model.conversation(max_rows=100) as talk:
        assert talk.cache_bytes == model.cache_bytes(100) == model.budget.used


class State:
    def __init__(self) -> None:
        self.length = 0

    def rewind(self, length: int) -> None:
        assert length <= self.length
        self.length = length


class Decoder:
    def cache_bytes(self, rows: int) -> int:
        return rows

    def start(self, rows: int) -> State:
        return State()


KEYS: st.SearchStrategy[list[RowKey]] = st.lists(
    st.one_of(st.integers(0, 2), st.tuples(st.sampled_from("ab"), st.integers(0, 1))),
    min_size=1, max_size=8,
)  # fmt: skip


@given(st.lists(st.tuples(KEYS, st.integers(0, 9)), max_size=5))
@settings(max_examples=200, deadline=None)
def test_the_rows_kept_are_the_longest_common_beginning(runs: list[tuple[Any, int]]) -> None:
    """Also after runs that were cut short; at least one key is always left to run."""
    decoder: Any = Decoder()
    context, held = Context(decoder, 8, CacheBudget()), list[Any]()
    for keys, ran in runs:
        expected = 0
        while expected < min(len(held), len(keys) - 1) and held[expected] == keys[expected]:
            expected += 1
        assert context.reuse(keys) == expected == context.state.length
        context.state.length = min(len(keys), expected + ran)  # type: ignore[misc]
        context.record(keys)
        held = keys[: context.state.length]
