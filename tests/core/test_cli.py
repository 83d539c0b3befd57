"""Proves the command line: plan, quantize, evaluate and show end to end, one JSON object as the last line, one line and
exit 1 for each mistake, 2 for wrong usage.

Run: python -m pytest tests/core/test_cli.py
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_source import picture

from qvlm import cli
from qvlm.commands.command import table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    lines = []
    for i in range(3):
        picture(i).save(path / f"{i}.png")
        lines.append({"image": f"{i}.png", "prompt": "What?", "answer": "cat", "task": "name"})
    (path / "samples.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return path


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    lines = capsys.readouterr().out.strip().splitlines()
    data = json.loads(lines[-1])
    assert len(lines) == 1 and isinstance(data, dict)
    return data


def test_quantize_evaluate_show(
    tiny_source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    quantize = ["quantize", str(tiny_source), out, "--calib", str(folder), "--samples", "2"]
    assert cli.main([*quantize, "--recipe", "w8a8", "--json"]) == 0
    written = last_json(capsys)
    assert written["output"] == out and written["recipe"]["samples"] == 2
    assert (
        cli.main(["evaluate", out, "--eval", str(folder), "--against", str(tiny_source), "--json"])
        == 0
    )
    measured = last_json(capsys)
    assert measured["samples"] == 3
    assert set(measured["model"]["per_task"]) == {"name"}
    assert measured["divergence"]["kl"] >= 0 and measured["sizes"] == written["sizes"]
    assert cli.main(["show", out, "--json"]) == 0
    shown = last_json(capsys)
    assert len(shown["linears"]) == 28 and shown["method"]["name"] == "rtn"
    assert cli.main(["show", out]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["text", "model.language_model.layers.1.mlp.down_proj", "w8a8"] in [x[:3] for x in lines]


def test_a_dry_run_writes_nothing(
    tiny_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(tiny_source), str(tmp_path / "out"), "--dry-run"]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "14 w4a16" in text and "peak memory" in text
    assert cli.main([*command, "--json"]) == 0
    planned = last_json(capsys)
    assert [row["component"] for row in planned["components"]] == [
        "vision",
        "projector",
        "text",
        "head",
    ]
    assert not list(tmp_path.iterdir())


def mistakes(source: Path, folder: Path, out: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments and what the one line says."""
    empty = out.parent / "empty"
    empty.mkdir()
    corrupt = Path(shutil.copytree(folder, out.parent / "corrupt"))
    (corrupt / "1.png").write_bytes(b"no image")
    other = out.parent / "recipe.json"
    other.write_text('{"schema": 1, "rules": [{"pattern": "txt.*", "format": "w8a8"}]}')
    quantize = ["quantize", str(source), str(out)]
    return {
        "source": (["quantize", str(empty), str(out)], "CheckpointError: "),
        "recipe": ([*quantize, "--recipe", "w9"], "RecipeError: recipe 'w9'"),
        "method": ([*quantize, "--method", "x"], "RecipeError: method 'x' is unknown"),
        "empty folder": ([*quantize, "--calib", str(empty)], "CalibrationError: "),
        "corrupt image": ([*quantize, "--calib", str(corrupt)], "1.png: not a readable image"),
        "nothing matches": (
            [*quantize, "--recipe", str(other)],
            "no linear or embedding matches 'txt.*'",
        ),
        "no name": (["quantize", str(source), "/"], "CheckpointError: /"),
        "no checkpoint": (["show", str(empty)], "config.json: not found"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "source",
        "recipe",
        "method",
        "empty folder",
        "corrupt image",
        "nothing matches",
        "no name",
        "no checkpoint",
    ],
)
def test_a_mistake_is_one_line_and_exit_one(
    tiny_source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "out"
    arguments, message = mistakes(tiny_source, folder, out)[name]
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and not out.exists() and not out.with_name("out.partial").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "interrupted. Finished work is kept; continue with --resume."),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
    ],
)
def test_interrupt_and_full_disk_are_one_line(
    tiny_source: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    message: str,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("qvlm.quantize.write_goldens", fail)
    arguments = ["quantize", str(tiny_source), str(tmp_path / "out"), "--calib", str(folder)]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"qvlm: {message}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["fly"], ["quantize", "a"], ["show", "a", "--what"]])
def test_wrong_usage_is_exit_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: qvlm" in capsys.readouterr().err


def test_a_plain_image_folder_calibrates(
    tiny_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (20, 20), "red").save(images / "a.png")
    arguments = ["quantize", str(tiny_source), str(tmp_path / "out"), "--calib", str(images)]
    assert cli.main([*arguments, "--recipe", "w8a8"]) == 0
    assert "written:" in capsys.readouterr().out


def test_a_pattern_that_matches_nothing_is_noted(
    tiny_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.json"
    rules = [{"pattern": p, "format": "w8a8"} for p in ("txt.*", "text.*", "text.*.mlp.*")]
    recipe.write_text(json.dumps({"schema": 1, "rules": rules}))
    command = ["quantize", str(tiny_source), str(tmp_path / "out"), "--recipe", str(recipe)]
    assert cli.main([*command, "--dry-run", "--json"]) == 0
    captured = capsys.readouterr()
    # A rule behind a wider one matches: it is only never reached.
    assert captured.err == "note: no linear or embedding matches the recipe's 'txt.*'\n"
    assert json.loads(captured.out)["unmatched"] == ["txt.*"]


def test_an_output_that_exists_is_refused_before_a_budget_is_measured(
    tiny_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    command = ["quantize", str(tiny_source), str(tmp_path / "out"), "--max-bits-per-weight", "8"]
    assert cli.main(command) == 1
    assert "out: exists" in capsys.readouterr().err
    assert not (tmp_path / "out.sensitivity.json").exists()


def test_numbers_are_right_aligned() -> None:
    text = table([("a", 1, 2.0), ("bb", 10, 0.123456)], ("n", "count", "x"))
    assert text.splitlines() == ["n   count       x", "a       1       2", "bb     10  0.1235"]


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["quantize", "demo", "out"], "Finished work is kept; continue with --resume."),
        (["sensitivity", "demo", "--output", "s.json"], "Finished rows are in s.json; the same command continues."),
        (["compare", "demo", "--results", "r.json"], "Finished rows are in r.json; the same command continues."),
        (["compare", "demo"], "Nothing is kept without --results FILE."),
        (["ablate", "demo"], "Nothing is kept without --results FILE."),
        (["sensitivity", "demo", "--output", "none.json"], "No row was finished."),
        (["compare", "demo", "--results", "none.json"], "No row was finished."),
        (["evaluate", "demo"], "Nothing is kept."),
    ],
)  # fmt: skip
def test_an_interrupt_says_what_is_left(
    words: list[str],
    left: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("s.json", "r.json"):
        Path(name).touch()

    def interrupted(arguments: object) -> None:
        raise KeyboardInterrupt

    command = replace(cli.COMMANDS[words[0]], run=interrupted)
    monkeypatch.setitem(cli.COMMANDS, words[0], command)
    assert cli.main(words) == 1
    assert capsys.readouterr().err == f"qvlm: interrupted. {left}\n"
