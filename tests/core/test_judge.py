"""Proves the judge's measures by their definitions: perplexity, divergence, who was right, the error of each decoder
layer's output on image and on text tokens.

Run: python -m pytest tests/core/test_judge.py
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny_models import IMAGE_TOKEN, greedy, prompts, tiny_llava

from qvlm.capture import Sample
from qvlm.models import ADAPTERS
from qvlm.trials.judge import Judge

ADAPTER = ADAPTERS["llava"]
END = 2


def answered(model: Any, seed: int, right: bool) -> Sample:
    """A prompt with the model's own answer, or with one that begins otherwise."""
    ids, pixels = prompts(model, seed)[0]
    own = greedy(model, ids, pixels, 2)
    tokens = [*(own if right else [own[0] ^ 1, own[1]]), END]
    whole = torch.tensor([ids + tokens])
    return Sample(whole, pixels, whole[0] == IMAGE_TOKEN, torch.arange(whole.shape[1]) >= len(ids))


def disturbed(model: Any) -> Any:
    """Every decoder linear moved a little."""
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for linear in ADAPTER.linears(other, "text").values():
            linear.weight += 0.02 * torch.randn_like(linear.weight)
    return other


def test_perplexity_is_that_of_the_answers() -> None:
    model = tiny_llava()
    samples = [answered(model, seed, True) for seed in range(3)]
    other = disturbed(model)
    found = Judge(model, samples).measure(other)
    loss, count = 0.0, 0
    for sample in samples:
        with torch.no_grad():
            logs = other(**sample.model_inputs()).logits[0].double().log_softmax(-1)
        for t in sample.answer_mask.nonzero().flatten().tolist():
            loss -= float(logs[t - 1, sample.input_ids[0, t]])
            count += 1
    # Float32 logits of batches of another size: about 1e-6 each, relative to a loss of order one.
    assert found["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)


def test_divergence_is_given_as_mean_trimmed_mean_and_median() -> None:
    model = tiny_llava()
    samples = [answered(model, seed, True) for seed in range(3)]
    other = disturbed(model)
    found = Judge(model, samples).measure(other)
    divergences = []
    for sample in samples:
        rows = sample.answer_mask[1:]
        with torch.no_grad():
            p, q = (
                m(**sample.model_inputs()).logits[0, :-1][rows].double().log_softmax(-1)
                for m in (model, other)
            )
        divergences += (p.exp() * (p - q)).sum(-1).tolist()
    count = len(divergences)
    assert count < 50  # so that 98 % of them, rounded up, are all: nothing may be trimmed
    ordered = sorted(divergences)
    # Float32 logits of batches of another size, as above.
    assert found["kl"] == pytest.approx(sum(ordered) / count, rel=1e-4)
    assert found["kl_trimmed"] == found["kl"]
    assert found["kl_median"] == pytest.approx(ordered[(count - 1) // 2], rel=1e-4)
    # Twenty times each: now the worst are trimmed.
    many = Judge(model, samples * 20).measure(other)
    kept = sorted(divergences * 20)[: math.ceil(count * 20 * 0.98)]
    assert many["kl"] == pytest.approx(found["kl"], rel=1e-4)
    assert many["kl_trimmed"] == pytest.approx(sum(kept) / len(kept), rel=1e-4)
    assert many["kl_trimmed"] < many["kl"]


def test_each_question_is_told_apart_in_order() -> None:
    """Groups of equal shape must not shuffle the answers; without the end token none would be right."""
    model = tiny_llava()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.register_forward_hook(
        lambda m, a, out: out + 5.0 * torch.nn.functional.one_hot(torch.tensor(END), out.shape[-1])
    )
    samples = []
    for seed, tokens in enumerate(([END], [5, END], [END], [5, 6, END], [END])):
        ids, pixels = prompts(model, seed)[0]
        whole = torch.tensor([ids + tokens])
        answer = torch.arange(whole.shape[1]) >= len(ids)
        samples.append(Sample(whole, pixels, whole[0] == IMAGE_TOKEN, answer))
    measured, right = Judge(model, samples).measure_each(model)
    assert right == [True, False, True, False, True]
    assert measured["exact_match"] == 3 / 5


def test_block_errors_equal_their_definition() -> None:
    model = tiny_llava(text_num_hidden_layers=3)
    samples = [answered(model, seed, True) for seed in range(3)]
    judge, other = Judge(model, samples), disturbed(model)
    same = judge.block_errors(model, model, ADAPTER)
    assert same == {"image_error": [0.0] * 3, "text_error": [0.0] * 3}
    found = judge.block_errors(model, other, ADAPTER)
    names = ADAPTER.layer_names(model, "text")
    for kind in ("image", "text"):
        error, norm = torch.zeros(3).double(), torch.zeros(3).double()
        for sample in samples:
            mask = sample.image_mask if kind == "image" else ~sample.image_mask
            f, q = (_leaving(m, names, sample) for m in (model, other))
            for layer in range(3):
                error[layer] += (q[layer][0, mask] - f[layer][0, mask]).square().sum()
                norm[layer] += f[layer][0, mask].square().sum()
        # Sums of squares of differences of float32 states: 1e-5 of the error for other batch sizes.
        assert found[f"{kind}_error"] == pytest.approx((error / norm).tolist(), rel=1e-3)
    assert found["image_error"] != found["text_error"]


def test_without_images_there_is_no_image_error() -> None:
    model = tiny_llava()
    whole = torch.tensor([[1, 20, 21, 22, END]])
    nothing = torch.zeros(5, dtype=torch.bool)
    sample = Sample(whole, None, nothing, torch.arange(5) >= 3)
    found = Judge(model, [sample]).block_errors(model, disturbed(model), ADAPTER)
    assert found["image_error"] == [] and all(e > 0 for e in found["text_error"])


def _leaving(model: Any, names: tuple[str, ...], sample: Sample) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda m, a, out: outputs.append((out[0] if isinstance(out, tuple) else out).double())
        )
        for name in names
    ]
    with torch.no_grad():
        model(**sample.model_inputs())
    for handle in handles:
        handle.remove()
    return outputs
