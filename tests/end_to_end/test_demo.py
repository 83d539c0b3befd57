"""Proves the way through on the embedded demo model: float export = Hugging Face, quantized export = torch's fake
quantization, sizes, and answers.

Run: python -m pytest tests/end_to_end/test_demo.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qvlm_calib_data
from qvlm.capture import build_sample
from qvlm.checkpoint import Checkpoint
from qvlm.data import Question, evaluation
from qvlm.evaluate import answers, load_quantized
from qvlm.progress import silent
from qvlm.recipe import RECIPES
from qvlm.source import Loaded, load, open_source
from qvlm_export.build import build, image_spec, model_spec
from qvlm_export.conform import check
from qvlm_export.pipeline import Request, Result, export
from qvlm_export.rtx import compile_target
from qvlm_export.targets import TARGETS, Variant, named_target
from qvlm_runtime import Model
from qvlm_runtime import load as load_folder
from qvlm_runtime.backend import EXACT

pytestmark = pytest.mark.slow

# A draw of evaluation scenes that nothing else uses.
SEED = 11
QUESTIONS = 200
STEPS = 64


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def float_export(work: Path) -> Result:
    recipe = replace(RECIPES["float"], method="rtn", samples=16)
    return export(Request("demo", recipe, ("ort",)), work / "float")


@pytest.fixture(scope="module")
def quantized_export(work: Path) -> Result:
    recipe = replace(RECIPES["w4a16"], method="q-vlm", samples=32)
    return export(Request("demo", recipe, ("ort",)), work / "w4a16", keep_checkpoint=True)


@pytest.fixture(scope="module")
def reference() -> Loaded:
    return load(open_source("demo"))


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return evaluation("demo", QUESTIONS, SEED)


def hf_inputs(loaded: Loaded, question: Question) -> dict[str, Any]:
    token = int(loaded.model.config.image_token_id)  # type: ignore[union-attr, arg-type]
    sample = build_sample(loaded.processor, question.open_images(), question.prompt, "", token)
    inputs = sample.model_inputs()
    inputs.pop("use_cache")
    return inputs


def continued(loaded: Loaded, question: Question, steps: int) -> tuple[list[int], np.ndarray]:
    """Greedy tokens by transformers' own generate with its cache, and the logits they came from [steps, vocab]."""
    model: Any = loaded.model
    with torch.no_grad():
        out = model.generate(
            **hf_inputs(loaded, question),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.cat(out.logits).numpy()
    return out.sequences[0, -steps:].tolist(), logits


def replay(model: Model, question: Question, tokens: list[int]) -> np.ndarray:
    """Logits [len(tokens), vocab]: prefill, then every token but the last fed through the cache."""
    prompt = model.prepare(question.prompt, question.open_images())
    features = model.image_features(prompt.pictures)
    state = model.decoder.start(len(prompt.token_ids) + len(tokens), features)
    rows = [state.step(prompt.token_ids, prompt.image_index)]
    return np.stack(rows + [state.step((token,)) for token in tokens[:-1]])


def test_float_export_equals_hugging_face_over_prefill_and_cached_steps(
    float_export: Result, reference: Loaded, questions: list[Question]
) -> None:
    """The issue's bar, 1e-4 of the largest logit: float32 sums of a few hundred terms through a dozen layers."""
    with load_folder(float_export.folder, accuracy_level=EXACT) as model:
        for question in questions[:16]:
            tokens, expected = continued(reference, question, 1 + STEPS)
            found = replay(model, question, tokens)
            error = np.abs(found - expected).max() / np.abs(expected).max()
            assert error <= 1e-4, question.prompt


def test_float_export_gives_the_same_text(
    float_export: Result, reference: Loaded, questions: list[Question]
) -> None:
    expected = answers(reference, questions).texts
    with load_folder(float_export.folder) as model:
        found = [
            model.generate(q.prompt, q.open_images(), max_new_tokens=64).text for q in questions
        ]
    # ``answers`` stops a few tokens behind the reference's length, where a text can only be longer.
    assert [f[: len(e)] for f, e in zip(found, expected, strict=True)] == expected


def test_quantized_export_chooses_the_tokens_of_fake_quantization(
    quantized_export: Result, work: Path, questions: list[Question]
) -> None:
    simulated = load_quantized(work / "w4a16.checkpoint")
    same = total = 0
    with load_folder(quantized_export.folder, accuracy_level=EXACT) as model:
        for question in questions:
            tokens, expected = continued(simulated, question, 6)
            found = replay(model, question, tokens)
            same += int((found.argmax(-1) == expected.argmax(-1)).sum())
            total += len(tokens)
    assert same / total >= 0.995


def test_every_verification_row_passed(quantized_export: Result) -> None:
    rows = quantized_export.report.targets["ort"]["verify"]
    assert rows
    assert all(row["rms"] <= row["rms_bound"] for row in rows)


def test_decoder_linears_take_a_quarter_of_float16(quantized_export: Result) -> None:
    text = next(row for row in quantized_export.report.components if row.component == "text")
    assert text.quantized == text.linears
    assert text.nbytes <= 0.27 * text.float16_bytes


def test_quantized_answers_stay_within_a_point_of_float(
    quantized_export: Result, work: Path, reference: Loaded
) -> None:
    """On 1,000 held-out questions with fake quantization, whose tokens the export chooses (test above)."""
    asked = evaluation("demo", 1000, SEED + 1)
    floats = answers(reference, asked).exact_match
    quantized = answers(load_quantized(work / "w4a16.checkpoint"), asked).exact_match
    assert floats >= 0.95
    assert quantized >= floats - 0.01


def test_every_target_takes_the_demo(quantized_export: Result, work: Path) -> None:
    checkpoint = Checkpoint(work / "w4a16.checkpoint")
    for name, target in TARGETS.items():
        for cache in target.caches:
            variant = named_target(name, Variant(cache=cache))
            spec = build(checkpoint, variant, work / cache, None, silent)
            if target.is_tensorrt:
                findings = check(work / cache, variant)
                assert [finding.line() for finding in findings] == []
            assert spec.cache == cache


@pytest.mark.rtx
@pytest.mark.parametrize("sm", [86, 89])
def test_the_demo_compiles_with_its_integers(
    quantized_export: Result, work: Path, tmp_path: Path, sm: int
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    checkpoint = Checkpoint(work / "w4a16.checkpoint")
    model = model_spec(checkpoint)
    spec = build(checkpoint, named_target("rtx"), tmp_path, None, silent)
    _, rows = compile_target(tmp_path, spec, model, image_spec(checkpoint), silent, (sm,))
    assert [row.checked for row in rows] == ["constants", "constants"]
    decoder = next(row for row in rows if row.engine.endswith("decoder"))
    assert decoder.int4_products == 4 * model.layers  # q/k/v and gate/up are joined


def test_the_showcase_is_answered(quantized_export: Result) -> None:
    with load_folder(quantized_export.folder) as model:
        for sample in qvlm_calib_data.showcase():
            text = model.generate(sample.prompt, [sample.image]).text
            assert text.strip(), sample.prompt
