"""Proves the ScienceQA converter on a hand-made problems.json: what is written is what the evaluator reads and scores.

Run: python -m pytest tests/core/test_scienceqa.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvlm.cli import main
from qvlm.data import evaluation
from qvlm.errors import CalibrationError
from qvlm.scienceqa import Converted, convert


def problem(**changes: Any) -> dict[str, Any]:
    """As problems.json has it (the fields that are read, and some that are not)."""
    return {
        "question": "Which of these is a metal?",
        "choices": ["wood", "iron"],
        "answer": 1,
        "hint": "Look at the picture.",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade4",
        "subject": "natural science",
        "lecture": "",
        "split": "test",
        **changes,
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    problems = {
        "7": problem(),
        "12": problem(hint="", answer=0, subject="social science"),
        "13": problem(image=None),
        "14": problem(split="train"),
    }
    for where in ("images/test/7", "images/12"):
        (tmp_path / where).mkdir(parents=True)
        Image.new("RGB", (9, 7), "red").save(tmp_path / where / "image.png")
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    return tmp_path


def test_converted_questions_are_read_and_scored(root: Path) -> None:
    out = root / "out"
    found = convert(root / "problems.json", root / "images", out, "test")
    assert found == Converted(questions=2, without_image=1)
    first, second = evaluation(str(out), 10, 0)
    assert first.prompt == (
        "Context: Look at the picture.\nWhich of these is a metal?\nA. wood\nB. iron\n"
        "Answer with the letter of the right option."
    )
    assert (first.answer, first.options, first.task) == ("B", ("wood", "iron"), "natural science")
    assert second.prompt.startswith("Which") and second.task == "social science"
    assert [q.open_images()[0].size for q in (first, second)] == [(9, 7), (9, 7)]
    assert first.right("B. iron") and first.right("iron") and not first.right("A")
    assert second.right("(A)") and not second.right("B")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 2}, "question 7: answer 2 among 2 choices"),
        ({"answer": -1}, "answer -1 among 2"),
        ({"choices": ["x"] * 27}, "27 choices, expected at most 26"),
        ({"choices": "iron"}, "question 7: no list under 'choices'"),
        ({"question": None}, "no str under 'question'"),
        ({"image": "other.png"}, "other.png not found"),
        ({"image": "../../../problems.json"}, "not found"),
        ({"split": "val"}, "no question with an image in split 'test'"),
    ],
)
def test_a_bad_problem_is_named_and_leaves_nothing(
    root: Path, changes: dict[str, Any], message: str
) -> None:
    (root / "problems.json").write_text(json.dumps({"7": problem(**changes)}))
    with pytest.raises(CalibrationError, match=message) as caught:
        convert(root / "problems.json", root / "images", root / "out", "test")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in root.iterdir()) == ["images", "problems.json"]


def test_the_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = root / "out"
    command = ["convert-eval", "scienceqa", str(root / "problems.json"), str(out)]
    command += ["--images", str(root / "images")]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"output": str(out), "questions": 2, "without_image": 1}
    assert main(command) == 1
    assert "exists. Give another folder" in capsys.readouterr().err
    mine = root / "new.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    command[3] = str(root / "new")
    assert main(command) == 1
    assert "new.partial: exists" in capsys.readouterr().err and mine.read_text() == "mine"
