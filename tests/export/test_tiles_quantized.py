"""Proves that directories of the tile families go through the quantizer and the exporter: goldens, integers, and graphs
that reproduce torch's simulation under verify's derived bounds.

Run: python -m pytest tests/export/test_tiles_quantized.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
from tiny_models import IMAGE_TOKEN
from tiny_tiles import PROCESSORS, picture, tiny_questions, write_source

from qvlm.capture import build_sample
from qvlm.checkpoint import Checkpoint
from qvlm.cli import main as core
from qvlm.generate import decode, stop_tokens
from qvlm.progress import silent
from qvlm.quantize import quantize
from qvlm.recipe import RECIPES
from qvlm.source import load, open_source
from qvlm_export.build import build
from qvlm_export.cli import main
from qvlm_export.targets import named_target
from qvlm_export.verify import verify_target
from qvlm_runtime import load as load_folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    made: dict[Any, Checkpoint] = {}

    def make(family: str, method: str) -> Checkpoint:
        key = (family, method)
        if key not in made:
            folder = tmp_path_factory.mktemp("tiles")
            source = write_source(family, folder / "source")
            recipe = replace(RECIPES["w4a16"], method=method, samples=3)
            made[key] = Checkpoint(
                quantize(
                    str(source), folder / "out", recipe, questions=tiny_questions(3), goldens=2
                )
            )
        return made[key]

    return make


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("idefics3", "rtn"),
        ("idefics3", "gptq"),
        ("idefics3", "q-vlm"),
        ("smolvlm", "rtn"),
        ("internvl", "gptq"),
        ("llava_next", "gptq"),
        ("llava_onevision", "rtn"),
    ],
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


@pytest.mark.parametrize("family", ["llava", *PROCESSORS])
def test_a_folder_answers_as_transformers_does(family: str, tmp_path: Path) -> None:
    source = tiny_families.write_source(family, tmp_path / "source")
    arguments = [str(source), str(tmp_path / "out"), "--recipe", "float"]
    assert main([*arguments, "--calib", str(_calibration(tmp_path)), "--target", "ort"]) == 0
    loaded = load(open_source(str(source)))
    with load_folder(tmp_path / "out") as model:
        for question in tiny_questions(3):
            images = list(question.images)
            found = model.generate(question.prompt, images=images, max_new_tokens=12)
            sample = build_sample(loaded.processor, images, question.prompt, "", IMAGE_TOKEN)
            expected = decode(loaded.model, sample.model_inputs(), 12, stop_tokens(loaded.model))
            assert list(found.token_ids) == expected.tokens[0].tolist()


@pytest.mark.parametrize("family", ["idefics3", "internvl", "llava_next"])
def test_a_checkpoint_is_evaluated(
    checkpoint: Callable[..., Checkpoint],
    family: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = checkpoint(family, "rtn" if family == "idefics3" else "gptq").directory
    questions = str(_calibration(tmp_path))
    command = ["evaluate", str(made), "--against", str(made.parent / "source"), "--eval", questions]
    assert core([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < found["divergence"]["kl"] < np.inf


def _calibration(folder: Path) -> Path:
    """A folder with one question."""
    (folder / "questions").mkdir()
    picture(0, 40, 96).save(folder / "questions" / "a.png")
    line = {"image": "a.png", "prompt": "What?", "answer": "cat"}
    (folder / "questions" / "samples.jsonl").write_text(json.dumps(line))
    return folder / "questions"
