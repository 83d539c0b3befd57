"""Proves that directories of the tile families go through the quantizer and the exporter: goldens, integers, and graphs
that reproduce torch's simulation under verify's derived bounds.

Run: python -m pytest tests/export/test_tiles_quantized.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_tiles import write_source

from qvlm.checkpoint import Checkpoint
from qvlm.data import Question
from qvlm.progress import silent
from qvlm.quantize import quantize
from qvlm.recipe import RECIPES
from qvlm_export.build import build
from qvlm_export.targets import named_target
from qvlm_export.verify import verify_target


def _picture(seed: int, height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# One picture and two, wide and tall.
QUESTIONS = (
    Question((_picture(0, 40, 96),), "What is it?", "cat"),
    Question((_picture(1, 90, 60), _picture(2, 50, 50)), "Both?", None),
    Question((_picture(3, 30, 26),), "Is", "a dog"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    made: dict[Any, Checkpoint] = {}

    def make(family: str, method: str) -> Checkpoint:
        key = (family, method)
        if key not in made:
            folder = tmp_path_factory.mktemp("tiles")
            source = write_source(family, folder / "source", text__max_position_embeddings=640)
            recipe = replace(RECIPES["w4a16"], method=method, samples=3)
            made[key] = Checkpoint(
                quantize(str(source), folder / "out", recipe, questions=QUESTIONS, goldens=2)
            )
        return made[key]

    return make


@pytest.mark.parametrize(
    ("family", "method"),
    [("idefics3", "rtn"), ("idefics3", "gptq"), ("idefics3", "q-vlm"), ("internvl", "gptq")],
)
def test_verify_accepts_the_export(
    checkpoint: Callable[..., Checkpoint], family: str, method: str, tmp_path: Path
) -> None:
    made = checkpoint(family, method)
    formats = {entry["component"]: entry["format"] for entry in made.linears.values()}
    assert formats["text"] == "w4a16" and formats["vision"] == formats["projector"] == "w8a8"
    goldens = made.goldens()
    assert [len(g.inputs["image_sizes"]) for g in goldens] == [1, 2]
    for name in ("ort", "jetpack6"):
        spec = build(made, named_target(name), tmp_path, None, silent)
        result = verify_target(tmp_path, spec, made, silent)
        assert all(row.passed for row in result)
        assert result.positions == sum(len(g.inputs["tokens"]) for g in goldens)
