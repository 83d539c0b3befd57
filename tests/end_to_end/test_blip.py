"""Proves that an exported BLIP-2 folder answers as transformers does, from a picture and a question on, through the
command lines: the prompt's form, the picture's rows in front of the first token, learned positions, a question without
a picture; and that two pictures are refused.

Run: python -m pytest tests/end_to_end/test_blip.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_blip import IMAGE_TOKEN, picture, tiny_questions, write_tiny_source

from qvlm.capture import build_sample
from qvlm.generate import stop_tokens
from qvlm.source import Loaded, load, open_source
from qvlm_export.cli import main as export
from qvlm_runtime import PromptError
from qvlm_runtime import load as load_folder
from qvlm_runtime.cli import main as run

TOKENS = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_source(tmp_path_factory.mktemp("blip") / "source")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions of a picture each, and one without."""
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for number, question in enumerate(tiny_questions(5)):
        name = f"{number}.png"
        for image in question.open_images():
            image.save(folder / name)
        given = {"image": name} if question.images else {}
        lines.append({**given, "prompt": question.prompt, "answer": question.answer or "yes"})
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def floats(source: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the float model."""
    out = tmp_path_factory.mktemp("float") / "out"
    arguments = [str(source), str(out), "--recipe", "float", "--calib", str(calibration)]
    assert export([*arguments, "--samples", "2", "--target", "ort"]) == 0
    return out


def test_the_runtime_answers_as_transformers(source: Path, floats: Path) -> None:
    loaded: Loaded = load(open_source(str(source)))
    model: Any = loaded.model
    with load_folder(floats) as opened:
        for question in tiny_questions(4):
            images = question.open_images()
            sample = build_sample(loaded.processor, images, question.prompt, "", IMAGE_TOKEN)
            inputs = {"input_ids": sample.input_ids, "pixel_values": sample.pixel_values}
            answer = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0]
            expected = answer[sample.input_ids.shape[1] :].tolist()
            stop = stop_tokens(model)  # transformers keeps one and fills up behind it
            end = next((i + 1 for i, token in enumerate(expected) if token in stop), TOKENS)
            found = opened.generate(question.prompt, images, max_new_tokens=TOKENS)
            assert list(found.token_ids) == expected[:end]


def test_a_question_without_a_picture_is_answered(source: Path, floats: Path) -> None:
    loaded = load(open_source(str(source)))
    model: Any = loaded.model
    sample = build_sample(loaded.processor, [], "What is it?", "", IMAGE_TOKEN)
    answer = model.language_model.generate(
        input_ids=sample.input_ids, max_new_tokens=8, do_sample=False
    )
    with load_folder(floats) as opened:
        found = list(opened.generate("What is it?", max_new_tokens=8).token_ids)
    assert found == answer[0, sample.input_ids.shape[1] :].tolist()[: len(found)]


def test_two_pictures_are_refused(floats: Path) -> None:
    with load_folder(floats) as opened:
        with pytest.raises(PromptError, match="2 images, this model takes 1"):
            opened.generate("Both?", [picture(0), picture(1)])
        with opened.conversation(max_rows=100) as talk:
            first = talk.ask("What?", [picture(0)], max_new_tokens=3).text
            assert talk.ask("And now?", max_new_tokens=3).timings.cached_tokens > 0
            assert first == opened.generate("What?", [picture(0)], max_new_tokens=3).text


def test_the_commands_take_it(
    source: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """qvlm-export with INT4 and INT8, verify, check of a target, qvlm-run."""
    out, image = tmp_path / "out", str(calibration / "0.png")
    arguments = [str(source), str(out), "--recipe", "w4a16", "--method", "gptq"]
    arguments += ["--calib", str(calibration), "--samples", "2"]
    # The family's template is built in: neither the plan nor the export asks for one.
    assert export([*arguments, "--dry-run"]) == 0 and not out.exists()
    assert export([*arguments, "--target", "ort", "--target", "jetpack6"]) == 0
    assert export(["verify", str(out)]) == 0
    assert export(["check", str(out), "--target", "jetpack6"]) == 0
    assert "Question: " in (out / "chat_template.jinja").read_text()
    capsys.readouterr()
    assert run([str(out), "--image", image, "What is it?", "--max-new-tokens", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    with load_folder(out, backend="ort") as opened:
        assert found["text"] == opened.generate("What is it?", [image], max_new_tokens=6).text
    assert run([str(out), "--image", image, "--image", image, "Both?"]) == 1
    assert "this model takes 1" in capsys.readouterr().err


def test_a_t5_checkpoint_is_refused_in_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((source / "config.json").read_text())
    config["text_config"] = {"model_type": "t5"}
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps(config))
    assert export([str(tmp_path / "t5"), str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "text_config model_type is 't5', expected 'opt'" in line
