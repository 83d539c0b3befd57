"""Calibration and evaluation questions: a folder with samples.jsonl, a plain folder of images, or the shipped set.

samples.jsonl has one JSON object per line:

    image    path relative to the folder, or a list of them; left out for a question without image
    prompt   text
    answer   text, or a list of accepted texts: the first is the reference that teacher forcing feeds
    task     optional text; scores are given for each task too
    options  optional list of texts: a multiple choice, the letters A, B, ... stand for them (see ``match``)

Every path is checked to lie inside the folder and every image is decoded before work begins, so that a bad folder
costs one line and no time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qvlm.errors import CalibrationError
from qvlm.match import MOST_OPTIONS, chosen, matches

SAMPLES = "samples.jsonl"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# What a line of samples.jsonl may hold; other keys are the user's own notes, unless they look like one of these.
KEYS = ("image", "prompt", "answer", "task", "options")
# Asked about each picture of a plain folder; the model answers it itself.
DEFAULT_PROMPT = "Describe this image in detail."


@dataclass(frozen=True)
class Question:
    """images: files or PIL images, in prompt order; answer None means that the model's own greedy answer is used.

    also: further accepted answers; options: the texts of a multiple choice.
    """

    images: tuple[Path | Image.Image, ...]
    prompt: str
    answer: str | None
    task: str = ""
    also: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def open_images(self) -> list[Image.Image]:
        """The images in RGB; CalibrationError naming the file that cannot be decoded."""
        return [_open(image) if isinstance(image, Path) else image for image in self.images]

    def texts(self) -> tuple[str, ...]:
        """Every text that a right answer may consist of; with options a letter, an option's text, or both."""
        options = (f"({chr(ord('A') + i)}) {text}" for i, text in enumerate(self.options))
        return (self.answer or "", *self.also, *options)

    def right(self, text: str) -> bool:
        """True if ``text`` answers the question (see ``match``); CalibrationError without a reference."""
        if self.answer is None:
            raise CalibrationError(f"question {self.prompt!r} has no answer to compare with")
        return matches(text, (self.answer, *self.also), self.options)

    def key(self) -> str:
        """sha256 of the pixels and the prompt: equal for the same question, wherever its files lie."""
        sha = hashlib.sha256(self.prompt.encode())
        for image in self.open_images():
            sha.update(str(image.size).encode() + image.convert("RGB").tobytes())
        return sha.hexdigest()


def calibration(path: str | None, samples: int, seed: int) -> list[Question]:
    """``samples`` questions for calibration, drawn by ``seed``; the shipped set for None or "demo".

    Takes all there are if there are fewer. Raises CalibrationError (folder missing, empty, unreadable, corrupt).
    """
    if path in (None, "demo"):
        import qvlm_calib_data

        try:
            return _shipped(qvlm_calib_data.samples(samples, seed))
        except ValueError as error:
            raise CalibrationError(
                f"shipped samples: {samples} wanted ({error}). Give fewer, or a folder."
            ) from error
    return _drawn(_folder(Path(str(path)), plain=True), samples, seed)


def evaluation(path: str | None, samples: int, seed: int) -> list[Question]:
    """``samples`` questions with answers; the shipped held-out set for None or "demo". Errors as ``calibration``."""
    if path in (None, "demo"):
        import qvlm_calib_data

        _check_draw(samples, seed)
        return _shipped(qvlm_calib_data.evaluation_samples(samples, seed))
    questions = _folder(Path(str(path)), plain=False)
    for number, question in enumerate(questions, 1):
        if not question.answer:
            raise CalibrationError(
                f'{Path(str(path)) / SAMPLES}: question {number} has no answer to compare with. Add an "answer".'
            )
        accepted, options = (question.answer, *question.also), question.options
        if options and all(chosen(answer, options) is None for answer in accepted):
            raise CalibrationError(
                f"{Path(str(path)) / SAMPLES}: question {number}: answer {question.answer!r} names none of its "
                f"{len(options)} options, so that nothing could be right. Give an option's letter or its text."
            )
    return _drawn(questions, samples, seed)


def refuse_overlap(calibration: Iterable[Question], evaluation: Iterable[Question]) -> None:
    """CalibrationError if a question (same pixels, same prompt) is in both: its score would be of seen data."""
    seen = {question.key() for question in calibration}
    for question in evaluation:
        if question.key() in seen:
            names = ", ".join(str(i) for i in question.images if isinstance(i, Path)) or "no file"
            raise CalibrationError(
                f"evaluation question {question.prompt!r} ({names}): is in the calibration set too. "
                "Give disjoint folders."
            )


def _shipped(samples: Sequence[Any]) -> list[Question]:
    return [Question((s.image,), s.prompt, s.answer, s.task) for s in samples]


def _check_draw(samples: int, seed: int) -> None:
    if samples < 1 or seed < 0:
        raise CalibrationError(
            f"{samples} samples, seed {seed}: expected at least 1 sample and no negative seed"
        )


def _drawn(questions: list[Question], samples: int, seed: int) -> list[Question]:
    """A draw without replacement, kept in file order; every image of it decodes."""
    _check_draw(samples, seed)
    if samples < len(questions):
        chosen = np.random.default_rng(seed).permutation(len(questions))[:samples]
        questions = [questions[i] for i in sorted(chosen)]
    for question in questions:
        question.open_images()
    return questions


def _folder(folder: Path, plain: bool) -> list[Question]:
    if not folder.is_dir():
        raise CalibrationError(
            f"{folder}: not a folder. Give one with {SAMPLES}{' or images' if plain else ''}."
        )
    try:
        if (folder / SAMPLES).is_file():
            return _read_jsonl(folder)
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    except OSError as error:
        raise CalibrationError(f"{folder}: not readable ({error})") from error
    if plain and files:
        return [Question((file,), DEFAULT_PROMPT, None) for file in files]
    wanted = f"{SAMPLES} or images ({', '.join(IMAGE_SUFFIXES)})" if plain else SAMPLES
    raise CalibrationError(f"{folder}: nothing to read, expected {wanted}")


def _read_jsonl(folder: Path) -> list[Question]:
    path = folder / SAMPLES
    try:
        # Not splitlines: JSON texts may hold U+2028 and others that end a line there.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: not readable as UTF-8 text ({error})") from error
    questions = [
        _question(folder, line, f"{path}, line {n}")
        for n, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not questions:
        raise CalibrationError(f"{path}: empty, expected one JSON object per line")
    return questions


def _question(folder: Path, line: str, where: str) -> Question:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: not JSON ({error})") from error
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(f"{where}: half of a character ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
        raise CalibrationError(f'{where}: no text under "prompt"')
    for key in sorted(data.keys() - KEYS):
        if any(key.lower().rstrip("s") == known.rstrip("s") for known in KEYS):
            raise CalibrationError(f'{where}: unknown key "{key}". Known: {", ".join(KEYS)}.')
    names = data.get("image", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CalibrationError(f'{where}: "image" must be a path or a list of paths')
    task = data.get("task", "")
    if not isinstance(task, str):
        raise CalibrationError(f'{where}: "task" must be text')
    answers = _texts(data, "answer", where)
    options = _texts(data, "options", where)
    if len(options) > MOST_OPTIONS:
        raise CalibrationError(
            f"{where}: {len(options)} options, expected at most {MOST_OPTIONS}: each has a letter"
        )
    return Question(
        tuple(_inside(folder, name, where) for name in names),
        data["prompt"],
        answers[0] if answers else None,
        task,
        answers[1:],
        options,
    )


def _texts(data: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The texts under ``key``: none if it is absent or null, one for a text, all of a list."""
    found = data.get(key)
    texts = [found] if isinstance(found, str) else found if found is not None else []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise CalibrationError(f'{where}: "{key}" must be text or a list of texts')
    return tuple(texts)


def _inside(folder: Path, name: str, where: str) -> Path:
    if "\0" in name:
        raise CalibrationError(f"{where}: image {name!r}: not a file's name")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CalibrationError(f"{where}: image {name!r} lies outside {folder}")
    if not path.is_file():
        raise CalibrationError(f"{where}: image {name!r} not found")
    return path


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CalibrationError(
            f"{path}: not a readable image ({error}). Replace or remove it."
        ) from error
