"""Proves the measures: a reloaded checkpoint is the goldens' model bit for bit, batches change no answer, a model does
not diverge from itself, bytes add up.

Run: python -m pytest tests/core/test_evaluate.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import IMAGE_TOKEN
from tiny_source import tiny_questions

from qvlm.capture import Sample, build_sample
from qvlm.checkpoint import Checkpoint
from qvlm.errors import CalibrationError
from qvlm.evaluate import _score, answers, divergence, load_quantized, sizes
from qvlm.generate import decode, golden_side, golden_steps, stop_tokens, with_own_answer
from qvlm.models import ADAPTERS
from qvlm.source import Loaded, load, open_source

QUESTIONS = [replace(q, answer=q.answer or "cat") for q in tiny_questions(7)]


@pytest.fixture(scope="module")
def float_model(tiny_source: Path) -> Loaded:
    return load(open_source(str(tiny_source)))


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint: Path) -> Loaded:
    return load_quantized(tiny_checkpoint)


def test_a_reloaded_checkpoint_reproduces_its_goldens_bit_for_bit(
    quantized: Loaded, tiny_checkpoint: Path
) -> None:
    for golden in Checkpoint(tiny_checkpoint).goldens():
        ids = torch.from_numpy(golden.inputs["input_ids"])[None]
        pixels = torch.from_numpy(golden.inputs["pixel_values"])
        sample = Sample(
            ids,
            pixels,
            ids[0] == IMAGE_TOKEN,
            torch.zeros(ids.shape[1], dtype=torch.bool),
            image_sizes=tuple(map(tuple, golden.inputs["image_sizes"].tolist())),
        )
        forced = torch.from_numpy(golden.inputs["tokens"])[None]
        inputs, outputs = golden_side(quantized.model, ADAPTERS["llava"], sample, 0, forced)
        assert all(np.array_equal(inputs[key], golden.inputs[key]) for key in golden.inputs)
        assert all(np.array_equal(outputs[key], golden.outputs["quant"][key]) for key in outputs)


def test_cached_decoding_equals_a_full_forward(float_model: Loaded) -> None:
    """Logits of each step against the whole sequence at once: same sums in another order."""
    question = QUESTIONS[0]
    sample = build_sample(
        float_model.processor, question.open_images(), question.prompt, "", IMAGE_TOKEN
    )
    result = decode(float_model.model, sample.model_inputs(), 8, keep_logits=True)
    assert result.logits is not None
    whole = torch.cat([sample.input_ids, result.tokens[:, :-1]], 1)
    with torch.no_grad():
        full = float_model.model(input_ids=whole, pixel_values=sample.pixel_values).logits
    expected = full[:, sample.input_ids.shape[1] - 1 :]
    # Float32 sums of at most 640 terms through two layers: 640 * 2^-24 relative each, six linears deep.
    tolerance = 6 * 640 * 2.0**-24 * float(expected.abs().max())
    assert float((result.logits - expected).abs().max()) <= tolerance


def test_batches_change_no_answer(float_model: Loaded) -> None:
    alone = answers(float_model, QUESTIONS, batch=1)
    together = answers(float_model, [*QUESTIONS, *QUESTIONS], batch=4)
    assert together.texts == alone.texts * 2
    assert len(set(alone.texts)) > 1


def test_exact_match_is_counted_per_task() -> None:
    questions = [
        replace(QUESTIONS[0], answer=a, task=t) for a, t in (("a b", "x"), ("c", "x"), ("d", "y"))
    ]
    score = _score([" a  b", "no", "d"], questions)
    assert score.exact_match == 2 / 3
    assert score.per_task == {"x": 0.5, "y": 1.0}
    with pytest.raises(CalibrationError, match="no answer to compare"):
        _score([""], [replace(QUESTIONS[0], answer=None)])


def test_a_model_does_not_diverge_from_itself(float_model: Loaded) -> None:
    found = divergence(float_model, float_model, QUESTIONS)
    assert (found.kl, found.agreement, found.image_error, found.text_error) == (0.0, 1.0, 0.0, 0.0)
    assert found.perplexity_float == found.perplexity_quant


def test_divergence_equals_its_definition(float_model: Loaded, quantized: Loaded) -> None:
    found = divergence(float_model, quantized, QUESTIONS, batch=3)
    kl = loss = 0.0
    count = 0
    for question in QUESTIONS:
        sample = build_sample(
            float_model.processor,
            question.open_images(),
            question.prompt,
            question.answer or "",
            IMAGE_TOKEN,
        )
        with torch.no_grad():
            f, q = (
                m.model(**sample.model_inputs()).logits[0].double()
                for m in (float_model, quantized)
            )
        for t in sample.answer_mask.nonzero().flatten().tolist():
            p, log_q = f[t - 1].softmax(-1), q[t - 1].log_softmax(-1)
            kl += float((p * (p.log() - log_q)).sum())
            loss -= float(log_q[sample.input_ids[0, t]])
            count += 1
    assert found.tokens == count
    # Float32 logits from batches of other sizes: about 1e-5 of the KL per token.
    assert found.kl == pytest.approx(kl / count, rel=1e-3)
    assert found.perplexity_quant == pytest.approx(float(np.exp(loss / count)), rel=1e-4)
    assert found.kl > 0 and found.text_error > 0


def test_divergence_needs_answers(float_model: Loaded) -> None:
    with pytest.raises(CalibrationError, match="no question has an answer"):
        divergence(float_model, float_model, [replace(QUESTIONS[0], answer="")])


def test_sizes_add_up(float_model: Loaded, tiny_checkpoint: Path) -> None:
    rows = {row.component: row for row in sizes(Checkpoint(tiny_checkpoint))}
    assert set(rows) == {"vision", "projector", "text", "head", "other", "total"}
    total = rows.pop("total")
    assert total.parameters == sum(p.numel() for p in float_model.model.parameters())
    assert total.nbytes == sum(row.nbytes for row in rows.values())
    # 4 bits and a float16 scale per 128.
    assert rows["text"].bits_per_weight == 4 + 16 / 128
    assert rows["head"].nbytes == 2 * 333 * 384


def test_an_own_answer_is_greedy_and_ends_the_sample(float_model: Loaded) -> None:
    question = QUESTIONS[2]
    sample = build_sample(
        float_model.processor, question.open_images(), question.prompt, "", IMAGE_TOKEN
    )
    longer = with_own_answer(float_model.model, sample, 5)
    added = int(longer.answer_mask.sum())
    assert 1 <= added <= 5 and longer.input_ids.shape[1] == sample.input_ids.shape[1] + added
    with torch.no_grad():
        first = float_model.model(**sample.model_inputs()).logits[0, -1].argmax()
    assert longer.input_ids[0, sample.input_ids.shape[1]] == first


def test_decoding_stops_at_the_end_token(float_model: Loaded) -> None:
    question = QUESTIONS[0]
    sample = build_sample(
        float_model.processor, question.open_images(), question.prompt, "", IMAGE_TOKEN
    )
    free = decode(float_model.model, sample.model_inputs(), 6).tokens[0].tolist()
    stopped = (
        decode(float_model.model, sample.model_inputs(), 6, frozenset({free[2]})).tokens[0].tolist()
    )
    assert stopped == free[: free.index(free[2]) + 1]
    assert stop_tokens(float_model.model) == {2}


def test_golden_steps_are_bounded_by_context_and_memory() -> None:
    ids = torch.zeros(1, 100, dtype=torch.long)
    sample = Sample(
        ids, None, torch.zeros(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    )
    assert golden_steps([sample], 500, 1024) == 64
    assert golden_steps([sample], 500, 130) == 30
    assert golden_steps([sample] * 16, 32_000, 4096) == 16
    assert golden_steps([sample] * 16, 152_000, 4096) == 8
