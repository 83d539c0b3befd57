"""Proves that calibration folders are read as documented, and that each bad one is one clear line.

Run: python -m pytest tests/core/test_data.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qvlm.data import DEFAULT_PROMPT, Question, calibration, evaluation, refuse_overlap
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


def test_a_text_may_hold_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    path = folder(tmp_path / "c", '{"prompt": "a\u2028b\u0085c", "answer": "x"}\r')
    (question,) = evaluation(str(path), 9, 0)
    assert question.prompt == "a\u2028b\u0085c"


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
        (
            [{"prompt": "x", "images": "a.png"}],
            r'line 1: unknown key "images". Known: image, prompt',
        ),
        (["[1]"], 'line 1: no text under "prompt"'),
        ([{"image": "0.png"}], 'line 1: no text under "prompt"'),
        ([{"prompt": "a", "answer": "b"}, {"image": 3, "prompt": "a"}], 'line 2: "image" must be'),
        ([{"prompt": "a", "answer": 7}], '"answer" must be text or a list of texts'),
        ([{"prompt": "a", "task": 7}], '"task" must be text'),
        ([{"image": "../x.png", "prompt": "a"}], r"image '../x.png' lies outside"),
        ([{"image": "/etc/passwd", "prompt": "a"}], "lies outside"),
        ([{"image": "9.png", "prompt": "a"}], "image '9.png' not found"),
        ([{"image": "9\0.png", "prompt": "a"}], "not a file's name"),
        (['{"prompt": "\\ud800"}'], "line 1: half of a character"),
        (["[" * 100_000], "line 1: not JSON"),
        (['{"prompt": "a", "n": ' + "9" * 5000 + "}"], "line 1: not JSON"),
        (
            [{"prompt": "a", "answer": "a", "options": ["x"] * 27}],
            "27 options, expected at most 26",
        ),
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
    for samples, seed in ((0, 0), (4, -1)):
        with pytest.raises(
            CalibrationError, match="expected at least 1 sample and no negative seed"
        ):
            evaluation(None, samples, seed)
    with pytest.raises(CalibrationError, match="0 samples, seed 0: expected at least 1 sample"):
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
    with pytest.raises(CalibrationError, match="question 1 has no answer to compare with"):
        evaluation(str(folder(tmp_path / "e", {"prompt": "a", "answer": ""})), 9, 0)
    chosen = folder(tmp_path / "o", {"prompt": "a", "answer": "c", "options": ["x", "y"]})
    with pytest.raises(
        CalibrationError, match="question 1: answer 'c' names none of its 2 options"
    ):
        evaluation(str(chosen), 9, 0)
    assert calibration(str(chosen), 9, 0)[0].answer == "c"  # nothing has to be right there
    with pytest.raises(CalibrationError, match=r"nothing to read, expected samples.jsonl"):
        evaluation(str(folder(tmp_path / "b")), 9, 0)


def test_answers_and_options_may_be_lists(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "c",
        {"prompt": "A?", "answer": ["two", "2"], "options": ["one", "two"]},
        {"prompt": "B?", "answer": ["x"], "options": None},
    )
    first, second = evaluation(str(path), 5, 0)
    assert (first.answer, first.also, first.options) == ("two", ("2",), ("one", "two"))
    assert (second.answer, second.also, second.options) == ("x", (), ())
    assert first.right("B") and first.right("two.") and not first.right("A")
    assert set(first.texts()) == {"two", "2", "(A) one", "(B) two"}
    with pytest.raises(CalibrationError, match="has no answer to compare"):
        Question((), "C?", None).right("x")


@pytest.mark.parametrize("value", [[1], {"a": 1}, ["a", None]])
def test_lists_of_other_things_are_refused(tmp_path: Path, value: object) -> None:
    for key in ("answer", "options"):
        path = folder(tmp_path / key, {"prompt": "A?", key: value})
        with pytest.raises(CalibrationError, match=f'"{key}" must be text or a list of texts'):
            calibration(str(path), 5, 0)


def test_the_shipped_sets_never_overlap() -> None:
    """Not one image of them is the same, whatever is asked about it."""
    known = {_pixels(q) for q in calibration(None, 256, 0)}
    for seed in (0, 1):
        asked = evaluation(None, 120, seed)
        assert not known & {_pixels(q) for q in asked}
        refuse_overlap(calibration(None, 256, 0), asked)


def _pixels(question: Question) -> bytes:
    return question.open_images()[0].tobytes()


def test_the_same_question_in_both_sets_is_refused(tmp_path: Path) -> None:
    """Another file, another format of the same pixels: only pixels and prompt decide."""
    line = {"image": "1.png", "prompt": "A?", "answer": "a"}
    here = folder(tmp_path / "here", line, {"image": "2.png", "prompt": "A?", "answer": "a"})
    there = folder(tmp_path / "there", {**line, "image": "1.bmp"}, images=0)
    Image.new("RGB", (8, 6), (1, 0, 0)).save(there / "1.bmp")
    seen, asked = calibration(str(here), 9, 0), evaluation(str(there), 9, 0)
    with pytest.raises(CalibrationError, match=r"'A\?' \(.*1.bmp\): is in the calibration set too"):
        refuse_overlap(seen, asked)
    refuse_overlap(seen[1:], asked)
    other = folder(tmp_path / "other", {**line, "prompt": "B?"})
    refuse_overlap(seen, evaluation(str(other), 9, 0))
