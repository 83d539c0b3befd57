"""The end loss's curvature: exactly the Fisher diagonal in the mean over signs, and zero where nothing can matter.

python -m pytest tests/core/test_curvature.py
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import IMAGE_TOKEN, prompts, tiny_llava
from torch import nn

from qvlm.capture import Sample
from qvlm.curvature import end_curvature
from qvlm.models import ADAPTERS

WORDS = 3


class Toy(nn.Module):
    """One-hot tokens, a linear, a running mean over the past, a head: tokens see earlier ones only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(4, 2), nn.Linear(2, WORDS)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        z = self.inner(torch.eye(4)[input_ids])
        past = z.tanh().cumsum(1) / torch.arange(1, z.shape[1] + 1)[:, None]
        return SimpleNamespace(logits=self.head(past))


def sample(answers: list[int]) -> Sample:
    ids = torch.tensor([[0, 1, 2, 3, 1]])
    mask = torch.zeros(5, dtype=torch.bool)
    mask[answers] = True
    return Sample(ids, None, torch.zeros(5, dtype=torch.bool), mask)


def fisher(model: Toy, asked: Sample) -> torch.Tensor:
    """Mean over channels of sum_positions sum_k p_k (d log p_k / dz)^2, one derivative at a time."""
    z = model.inner(torch.eye(4)[asked.input_ids]).detach().requires_grad_(True)
    past = z.tanh().cumsum(1) / torch.arange(1, 6)[:, None]
    log_p = model.head(past)[0, :-1][asked.answer_mask[1:]].log_softmax(-1)
    total = torch.zeros_like(z)
    for row in log_p:
        for value in row:
            (gradient,) = torch.autograd.grad(value, z, retain_graph=True)
            total += value.exp().detach() * gradient.square()
    return total.mean(-1)[0]


def test_mean_over_all_signs_is_the_fisher_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = Toy(), sample([2, 4])
    every = itertools.product((0, 1), repeat=2 * WORDS)
    draws: Iterator[torch.Tensor] = (torch.tensor(e).reshape(2, WORDS) for e in every)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: next(draws))
    count = 2 ** (2 * WORDS)
    found = end_curvature(model, [asked] * count, {"inner": model.inner}, 0)["inner"]
    mean = torch.stack(found).mean(0)
    # 64 float32 terms, each exact to a few 1e-7.
    torch.testing.assert_close(mean, fisher(model, asked), rtol=1e-5, atol=1e-9)
    assert (
        float(mean[3]) > 0 and float(mean[4]) == 0
    )  # nothing predicts after the last answer token


def test_no_answer_is_zero_and_same_seed_is_the_same() -> None:
    model = Toy()
    assert not end_curvature(model, [sample([])], {"inner": model.inner}, 0)["inner"][0].any()
    first, again, other = (
        end_curvature(model, [sample([2, 3])], {"inner": model.inner}, seed)["inner"][0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_every_linear_of_a_vlm_from_one_pass() -> None:
    model = tiny_llava()
    ids, pixels = prompts(model, 1)[0]
    tokens = torch.tensor([ids])
    answer = torch.arange(len(ids)) >= len(ids) - 2
    asked = Sample(tokens, pixels, tokens[0] == IMAGE_TOKEN, answer)
    linears = {
        name: linear
        for component in ("vision", "projector", "text")
        for name, linear in ADAPTERS["llava"].linears(model, component).items()
    }
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    found = end_curvature(model, [asked], linears, 0)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    for name, (values,) in found.items():
        assert float(values.max()) > 0 and bool((values >= 0).all())
        if "language_model" in name:
            assert len(values) == len(ids) and float(values[-1]) == 0
    last = next(n for n in reversed(list(found)) if n.endswith("mlp.down_proj"))
    # Behind the last attention a token acts on its own answer only.
    assert found[last][0].nonzero()[:, 0].tolist() == [len(ids) - 3, len(ids) - 2]
