"""Proves that qvlm-serve keeps the caches of its clients' conversations: OpenAI's client sees how many tokens were
reused, answers equal those of a server that keeps none, also under load, and however an answer ends its cache holds
the rows that were written or is gone: python -m pytest tests/runtime/test_serve_kept.py
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kept_support import write_chat_folder
from serve_support import (
    Brake,
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

from qvlm_runtime import Model, SessionError, Stream, load
from qvlm_runtime.ort import OrtBinding
from qvlm_runtime.serve import cli
from qvlm_runtime.serve.app import App
from qvlm_runtime.serve.limits import Limits

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_folder(tmp_path_factory.mktemp("served") / "toy")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with load(folder, "rtx", threads=1, verify=False) as opened:
        yield opened


def said(role: str, text: str, *urls: str) -> dict[str, Any]:
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def turn(port: int, talk: list[dict[str, Any]], question: str, *urls: str, **fields: Any) -> Any:
    """Ask as the next turn of ``talk``, which goes on with the answer; the answer's object."""
    talk.append(said("user", question, *urls))
    status, answer, _ = post(port, {"messages": talk, "max_tokens": 8, **fields})
    assert status == 200, answer
    talk.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
    return answer


def cached(answer: Any) -> int:
    found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def counter(port: int, name: str) -> float:
    text = request(port, "GET", "/metrics")[1].decode()
    found = re.search(rf"^qvlm_{name} (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not in the metrics"
    return float(found[1])


QUESTIONS = [("What is it?", (data_url(png(1)),)), ("And its colour?", ()),
             ("Compare.", (data_url(png(2)),)), ("Why?", ())]  # fmt: skip
FORM = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": {
        "type": "object", "properties": {"open": {"type": "boolean"}}, "required": ["open"],
        "additionalProperties": False,
    }},
}  # fmt: skip


# --- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 1.3, "seed": 4, "top_p": 0.9}, {"logprobs": True, "top_logprobs": 2},
     {"response_format": FORM, "max_tokens": 17}],
)  # fmt: skip
def test_a_conversation_is_that_of_a_server_that_keeps_nothing(
    model: Model, fields: dict[str, Any]
) -> None:
    if "response_format" in fields:
        pytest.importorskip("llguidance", reason="the extra [json] is not installed")
    talks: list[list[dict[str, Any]]] = [[], []]
    reused = []
    for talk, count in zip(talks, (1, 0), strict=True):
        with serving(App(model, "toy", Limits(kept_caches=count))) as port:
            answers = [turn(port, talk, text, *urls, **fields) for text, urls in QUESTIONS]
            reused.append([cached(answer) for answer in answers])
            wait_for(lambda port=port: counter(port, "answers_running") == 0)
            prompts = sum(answer["usage"]["prompt_tokens"] for answer in answers)
            assert counter(port, "prompt_tokens_total") == prompts
            assert counter(port, "prompt_tokens_reused_total") == sum(reused[-1])
            assert counter(port, "prompt_tokens_run_total") == prompts - sum(reused[-1])
            assert counter(port, "kept_caches") == count
            assert counter(port, "cache_bytes") == counter(port, "kept_cache_bytes")
            assert counter(port, "cache_bytes_most") == 2 * model.cache_bytes(256)
    assert talks[0] == talks[1]
    assert reused[1] == [0] * 4 and reused[0][0] == 0
    # At least the prompt before: the question, its image and what opens the answer.
    assert all(n >= 1 + 3 + len("What is it?>") for n in reused[0][1:])
    assert model.budget.used == 0


def test_openai_s_client_sees_the_reused_tokens(model: Model) -> None:
    openai = pytest.importorskip("openai", reason="the extra [dev] is not installed")
    with (
        serving(App(model, "toy")) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client,
    ):
        asked: Any = {"model": "toy", "messages": [said("user", "Tell me")], "max_tokens": 9}
        first = client.chat.completions.create(**asked)
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        again = client.chat.completions.create(**asked)
        assert again.choices[0].message.content == first.choices[0].message.content
        assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
        options = {"include_usage": True}
        *_, last = client.chat.completions.create(**asked, stream=True, stream_options=options)
        assert last.usage.prompt_tokens_details.cached_tokens == last.usage.prompt_tokens - 1


def test_without_kept_caches_log_probabilities_are_the_runtime_s_stream_or_not(
    model: Model,
) -> None:
    """To the last bit; with kept rows sums of another shape are rounded in another order."""
    openai = pytest.importorskip("openai", reason="the extra [dev] is not installed")
    with (
        serving(App(model, "toy", Limits(kept_caches=0))) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client,
    ):
        assert_log_probabilities(client, model)


def assert_log_probabilities(client: Any, model: Model) -> None:
    options: Any = {"model": "toy", "messages": [said("user", "What?")], "max_tokens": 6, "logprobs": True,
                    "top_logprobs": 2}  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in client.chat.completions.create(**options, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    expected = model.generate("What?", max_new_tokens=6, logprobs=2).scores
    for entries in (whole, streamed):
        assert [e.logprob for e in entries] == [score.logprob for score in expected]
        assert [[t.logprob for t in e.top_logprobs] for e in entries] == [
            [value for _, value in score.top] for score in expected
        ]


def test_another_image_in_the_same_place_is_run_again(model: Model) -> None:
    with serving(App(model, "toy", Limits(kept_caches=1))) as port:
        seen = []
        for seed in (1, 2, 2, 1):
            answer = turn(port, [], "What?", data_url(png(seed)))
            expected = model.generate([said_here("What?", seed)], max_new_tokens=8).text
            assert answer["choices"][0]["message"]["content"] == expected
            seen.append(cached(answer))
        # <s>, three rows of the image, "What?" and ">", of which the last is always run.
        assert seen == [0, 1, 1 + 3 + 5, 1]


def said_here(text: str, seed: int) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": png(seed)}]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_conversations_at_once_equal_those_alone(model: Model, count: int) -> None:
    """Six clients, three at once; each goes on with its own conversation, some begin alike."""

    def conversation(port: int, n: int) -> tuple[list[dict[str, Any]], int]:
        talk: list[dict[str, Any]] = [said("system", f"{n % 3}" * 12)]
        url = (data_url(png(n)),) if n % 2 else ()
        reused = [cached(turn(port, talk, "What is it?", *url))]
        reused += [cached(turn(port, talk, f"And {i}?", temperature=1.2, seed=i)) for i in range(4)]
        return talk, sum(reused)

    limits = Limits(concurrent=3, queue=9, kept_caches=count)
    app = App(model, "toy", Limits(kept_caches=0))
    with serving(app) as port:
        alone = [conversation(port, n) for n in range(6)]
        assert all(reused == 0 for _, reused in alone)
    app = App(model, "toy", limits)
    with serving(app) as port:
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda n: conversation(port, n), [*range(6), *range(6)]))
        wait_for(lambda: app.gate.running == 0)
        assert only_kept(app) and len(app.kept) == count
    assert [talk for talk, _ in together] == 2 * [talk for talk, _ in alone]
    assert bool(sum(reused for _, reused in together)) == bool(count)
    assert model.budget.used == 0


# --- how an answer ends --------------------------------------------------------------------------

ASKED = "a question " * 3  # with <s> and ">" 35 tokens: five pieces of at most 8


class Watched:
    """A server of one model with an engine that can be held, and the streams that it began."""

    def __init__(self, model: Model, **limits: Any) -> None:
        self.app = App(model, "toy", Limits(prefill_chunk=8, **limits))
        self.streams: list[Stream] = []
        begin = self.app._begin

        def begun(ask: Any) -> Stream:
            self.streams.append(begin(ask))
            return self.streams[-1]

        self.app._begin = begun  # type: ignore[method-assign]

    def assert_one_left(self, port: int, rows: int) -> None:
        """One cache with so many rows, and what is asked next is answered right and from it."""
        wait_for(lambda: self.app.gate.running == 0)
        (context,) = self.app.kept._idle
        assert context.rows == context.state.length == rows
        answer = turn(port, [], ASKED)
        assert cached(answer) == min(rows, 34)
        expected = self.app.model.generate(ASKED, max_new_tokens=8).text
        assert answer["choices"][0]["message"]["content"] == expected
        wait_for(lambda: self.app.gate.running == 0)
        assert self.app.model.budget.used == self.app.kept.nbytes
        assert len(self.app.kept) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("held_at", "rows"), [(2, 16), (5, 35), (6, 36), (9, 39)])
def test_a_client_that_leaves_leaves_the_rows_that_were_written(
    model: Model, stream: bool, held_at: int, rows: int
) -> None:
    """In the second piece of the prompt, in the last, and in tokens: the run that is held is the last."""
    watched = Watched(model)
    with serving(watched.app) as port, Brake() as brake:
        brake.after(held_at)
        connection = raw(port, chat_body(ASKED, max_tokens=100, stream=stream))
        wait_for(lambda: brake.runs == held_at)
        kill(connection)
        wait_for(lambda: watched.streams[0].cancelled)
        brake.off()
        watched.assert_one_left(port, rows)
    assert model.budget.used == 0


@pytest.mark.parametrize(("held_at", "rows"), [(2, 16), (7, 37)])
def test_an_answer_out_of_time_leaves_the_rows_that_were_written(
    model: Model, held_at: int, rows: int
) -> None:
    watched = Watched(model, request_seconds=3.0)
    with serving(watched.app) as port, Brake() as brake:
        brake.after(held_at)
        connection = raw(port, chat_body(ASKED, max_tokens=100))
        wait_for(lambda: bool(watched.streams) and watched.streams[0].cancelled)
        assert brake.runs == held_at
        brake.off()
        assert b" 504 " in connection.recv(1000)
        connection.close()
        watched.assert_one_left(port, rows)
    assert model.budget.used == 0


def test_a_refused_question_takes_no_cache(model: Model) -> None:
    watched = Watched(model)
    with serving(watched.app) as port:
        turn(port, [], ASKED, max_tokens=3)
        for body in (chat_body("x" * 300), chat_body("x", (data_url(b"no image"),))):
            assert post(port, body)[0] == 400
        watched.assert_one_left(port, 37)


@pytest.mark.parametrize("runs", [1, 3])
def test_an_answer_whose_engine_fails_drops_its_cache_and_no_other(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: Any, runs: int
) -> None:
    original, left = OrtBinding.run, [10**6]

    def run(binding: OrtBinding) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise SessionError("the engine failed")
        original(binding)

    monkeypatch.setattr(OrtBinding, "run", run)
    watched = Watched(model)
    with serving(watched.app) as port:
        turn(port, [], ASKED, max_tokens=3)
        turn(port, [], "b" * 40)
        left[0] = runs
        assert post(port, chat_body("b" * 40 + "c" * 30))[0] == 500
        assert "the engine failed" in caplog.text
        watched.assert_one_left(port, 37)
    assert model.budget.used == 0


# --- memory --------------------------------------------------------------------------------------


def test_two_requests_at_once_never_share_a_cache(model: Model) -> None:
    app = App(model, "toy")
    with serving(app) as port, Brake() as brake:
        expected = turn(port, [], ASKED)["choices"][0]["message"]["content"]
        wait_for(lambda: app.gate.running == 0)
        brake.on()
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(turn, port, [], ASKED) for _ in range(2)]
            wait_for(lambda: brake.runs == 8 + 2)
            assert len(app.kept._used) == 2 and len(app.kept) == 0
            brake.off()
            answers = [one.result() for one in both]
        assert {answer["choices"][0]["message"]["content"] for answer in answers} == {expected}
        assert sorted(map(cached, answers)) == [0, 34]


def test_kept_caches_make_room_before_a_request_is_refused(folder: Path) -> None:
    with load(folder, "rtx", verify=False) as probe:
        limit = probe.cache_bytes(100)
    with load(folder, "rtx", verify=False, cache_limit=limit) as model:
        app = App(model, "toy", Limits(kept_caches=5))
        with serving(app) as port, Brake() as brake:
            assert counter(port, "cache_bytes_most") == limit
            for name in "abcdef":  # 30 rows each
                turn(port, [], name * 20)
            wait_for(lambda: app.gate.running == 0)
            assert len(app.kept) == 3 and only_kept(app)
            # While one runs that needs nearly all, there is nothing to drop for another.
            brake.on()
            held = raw(port, chat_body("g" * 60, max_tokens=30))
            wait_for(lambda: len(app.kept._used) == 1)
            assert len(app.kept) == 0
            status, answer, headers = post(port, chat_body("h" * 20))
            assert status == 503 and "retry-after" in headers
            assert "does not fit" in answer["error"]["message"]
            brake.off()
            assert b" 200 OK" in held.recv(1000)
            held.close()
            turn(port, [], "h" * 20)
            wait_for(lambda: app.gate.running == 0)
            assert only_kept(app)
        assert model.budget.used == 0


def test_the_number_of_kept_caches_is_that_of_answers_at_once_unless_it_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parse = cli._parser().parse_args
    assert cli._limits(parse(["OUT"])).kept == 2
    assert cli._limits(parse(["OUT", "--max-concurrent", "7"])).kept == 7
    assert cli._limits(parse(["OUT", "--kept-caches", "0"])).kept == 0
    with pytest.raises(SystemExit):
        parse(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--kept-caches N" in told and "0 keeps none" in told
