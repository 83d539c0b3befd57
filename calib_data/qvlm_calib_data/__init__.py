"""The embedded demo VLM and its data: a small LLaVA, calibration samples, evaluation scenes.

Needs numpy and Pillow only.  The model directory is read by the caller's own libraries; the shipped
samples and the rendered evaluation scenes come from disjoint seed ranges (see `scenes`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["Sample", "demo_model", "evaluation_samples", "samples", "showcase"]

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Sample:
    """One image with a question, its right answer and the task it belongs to."""

    image: Image.Image
    prompt: str
    answer: str
    task: str


def demo_model() -> Path:
    """The Hugging Face directory of the demo model."""
    return _HERE / "demo"


def samples(n: int | None = None, seed: int = 0) -> list[Sample]:
    """`n` of the shipped calibration samples, drawn without replacement; all if `n` is None.

    Different seeds give independent draws; without `n` the samples come in file order.
    """
    lines = (_HERE / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    if n is None:
        return [_read(line) for line in lines]
    if not 0 <= n <= len(lines):
        raise ValueError(f"samples(): n is {n}, but 0 to {len(lines)} samples are shipped")
    chosen = np.random.default_rng(seed).choice(len(lines), n, replace=False)
    return [_read(lines[int(i)]) for i in chosen]


def evaluation_samples(n: int, seed: int = 0) -> list[Sample]:
    """`n` freshly rendered held-out samples, the tasks in turn, every one on a scene of its own.

    No scene of any seed is among the shipped samples or was trained on.
    """
    from qvlm_calib_data.scenes import SEED_RANGES, draw_samples

    seeds = SEED_RANGES["evaluation"]
    first = int(np.random.default_rng(seed).integers(0, len(seeds) - n)) if seed else 0
    return [
        Sample(image, question.prompt, question.answer, question.task)
        for image, question in draw_samples("evaluation", n, first)
    ]


def showcase() -> list[Sample]:
    """Six samples, one per task, that a demonstration can ask the model about."""
    lines = (_HERE / "showcase.jsonl").read_text(encoding="utf-8").splitlines()
    return [_read(line) for line in lines]


def _read(line: str) -> Sample:
    fields = json.loads(line)
    with Image.open(_HERE / fields["image"]) as image:
        return Sample(image.convert("RGB"), fields["prompt"], fields["answer"], fields["task"])
