"""Calibration and evaluation questions: a folder with samples.jsonl, a plain folder of images, or the shipped set.

samples.jsonl has one JSON object per line: {"image": path relative to the folder, or a list of them, "prompt": text,
"answer": text, "task": optional text}. Every path is checked to lie inside the folder and every image is decoded
before work begins, so that a bad folder costs one line and no time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qvlm.errors import CalibrationError

SAMPLES = "samples.jsonl"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Asked about each picture of a plain folder; the model answers it itself.
DEFAULT_PROMPT = "Describe this image in detail."


@dataclass(frozen=True)
class Question:
    """images: files or PIL images, in prompt order; answer None means that the model's own greedy answer is used."""

    images: tuple[Path | Image.Image, ...]
    prompt: str
    answer: str | None
    task: str = ""

    def open_images(self) -> list[Image.Image]:
        """The images in RGB; CalibrationError naming the file that cannot be decoded."""
        return [_open(image) if isinstance(image, Path) else image for image in self.images]


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

        return _shipped(qvlm_calib_data.evaluation_samples(samples, seed))
    questions = _folder(Path(str(path)), plain=False)
    for number, question in enumerate(questions, 1):
        if question.answer is None:
            raise CalibrationError(
                f'{Path(str(path)) / SAMPLES}: question {number} has no answer to compare with. Add an "answer".'
            )
    return _drawn(questions, samples, seed)


def _shipped(samples: Sequence[Any]) -> list[Question]:
    return [Question((s.image,), s.prompt, s.answer, s.task) for s in samples]


def _drawn(questions: list[Question], samples: int, seed: int) -> list[Question]:
    """A draw without replacement, kept in file order; every image of it decodes."""
    if samples < 1:
        raise CalibrationError(f"{samples} samples, expected at least 1")
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
        lines = path.read_text(encoding="utf-8").splitlines()
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
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where}: not JSON ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
        raise CalibrationError(f'{where}: no text under "prompt"')
    names = data.get("image", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CalibrationError(f'{where}: "image" must be a path or a list of paths')
    answer, task = data.get("answer"), data.get("task", "")
    if not isinstance(answer, str | None) or not isinstance(task, str):
        raise CalibrationError(f'{where}: "answer" and "task" must be text')
    return Question(
        tuple(_inside(folder, name, where) for name in names), data["prompt"], answer, task
    )


def _inside(folder: Path, name: str, where: str) -> Path:
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
