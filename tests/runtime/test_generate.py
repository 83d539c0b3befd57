"""Proves the one loop on a fake engine with a known answer: what is fed at every step, where it
stops, what is counted, and what is refused: python -m pytest tests/runtime/test_generate.py
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_support import (
    EOS,
    IMAGE,
    TEMPLATE,
    FakeBuffer,
    FakeSession,
    byte_ids,
    image_spec,
    model_spec,
    target_spec,
    write_byte_tokenizer,
)

from qvlm_runtime import Model, PromptError
from qvlm_runtime.backend import TensorInfo
from qvlm_runtime.chat import ChatTemplate
from qvlm_runtime.decoder import Decoder
from qvlm_runtime.errors import SessionError
from qvlm_runtime.generate import StopText, Timings, new_token_limit, tokens
from qvlm_runtime.manifest import Manifest
from qvlm_runtime.prompt import expand_runs
from qvlm_runtime.sample import Sampling
from qvlm_runtime.tokenizer import Tokenizer


class FakeVision(FakeSession):
    """One feature row per image token, all equal to the mean of the image's pixels."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.inputs = {"pixel_values": TensorInfo("float32", (1, 3, None, None))}
        self.outputs = {"image_features": TensorInfo("float32", (None, 12))}

    def binding(self) -> Any:
        return FakeVisionBinding(self)

    def close(self) -> None:
        self.calls.clear()


class FakeVisionBinding:
    def __init__(self, session: FakeVision) -> None:
        self.session = session

    def host(self, name: str, array: np.ndarray) -> None:
        self.pixels = array

    def place(self, name: str, buffer: FakeBuffer, start: int, shape: tuple[int, ...]) -> None:
        self.features = buffer.array[start : start + shape[0] * shape[1]]

    def run(self) -> None:
        self.session.calls.append(self.pixels.shape)
        self.features[:] = self.pixels.mean()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_byte_tokenizer(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def fake_model(texts: Path, answer: str, **changes: Any) -> Model:
    spec = model_spec(**changes)
    target = target_spec("scatter")
    session: Any = FakeSession(byte_ids(answer), spec)
    vision: Any = FakeVision()
    manifest = Manifest("0", spec, image_spec(), {"ort": target}, {}, {})
    return Model(
        manifest,
        "ort",
        Tokenizer(texts / "tokenizer.json"),
        ChatTemplate(texts / "chat_template.jinja", spec.template_tokens),
        vision,
        Decoder(session, spec, target),
    )


def runs_of(model: Model) -> list[dict[str, np.ndarray]]:
    session: Any = model.decoder.session
    runs: list[dict[str, np.ndarray]] = session.runs
    return runs


def test_the_answer_is_the_engine_s_and_ends_at_the_end_token(texts: Path) -> None:
    model = fake_model(texts, "It is oặn.")
    done = model.generate("Q?")
    assert done.text == "It is oặn." and done.finish == "stop"
    assert done.token_ids == (*byte_ids("It is oặn."), EOS)
    assert done.timings.prompt_tokens == len("Q?") + 2
    assert done.timings.decode_steps == len(done.token_ids) - 1
    assert len(runs_of(model)) == len(done.token_ids), "the end token is not fed back"


def test_what_the_graph_is_fed_at_every_step(texts: Path) -> None:
    model = fake_model(texts, "abc")
    model.generate("Q", [np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])
    prefill, *decode = runs_of(model)
    assert prefill["input_ids"].tolist() == [[1, *[IMAGE] * 6, *byte_ids("Q>")]]
    assert prefill["image_index"].tolist() == [[-1, 0, 1, 2, 3, 4, 5, -1, -1]]
    assert prefill["position_ids"].tolist() == [list(range(9))]
    assert prefill["image_features"][:, 0].tolist() == [-1.0] * 3 + [1.0] * 3
    assert (prefill["write_index"], prefill["kv_len"]) == ([0], [9])
    for step, (run, token) in enumerate(zip(decode, byte_ids("abc"), strict=True)):
        assert run["input_ids"].tolist() == [[token]] and run["image_index"].tolist() == [[-1]]
        assert run["position_ids"].tolist() == [[9 + step]]
        assert (run["write_index"], run["kv_len"]) == ([9 + step], [10 + step])
    assert model.vision.calls == [(1, 3, 6, 6)] * 2, "one image at a time"  # type: ignore[attr-defined]


def test_a_prompt_without_images_feeds_one_row_and_runs_no_vision(texts: Path) -> None:
    model = fake_model(texts, "ab")
    done = model.generate("Q")
    assert runs_of(model)[0]["image_features"].shape == (1, 12)
    assert model.vision.calls == [] and done.timings.images == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("limit", range(1, 7))
def test_max_new_tokens_counts_tokens(texts: Path, limit: int) -> None:
    done = fake_model(texts, "abcd").generate("Q", max_new_tokens=limit)
    assert done.token_ids == (*byte_ids("abcd"), EOS)[:limit]
    assert done.finish == ("length" if limit < 5 else "stop")
    assert done.text == "abcd"[:limit]


def test_a_stop_string_across_tokens_ends_the_text_before_it(texts: Path) -> None:
    model = fake_model(texts, "one two, 3 fŵ.")
    for stop, text in (
        (["two"], "one "),
        (["3 f", "two,"], "one "),
        (["ŵ"], "one two, 3 f"),
        (["."], "one two, 3 fŵ"),
        (["o"], ""),
        (["absent", "two!"], "one two, 3 fŵ."),
        ([" two, 3 fŵ.!"], "one two, 3 fŵ."),
    ):
        done = model.generate("Q", stop=stop)
        assert done.text == text
        assert done.finish == ("stop_string" if text != "one two, 3 fŵ." else "stop")


def test_no_token_is_computed_behind_a_stop_string(texts: Path) -> None:
    model = fake_model(texts, "abcdefgh")
    assert model.generate("Q", stop=["cd"]).token_ids == tuple(byte_ids("abcd"))
    assert len(runs_of(model)) == 4


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_stop_text_equals_a_search_in_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    stream, given_out, seen = StopText(stops), "", ""
    for piece in pieces:
        seen += piece
        given_out += stream.push(piece)
        assert seen.startswith(given_out)
        if stream.stopped:
            break
    else:
        given_out += stream.flush()
    places = [seen.find(stop) for stop in stops if stop in seen]
    assert stream.stopped == bool(places)
    assert given_out == (seen[: min(places)] if places else seen)


def test_stream_pieces_joined_are_the_generated_text(texts: Path) -> None:
    model = fake_model(texts, "Grüß ₤ok.")
    stream = model.stream("Q", stop=["k."])
    with pytest.raises(PromptError, match="not finished"):
        _ = stream.generation
    pieces = list(stream)
    assert pieces == ["G", "r", "ü", "ß", " ", "₤", "o"]
    assert "".join(pieces) == stream.generation.text
    assert list(stream) == []


def test_a_stream_that_is_not_read_runs_nothing(texts: Path) -> None:
    model = fake_model(texts, "abc")
    stream = model.stream("Q")
    assert runs_of(model) == []
    next(stream)
    assert len(runs_of(model)) == 1


def test_a_long_answer_ends_with_the_cache_when_no_limit_is_given(texts: Path) -> None:
    answer = "".join(map(chr, range(65, 120)))
    done = fake_model(texts, answer, max_context=20).generate("Q")
    assert done.finish == "length" and done.timings.prompt_tokens == 3
    assert len(done.token_ids) == 17


def test_a_prompt_that_does_not_fit_says_both_numbers(texts: Path) -> None:
    model = fake_model(texts, "abc", max_context=20)
    assert model.generate("x" * 15, max_new_tokens=3).finish == "length"
    with pytest.raises(PromptError, match=r"17 prompt tokens \+ max_new_tokens 4 exceed .* 20 row"):
        model.stream("x" * 15, max_new_tokens=4)
    with pytest.raises(PromptError, match=r"20 tokens and the cache 20 rows"):
        model.stream("x" * 18)
    with pytest.raises(PromptError, match="at least 1"):
        model.stream("x", max_new_tokens=0)
    assert new_token_limit(3, None, 1000) == 256


def test_too_many_images_are_refused_before_one_is_read(texts: Path) -> None:
    model = fake_model(texts, "abc", max_context=20)
    with pytest.raises(PromptError, match="302 tokens"):
        model.stream("", ["absent.png"] * 100)


def test_markers_in_the_text_that_have_no_image_are_refused(texts: Path) -> None:
    model = fake_model(texts, "abc")
    with pytest.raises(PromptError, match=r"1 image markers \(<image>\) and 0 images"):
        model.generate("<image> what?")
    with pytest.raises(PromptError, match=r"2 image markers .* and 1 images"):
        model.generate("<image> what?", [np.zeros((2, 2, 3), np.uint8)])


def test_expansion_counts_rows_over_all_images() -> None:
    ids, index = expand_runs([5, IMAGE, 6, IMAGE, IMAGE], IMAGE, [2, 1, 3])
    assert ids == (5, IMAGE, IMAGE, 6, IMAGE, IMAGE, IMAGE, IMAGE)
    assert index == (-1, 0, 1, -1, 2, 3, 4, 5)
    assert expand_runs([5], IMAGE, []) == ((5,), (-1,))


@pytest.mark.parametrize(
    "option", [{"stop": "text"}, {"stop": ["a", ""]}, {"temperature": -1}, {"top_p": 0}]
)
def test_bad_options_are_refused_before_anything_runs(texts: Path, option: dict) -> None:
    model = fake_model(texts, "abc")
    with pytest.raises(PromptError):
        model.stream("Q", ["absent.png"], **option)


def test_the_loop_stops_feeding_when_its_consumer_leaves(texts: Path) -> None:
    model = fake_model(texts, "abcdef")
    state = model.decoder.start(20)
    timings, start = Timings(), np.zeros((1, 1), np.int64)
    loop: Iterator[int] = tokens(
        state, byte_ids(">"), [-1], start, Sampling().chooser(), {EOS}, 9, timings
    )
    assert [next(loop), next(loop)] == byte_ids("ab")
    assert state.length == 2 and timings.decode_steps == 1


def test_a_sequence_that_is_full_says_so(texts: Path) -> None:
    decoder = fake_model(texts, "abc").decoder
    state = decoder.start(3)
    state.step(byte_ids("xy"))
    state.step(byte_ids("z"))
    with pytest.raises(PromptError, match=r"3 \+ 1 tokens do not fit the cache of 3 rows"):
        state.step(byte_ids("w"))
    with pytest.raises(PromptError, match="65 tokens do not fit the cache, at most 64"):
        decoder.start(65)


def test_a_graph_that_breaks_the_contract_is_refused_by_name() -> None:
    spec = model_spec()
    session: Any = FakeSession([], spec)
    del session.inputs["kv_len"]
    session.inputs["attention_mask"] = session.inputs["input_ids"]
    with pytest.raises(SessionError, match=r"absent \['kv_len'\], unknown \['attention_mask'\]"):
        Decoder(session, spec, target_spec("scatter"))


def test_closing_closes_both_graphs(texts: Path) -> None:
    with fake_model(texts, "abc") as model:
        model.generate("Q")
    assert model.decoder.session.closed  # type: ignore[attr-defined]


def test_threads_do_not_share_a_generation(texts: Path) -> None:
    model = fake_model(texts, "abcdefghij")
    answers: list[str] = []
    threads = [
        threading.Thread(
            target=lambda n=n: answers.append(model.generate("Q", max_new_tokens=n).text)
        )
        for n in range(1, 11)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers, key=len) == ["abcdefghij"[:n] for n in range(1, 11)]
