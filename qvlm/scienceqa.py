"""ScienceQA's files to a folder that ``--eval`` takes.

problems.json maps a question's number to {"question", "choices", "answer" (index of the right choice), "hint", "image"
(a file name or null), "subject", "split", ...}; the image lies at IMAGES/<split>/<number>/<image>, in some copies at
IMAGES/<number>/<image>. Questions without an image are left out and counted: they ask the language model alone.
The prompt is the hint as context (if any), the question, the choices by letter and a request to answer by letter.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvlm.checkpoint import load_json
from qvlm.data import SAMPLES
from qvlm.errors import CalibrationError
from qvlm.match import MOST_OPTIONS

_REQUEST = "Answer with the letter of the right option."


@dataclass(frozen=True)
class Converted:
    """Questions written, and those of the split left out because they have no image."""

    questions: int
    without_image: int


def convert(problems: Path, images: Path, output: Path, split: str) -> Converted:
    """Write ``output`` (samples.jsonl and images/), which must not exist.

    Raises CalibrationError for a problem that lacks a field or its image, or a split without any; nothing has the
    name ``output`` then.
    """
    if output.exists() or not output.name:
        raise CalibrationError(f"{output}: exists. Give another folder or remove it.")
    partial = output.with_name(output.name + ".partial")
    if partial.exists():
        raise CalibrationError(
            f"{partial}: exists, as an interrupted conversion leaves it. Remove it."
        )
    (partial / "images").mkdir(parents=True)
    lines: list[str] = []
    without = 0
    try:
        for number, problem in load_json(problems).items():
            where = f"{problems}, question {number}"
            if _field(problem, "split", str, where) != split:
                continue
            if problem.get("image") is None:
                without += 1
                continue
            image = _image(images, split, number, _field(problem, "image", str, where), where)
            name = f"images/{Path(number).name}{image.suffix}"
            shutil.copyfile(image, partial / name)
            lines.append(json.dumps({"image": name, **_question(problem, where)}))
        if not lines:
            raise CalibrationError(f"{problems}: no question with an image in split {split!r}")
        (partial / SAMPLES).write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Converted(len(lines), without)


def _question(problem: dict[str, Any], where: str) -> dict[str, Any]:
    choices = _field(problem, "choices", list, where)
    answer = _field(problem, "answer", int, where)
    if not all(isinstance(choice, str) for choice in choices) or not 0 <= answer < len(choices):
        raise CalibrationError(
            f"{where}: answer {answer} among {len(choices)} choices, expected the index of a text"
        )
    if len(choices) > MOST_OPTIONS:
        raise CalibrationError(
            f"{where}: {len(choices)} choices, expected at most {MOST_OPTIONS}: each has a letter"
        )
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    hint = str(problem.get("hint") or "").strip()
    parts = [f"Context: {hint}"] if hint else []
    parts.append(_field(problem, "question", str, where))
    parts += [f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True)]
    return {
        "prompt": "\n".join([*parts, _REQUEST]),
        "answer": letters[answer],
        "task": str(problem.get("subject", "")),
        "options": choices,
    }


def _image(images: Path, split: str, number: str, name: str, where: str) -> Path:
    for folder in (images / split / number, images / number):
        path = folder / name
        if path.resolve().is_relative_to(images.resolve()) and path.is_file():
            return path
    raise CalibrationError(f"{where}: image {images / split / number / name} not found")


def _field(problem: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(problem, dict) or not isinstance(problem.get(key), kind):
        raise CalibrationError(f"{where}: no {kind.__name__} under {key!r}")
    return problem[key]
