"""Proves qvlm-run: output forms, one-line errors, exit codes:
python -m pytest tests/runtime/test_run_command.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from runtime_support import write_folder

import qvlm_runtime
from qvlm_runtime import cli, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("command")
    write_folder(path)
    Image.new("RGB", (9, 7), (200, 10, 60)).save(path / "one.png")
    Image.new("RGB", (5, 8), (20, 110, 60)).save(path / "two.png")
    return path


def expected(folder: Path, **options: object) -> str:
    with load(folder, **{k: v for k, v in options.items() if k == "target"}) as model:
        return model.generate("What?", [folder / "one.png", folder / "two.png"],
                              max_new_tokens=12).text  # fmt: skip


def arguments(folder: Path, *extra: str) -> list[str]:
    images = ["--image", str(folder / "one.png"), "--image", str(folder / "two.png")]
    return [str(folder), *images, "--max-new-tokens", "12", *extra, "What?"]


@pytest.mark.parametrize("extra", [[], ["--stream"], ["--target", "rtx"], ["--no-verify"]])
def test_the_text_is_printed(
    folder: Path, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(folder, *extra)) == 0
    out, err = capsys.readouterr()
    assert out == expected(folder) + "\n" and err == ""


def test_json_is_one_object_as_the_last_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(folder, "--json")) == 0
    alone = json.loads(capsys.readouterr().out)
    assert cli.main(arguments(folder, "--json", "--stream", "--exact", "--threads", "1")) == 0
    streamed = json.loads(capsys.readouterr().out.splitlines()[-1])
    for answer in (alone, streamed):
        assert answer["text"] == expected(folder) and answer["finish"] == "length"
        assert len(answer["token_ids"]) == 12
        assert answer["timings"]["images"] == 2 and answer["timings"]["decode_steps"] == 11


def test_sampling_options_reach_the_sampler(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*extra: str) -> list[int]:
        assert cli.main(arguments(folder, "--json", *extra)) == 0
        ids: list[int] = json.loads(capsys.readouterr().out)["token_ids"]
        return ids

    greedy = run()
    hot = ["--temperature", "3"]
    assert run(*hot, "--seed", "1") == run(*hot, "--seed", "1") != greedy
    assert run(*hot, "--seed", "2") != run(*hot, "--seed", "1")
    assert run(*hot, "--top-k", "1") == greedy == run(*hot, "--top-p", "1e-9")
    assert run(*hot, "--seed", "1", "--min-p", "1") == greedy
    assert run("--prefill-chunk", "2") == greedy
    assert run("--repetition-penalty", "9") != greedy != run("--presence-penalty", "9")
    assert run("--stop", expected(folder)[:1]) == greedy[: len(expected(folder)[:1].encode())]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["nowhere", "What?"], "manifest.json: not found"),
        (["OUT", "--target", "jetpack6", "What?"], "ort, rtx"),
        (["OUT", "--image", "absent.png", "What?"], "absent.png: no such file"),
        (["OUT", "--image", "OUT/tokenizer.json", "What?"], "not an image"),
        (["OUT", "x" * 200], "202 tokens and the cache 64 rows"),
        (["OUT", "--max-new-tokens", "64", "What?"], "exceed the cache of 64 rows"),
        (["OUT", "--temperature", "-1", "What?"], "temperature: got -1.0"),
        (["OUT", "--stop", "", "What?"], "non-empty"),
        (["OUT", "see <image>"], "1 image markers"),
        (["OUT", "--min-p", "2", "What?"], "min_p: got 2.0"),
        (["OUT", "--timeout", "0", "What?"], "timeout: got 0.0"),
        (["OUT", "--prefill-chunk", "0", "What?"], "prefill_chunk: got 0"),
        (["OUT", "--json-schema", "absent.json", "What?"], "absent.json: not readable"),
        (["OUT", "--json-schema", "OUT/one.png", "What?"], "one.png: not readable"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_exit_1(
    folder: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([part.replace("OUT", str(folder)) for part in change]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("qvlm-run: ") and message in err


@pytest.mark.parametrize("argv", [[], ["out"], ["out", "p", "--top-k", "x"], ["out", "p", "--no"]])
def test_usage_is_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: qvlm-run" in capsys.readouterr().err


def test_a_schema_file_makes_the_answer_valid(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llguidance", reason="the extra [json] is not installed")
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"type": "boolean"}, "maxItems": 2}')
    argv = [str(folder), "--json-schema", str(schema), "--max-new-tokens", "30", "What?"]
    assert cli.main(argv) == 0
    value = json.loads(capsys.readouterr().out)
    assert isinstance(value, list) and len(value) <= 2
    schema.write_text("{")
    assert cli.main(argv) == 1
    assert "json_schema: not a JSON schema" in capsys.readouterr().err


def test_an_interrupt_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", interrupted)
    assert cli.main(arguments(folder)) == 1
    assert capsys.readouterr().err == "qvlm-run: interrupted\n"


def run_as_process(folder: Path, *extra: str) -> "subprocess.Popen[bytes]":
    root = str(Path(qvlm_runtime.__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-m", "qvlm_runtime.cli", *arguments(folder, *extra)],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_reader_that_leaves_is_no_traceback(folder: Path) -> None:
    process = run_as_process(folder, "--stream")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1 and errors == b""
