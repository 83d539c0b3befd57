"""How far a quantized model is from its float original, on questions with reference answers.

Teacher-forced on the reference answers: mean KL(float || quantized) per answer token, and exact
match, the share of questions whose every answer token up to the end token is the argmax. Greedy
decoding gives the reference answer in exactly those cases: by induction, its next token is the
argmax after the reference's beginning. One forward pass per question instead of one per token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.capture import Sample
from qvlm.errors import CalibrationError
from qvlm.generate import stop_tokens

# Questions of equal shape in one forward pass.
BATCH = 32


@dataclass(frozen=True)
class Batch:
    """Questions of equal shape with what the float model said: log probabilities [answer tokens,
    vocab].
    """

    inputs: dict[str, Any]
    mask: Tensor  # bool [questions, S-1]: the logits at t predict a counted answer token at t+1
    wanted: Tensor  # [answer tokens]
    reference: Tensor


class Judge:
    """A float model's answers on a set of questions, and how far another model is from them."""

    def __init__(self, model: nn.Module, samples: Sequence[Sample]) -> None:
        groups: dict[Any, list[Sample]] = defaultdict(list)
        for sample in samples:
            pixels = None if sample.pixel_values is None else tuple(sample.pixel_values.shape)
            groups[(sample.input_ids.shape[1], pixels)].append(sample)
        stop = stop_tokens(model)
        self.batches: list[Batch] = []
        for group in groups.values():
            for start in range(0, len(group), BATCH):
                self.batches.append(_batch(model, group[start : start + BATCH], stop))
        self.questions = len(samples)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """kl (nats per answer token), exact_match (0 to 1)."""
        kl, tokens, right = 0.0, 0, 0
        for batch in self.batches:
            found = _answer_logits(model, batch.inputs, batch.mask)
            kl += float((batch.reference.exp() * (batch.reference - found)).sum())
            tokens += len(found)
            hit = torch.ones_like(batch.mask)
            hit[batch.mask] = found.argmax(-1) == batch.wanted
            right += int(hit.all(1).sum())
        return {"kl": kl / tokens, "exact_match": right / self.questions}


@torch.no_grad()
def _batch(model: nn.Module, samples: Sequence[Sample], stop: frozenset[int]) -> Batch:
    inputs = [sample.model_inputs() for sample in samples]
    joined = {
        key: torch.cat([i[key] for i in inputs]) if isinstance(value, Tensor) else value
        for key, value in inputs[0].items()
    }
    ids = joined["input_ids"]
    answer = torch.stack([sample.answer_mask for sample in samples])
    ended = torch.isin(ids, torch.tensor(sorted(stop), dtype=torch.int64)) & answer
    before = (ended.cumsum(1) - ended.long()) == 0  # up to the first end token of the answer
    mask = (answer & before)[:, 1:]
    if not bool(mask.any(1).all()):
        raise CalibrationError("a question has no answer: exact match needs one")
    return Batch(joined, mask, ids[:, 1:][mask], _answer_logits(model, joined, mask))


def _answer_logits(model: nn.Module, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
    """Log probabilities float64 [answer tokens, vocab]."""
    logits: Tensor = model(**inputs).logits
    return logits[:, :-1][mask].double().log_softmax(-1)
