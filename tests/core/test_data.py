"""Proves that calibration folders are read as documented, and that each bad one is one clear line.

Run: python -m pytest tests/core/test_data.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qvlm.data import DEFAULT_PROMPT, Question, calibration, evaluation
from qvlm.errors import CalibrationError


def folder(path: Path, *lines: object, images: int = 3) -> Path:
    path.mkdir()
    for i in range(images):
        Image.new("RGB", (8, 6), (i, 0, 0)).save(path / f"{i}.png")
    if lines:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (path / "samples.jsonl").write_text(text + "\n\n", encoding="utf-8")
    return path


def test_lines_become_questions(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "c",
        {"image": "0.png", "prompt": "A?", "answer": "a", "task": "t"},
        {"image": ["1.png", "2.png"], "prompt": "B?"},
        {"prompt": "C?", "answer": ""},
    )
    found = calibration(str(path), 10, 0)
    assert [(q.prompt, q.answer, q.task, len(q.images)) for q in found] == [
        ("A?", "a", "t", 1),
        ("B?", None, "", 2),
        ("C?", "", "", 0),
    ]
    assert found[0].open_images()[0].size == (8, 6)


def test_a_plain_folder_asks_the_default_prompt(tmp_path: Path) -> None:
    path = folder(tmp_path / "c")
    (path / "notes.txt").write_text("not an image")
    found = calibration(str(path), 10, 0)
    assert found == [Question((path / f"{i}.png",), DEFAULT_PROMPT, None) for i in range(3)]


def test_a_draw_is_fixed_by_its_seed_and_keeps_order(tmp_path: Path) -> None:
    path = folder(tmp_path / "c", *({"prompt": str(i), "answer": "x"} for i in range(40)))
    draws = [[int(q.prompt) for q in calibration(str(path), 10, seed)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert all(draw == sorted(set(draw)) and len(draw) == 10 for draw in draws)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], r"samples.jsonl, line 1: not JSON"),
        (["[1]"], 'line 1: no text under "prompt"'),
        ([{"image": "0.png"}], 'line 1: no text under "prompt"'),
        ([{"prompt": "a", "answer": "b"}, {"image": 3, "prompt": "a"}], 'line 2: "image" must be'),
        ([{"prompt": "a", "answer": 7}], '"answer" and "task" must be text'),
        ([{"image": "../x.png", "prompt": "a"}], r"image '../x.png' lies outside"),
        ([{"image": "/etc/passwd", "prompt": "a"}], "lies outside"),
        ([{"image": "9.png", "prompt": "a"}], "image '9.png' not found"),
        (["", " "], "empty, expected one JSON object per line"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, lines: list[object], message: str) -> None:
    path = folder(tmp_path / "c", *lines)
    with pytest.raises(CalibrationError, match=message) as caught:
        calibration(str(path), 4, 0)
    assert "\n" not in str(caught.value)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "c", {"image": "link.png", "prompt": "a"})
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    (path / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(CalibrationError, match="lies outside"):
        calibration(str(path), 4, 0)


def test_missing_empty_and_unreadable_folders(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="not a folder"):
        calibration(str(tmp_path / "none"), 4, 0)
    with pytest.raises(
        CalibrationError, match=r"nothing to read, expected samples.jsonl or images"
    ):
        calibration(str(folder(tmp_path / "empty", images=0)), 4, 0)
    bad = folder(tmp_path / "bytes")
    (bad / "samples.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="not readable as UTF-8"):
        calibration(str(bad), 4, 0)
    with pytest.raises(CalibrationError, match="0 samples, expected at least 1"):
        calibration(str(folder(tmp_path / "none-wanted")), 0, 0)


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_a_corrupt_image_is_named(tmp_path: Path, content: bytes | str) -> None:
    path = folder(tmp_path / "c")
    whole = (path / "1.png").read_bytes()
    (path / "1.png").write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(
        CalibrationError, match=r"1.png: not a readable image .* Replace or remove it"
    ):
        calibration(str(path), 3, 0)


def test_evaluation_needs_answers_and_lines(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="question 2 has no answer to compare with"):
        evaluation(
            str(folder(tmp_path / "a", {"prompt": "a", "answer": "b"}, {"prompt": "c"})), 9, 0
        )
    with pytest.raises(CalibrationError, match=r"nothing to read, expected samples.jsonl"):
        evaluation(str(folder(tmp_path / "b")), 9, 0)
