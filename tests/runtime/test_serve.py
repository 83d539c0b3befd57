"""Proves qvlm-serve as a client sees it: OpenAI's own client works unchanged, answers equal the runtime's, every
field has its effect or is refused by name, access is checked: python -m pytest tests/runtime/test_serve.py
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runtime_support import write_folder
from serve_support import chat_body, data_url, png, post, request, serving, wait_for

import qvlm_runtime
from qvlm_runtime import Model, load
from qvlm_runtime.serve import cli
from qvlm_runtime.serve.access import Access, host_name
from qvlm_runtime.serve.app import App
from qvlm_runtime.serve.limits import Limits

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "toy"
    write_folder(path, max_context=256)
    (path / "pictures").mkdir()
    (path / "pictures" / "a b.png").write_bytes(png(3))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with load(folder, "rtx", threads=1, verify=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def port(folder: Path, model: Model) -> Iterator[int]:
    with serving(App(model, "toy", image_root=folder / "pictures")) as number:
        yield number


@pytest.fixture
def client(port: int) -> Iterator[Any]:
    openai = pytest.importorskip("openai", reason="the extra [dev] is not installed")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as opened:
        yield opened


def messages(text: str = "What?", *urls: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = chat_body(text, urls)["messages"]
    return found


# --- OpenAI's client -----------------------------------------------------------------------------


def test_openai_s_client_gets_the_runtime_s_answer(client: Any, model: Model) -> None:
    done = client.chat.completions.create(
        model="toy", messages=messages("What?", data_url(png())), max_tokens=12
    )
    expected = model.generate("What?", [png()], max_new_tokens=12)
    choice = done.choices[0]
    assert choice.message.role == "assistant" and choice.message.content == expected.text
    assert choice.finish_reason == "length" and done.object == "chat.completion"
    assert done.usage.completion_tokens == 12
    assert done.usage.prompt_tokens == expected.timings.prompt_tokens
    assert [card.id for card in client.models.list()] == ["toy"]


def test_a_stream_of_openai_s_client_joined_is_the_answer(client: Any, model: Model) -> None:
    chunks = list(
        client.chat.completions.create(
            model="toy", messages=messages("Tell"), max_tokens=20, stream=True,
            stream_options={"include_usage": True}, temperature=1.2, seed=4,
        )
    )  # fmt: skip
    expected = model.generate("Tell", max_new_tokens=20, temperature=1.2, seed=4)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == expected.text and len([text for text in texts if text]) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
    assert chunks[-1].usage.completion_tokens == 20 and chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1


def test_openai_s_async_client_leaves_a_stream_early(port: int, model: Model) -> None:
    openai = pytest.importorskip("openai", reason="the extra [dev] is not installed")
    import asyncio

    async def ask() -> str:
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none"
        ) as client:
            stream = await client.chat.completions.create(
                model="toy", messages=messages(), max_tokens=50, stream=True
            )
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    text: str = chunk.choices[0].delta.content
                    await stream.close()
                    return text
        raise AssertionError("no text")

    assert model.generate("What?", max_new_tokens=50).text.startswith(asyncio.run(ask()))


def test_a_schema_through_openai_s_client(client: Any) -> None:
    pytest.importorskip("llguidance", reason="the extra [json] is not installed")
    schema = {
        "type": "object",
        "properties": {"open": {"type": "boolean"}},
        "required": ["open"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "door", "schema": schema}}
    done = client.chat.completions.create(
        model="toy", messages=messages(), max_tokens=40, response_format=form
    )
    assert type(json.loads(done.choices[0].message.content)["open"]) is bool
    assert done.choices[0].finish_reason == "stop"


def test_errors_are_openai_s_errors(client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="max_tokens: got 99999"):
        client.chat.completions.create(model="toy", messages=messages(), max_tokens=99999)
    with pytest.raises(openai.NotFoundError, match="this server has 'toy'"):
        client.chat.completions.create(model="gpt-4o", messages=messages())


# --- fields --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"temperature": 1.5, "seed": 3, "top_p": 0.8}, {"temperature": 1.5, "seed": 3, "top_p": 0.8}),
        ({"temperature": 2, "seed": 1, "top_k": 4}, {"temperature": 2.0, "seed": 1, "top_k": 4}),
        ({"temperature": 2, "seed": 1, "min_p": 0.3}, {"temperature": 2.0, "seed": 1, "min_p": 0.3}),
        ({"presence_penalty": 2}, {"presence_penalty": 2.0}),
        ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
        ({"repetition_penalty": 3}, {"repetition_penalty": 3.0}),
        ({"logit_bias": {"70": 100}}, {"logit_bias": {70: 100.0}}),
        ({"max_completion_tokens": 3, "max_tokens": None}, {"max_new_tokens": 3}),
        ({"user": "x", "metadata": {}, "n": 1, "tools": None}, {}),
    ],
)  # fmt: skip
def test_a_field_has_the_effect_of_its_option(
    port: int, model: Model, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    expected = model.generate("What?", **{"max_new_tokens": 8, **options})
    status, answer, _ = post(port, chat_body(**fields))
    assert status == 200 and answer["choices"][0]["message"]["content"] == expected.text


def test_stop_strings_end_the_text(port: int, model: Model) -> None:
    text = model.generate("What?", max_new_tokens=8).text
    for stop in (text[2], [text[2], "absent"]):
        _, answer, _ = post(port, chat_body(stop=stop))
        assert answer["choices"][0]["message"]["content"] == text[:2]
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_conversation_and_a_system_message(port: int, model: Model) -> None:
    talk = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    status, answer, _ = post(port, {"messages": talk, "max_tokens": 8})
    parts: Any = [{**m, "content": m["content"] if isinstance(m["content"], list)
                   else [{"type": "text", "text": m["content"]}]} for m in talk]  # fmt: skip
    expected = model.generate(parts, max_new_tokens=8)
    assert status == 200 and answer["choices"][0]["message"]["content"] == expected.text


@pytest.mark.parametrize("url", ["a b.png", "file:a%20b.png", "FILE"])
def test_a_file_below_the_root_is_an_image(port: int, model: Model, folder: Path, url: str) -> None:
    path = folder / "pictures" / "a b.png"
    _, answer, _ = post(port, chat_body(urls=(url.replace("FILE", path.resolve().as_uri()),)))
    expected = model.generate("What?", [path], max_new_tokens=8)
    assert answer["choices"][0]["message"]["content"] == expected.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 2}, "n: only one"),
        ({"tools": []}, "tools: not supported"),
        ({"colour": 1}, "colour: not supported"),
        ({"messages": []}, "messages: expected"),
        ({"messages": "hello"}, "messages: expected"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].role"),
        ({"messages": [7]}, r"messages\[0\].role"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content: expected"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, r"content\[0\]: expected"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 3}]}]},
         r"content\[0\]: expected"),
        ({"temperature": -1}, "temperature: got -1"),
        ({"temperature": True}, "temperature: expected a number"),
        ({"temperature": 10**400}, "temperature: expected a number"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1.5}, "seed: expected an integer"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"max_tokens": 1000}, "exceed the cache of 256 rows"),
        ({"stop": [1]}, "stop: expected"),
        ({"stop": ["x"] * 17}, "stop: expected"),
        ({"stop": [""]}, "stop: got"),
        ({"logit_bias": {"x": 1}}, "logit_bias: expected token ids"),
        ({"logit_bias": {"9999": 1}}, "logit_bias: token 9999"),
        ({"top_logprobs": 2}, "top_logprobs: expected logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: got 21"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
         "json_schema"),
        ({"stream": "yes"}, "stream: expected true or false"),
        ({"messages": [{"role": "user", "content": "a\ud800b"}]}, "not valid Unicode"),
        ({"messages": [{"role": "user", "content": "see <image>"}]}, "1 image markers"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "302 tokens and the cache 256"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(port: int, fields: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        status, answer, _ = post(port, {**chat_body(), "stream": stream, **fields})
        assert status == 400 and re.search(message, answer["error"]["message"])
        assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"7", b"\xff\xfe", b'{"a": NaN}',
                                  b"[" * 100_000, b"9" * 100_000])  # fmt: skip
def test_a_body_that_is_no_object_is_refused(port: int, body: bytes) -> None:
    status, answer, _ = post(port, body)
    assert status == 400 and answer["error"]["message"].startswith("body: ")


# --- other addresses, access ---------------------------------------------------------------------


def test_health_metrics_and_the_page(port: int) -> None:
    status, body, _ = request(port, "GET", "/health")
    assert status == 200 and json.loads(body) == {"status": "ok", "model": "toy"}
    before = sum_of(port, "generated_tokens_total")
    post(port, chat_body(max_tokens=7))
    # An answer is counted behind its last byte.
    wait_for(lambda: sum_of(port, "generated_tokens_total") == before + 7)
    wait_for(lambda: sum_of(port, "answers_running") == 0)
    assert sum_of(port, "cache_bytes") == sum_of(port, "kept_cache_bytes") > 0
    wait_for(lambda: 'qvlm_requests_total{status="200"}' in metrics(port))
    for path in ("/", "/page.js", "/page.css"):
        status, body, headers = request(port, "GET", path)
        assert status == 200 and body
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert not re.search(rb"https?://", body), "nothing from elsewhere"


def metrics(port: int) -> str:
    return request(port, "GET", "/metrics")[1].decode()


def sum_of(port: int, name: str) -> float:
    found = re.search(rf"^qvlm_{re.escape(name)} (\S+)$", metrics(port), re.MULTILINE)
    assert found, f"{name} is not in the metrics"
    return float(found[1])


def test_unknown_addresses_and_methods(port: int) -> None:
    assert request(port, "GET", "/v1/../etc/passwd")[0] == 404
    assert request(port, "GET", "/page.py")[0] == 404
    status, _, headers = request(port, "GET", "/v1/chat/completions")
    assert status == 405 and headers["allow"] == "POST"
    assert request(port, "POST", "/health", b"{}")[0] == 405


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_web_page_may_send_without_asking_is_refused(port: int, kind: str) -> None:
    status, answer, headers = post(port, chat_body(), {"content-type": kind})
    assert status == 415 and "application/json" in answer["error"]["message"]
    assert not [name for name in headers if name.startswith("access-control")]


def test_a_foreign_host_name_is_refused(port: int) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert request(port, "GET", "/health", headers={"host": host})[0] == 421
    for host in (f"localhost:{port}", f"[::1]:{port}", "127.0.0.1", "LOCALHOST"):
        assert request(port, "GET", "/health", headers={"host": host})[0] == 200
    assert host_name("[::1]:8000") == "::1" and host_name("a.b:80") == "a.b"


def test_the_token_is_asked_for(model: Model) -> None:
    with serving(App(model, "toy", access=Access(token="s3cret-ä"))) as port:
        assert request(port, "GET", "/health")[0] == request(port, "GET", "/")[0] == 200
        for given in ("", "Bearer", "Bearer wrong", "Basic s3cret-ä", "Bearer s3cret"):
            value = given.encode().decode("latin-1")
            status, answer, headers = post(port, chat_body(), {"authorization": value})
            assert status == 401 and headers["www-authenticate"] == "Bearer"
            assert "s3cret" not in answer["error"]["message"]
            assert request(port, "GET", "/metrics", headers={"authorization": value})[0] == 401
            assert request(port, "GET", "/v1/models", headers={"authorization": value})[0] == 401
        right = "Bearer s3cret-ä".encode().decode("latin-1")
        assert post(port, chat_body(), {"authorization": right})[0] == 200


def test_a_smaller_limit_of_tokens_is_also_the_default(model: Model) -> None:
    with serving(App(model, "toy", Limits(new_tokens=5))) as port:
        _, answer, _ = post(port, {"messages": messages()})
        assert answer["usage"]["completion_tokens"] == 5
        assert post(port, chat_body(max_tokens=6))[0] == 400


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_stop(folder: Path, told: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "qvlm_runtime.serve.cli", str(folder), "--port", "0", "--target",
         "rtx", "--threads", "1", "--kept-caches", "3", "--image-root", str(folder / "pictures")],
        env={**os.environ, "PYTHONPATH": str(Path(qvlm_runtime.__file__).parent.parent)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"qvlm-serve: toy at http://127\.0\.0\.1:(\d+)\n", line)
        assert found, line
        line = process.stdout.readline()
        assert re.fullmatch(
            r"qvlm-serve: at most 3 caches of at most 256 rows, together at most 0.1 MB; "
            r"3 kept between requests \(--kept-caches\)\n", line
        ), line  # fmt: skip
        assert post(int(found[1]), chat_body(urls=("a b.png",)))[0] == 200
        process.send_signal(told)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["nowhere"], "manifest.json: not found"),
        (["OUT", "--host", "0.0.0.0"], "without a token"),
        (["OUT", "--host", "192.0.2.7", "--token-file", "TOKEN"], "--host 192.0.2.7 --port 8000"),
        (["OUT", "--backend", "tensorrt"], "no engines for backend tensorrt"),
        (["OUT", "--port", "70000"], "--port 70000"),
        (["OUT", "--token-file", "absent"], "absent: no token"),
        (["OUT", "--image-root", "absent"], "absent: no such folder"),
        (["OUT", "--max-concurrent", "0"], "concurrent: got 0"),
        (["OUT", "--max-request-seconds", "-1"], "request_seconds: got -1.0"),
        (["OUT", "--kept-caches", "-1"], "kept_caches: got -1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_1(
    folder: Path, tmp_path: Path, change: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "token").write_text("x\n")
    argv = [part.replace("OUT", str(folder)).replace("TOKEN", str(tmp_path / "token"))
            for part in change]  # fmt: skip
    assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("qvlm-serve: ") and err.count("\n") == 1 and message in err


def test_without_uvicorn_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main([str(folder)]) == 1
    assert "pip install 'qvlm[serve]'" in capsys.readouterr().err
