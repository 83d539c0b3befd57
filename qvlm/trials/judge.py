"""How far a quantized model is from its float original, on questions with reference answers.

Teacher-forced on the reference answers: KL(float || quantized) per answer token, perplexity
of the answers, and exact match, the share of questions whose every answer token up to the end token
is the argmax. Greedy decoding gives the reference answer in exactly those cases: by induction, its
next token is the argmax after the reference's beginning. One forward pass per question instead of
one per token. Of KL the mean, the mean without the worst 2 % of the tokens, and the median: one
token in a thousand that goes wrong can double the mean.

Block errors tell where the difference arises: |q - f|^2 / |f|^2 of what leaves each decoder layer,
image and text tokens apart, both models run side by side so that no hidden state is kept.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.capture import Sample
from qvlm.errors import CalibrationError
from qvlm.generate import stop_tokens
from qvlm.models.adapter import Adapter

# Questions of equal shape in one forward pass.
BATCH = 32
# Share of the answer tokens, the worst, that "kl_trimmed" leaves out.
TRIMMED = 0.02


@dataclass(frozen=True)
class Batch:
    """Questions of equal shape with what the float model said: log probabilities [answer tokens,
    vocab].
    """

    inputs: dict[str, Any]
    mask: Tensor  # bool [questions, S-1]: the logits at t predict a counted answer token at t+1
    wanted: Tensor  # [answer tokens]
    reference: Tensor
    image: Tensor  # bool [questions, S]
    questions: tuple[int, ...]  # their numbers


class Judge:
    """A float model's answers on a set of questions, and how far another model is from them."""

    def __init__(self, model: nn.Module, samples: Sequence[Sample]) -> None:
        groups: dict[Any, list[int]] = defaultdict(list)
        for number, sample in enumerate(samples):
            pixels = None if sample.pixel_values is None else tuple(sample.pixel_values.shape)
            groups[(sample.input_ids.shape[1], pixels)].append(number)
        stop = stop_tokens(model)
        self.batches: list[Batch] = []
        for group in groups.values():
            for start in range(0, len(group), BATCH):
                self.batches.append(_batch(model, samples, group[start : start + BATCH], stop))
        self.questions = len(samples)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """kl, kl_trimmed, kl_median (nats per answer token), exact_match (0 to 1), perplexity of the answers."""
        found, _ = self.measure_each(model)
        return found

    @torch.no_grad()
    def measure_each(self, model: nn.Module) -> tuple[dict[str, float], list[bool]]:
        """What ``measure`` gives, and for each question in order whether it was answered right."""
        divergences: list[Tensor] = []
        loss = 0.0
        right = [False] * self.questions
        for batch in self.batches:
            found = _answer_logits(model, batch.inputs, batch.mask)
            divergences.append((batch.reference.exp() * (batch.reference - found)).sum(-1))
            loss -= float(found.gather(1, batch.wanted[:, None]).sum())
            hit = torch.ones_like(batch.mask)
            hit[batch.mask] = found.argmax(-1) == batch.wanted
            for number, every in zip(batch.questions, hit.all(1).tolist(), strict=True):
                right[number] = every
        kl = torch.cat(divergences).sort().values
        tokens = len(kl)
        measured = {
            "kl": float(kl.mean()),
            "kl_trimmed": float(kl[: math.ceil(tokens * (1 - TRIMMED))].mean()),
            "kl_median": float(kl.median()),
            "exact_match": sum(right) / self.questions,
            # e^700 stands for anything worse: JSON has no infinity.
            "perplexity": math.exp(min(loss / tokens, 700.0)),
        }
        return measured, right

    @torch.no_grad()
    def block_errors(
        self, reference: nn.Module, model: nn.Module, adapter: Adapter
    ) -> dict[str, list[float]]:
        """image_error and text_error: a value per decoder layer (see above), over all questions;
        everything before the layer is quantized too. No image, no image_error values.

        reference: the float model that ``model`` was made from; not always the judge's, as the
        same function may have other hidden states (a rotated residual stream).
        """
        names = adapter.layer_names(reference, "text")
        error = {kind: torch.zeros(len(names), dtype=torch.float64) for kind in ("image", "text")}
        norm = {kind: value.clone() for kind, value in error.items()}
        for batch in self.batches:
            sides = [_layer_outputs(side, names, batch.inputs) for side in (reference, model)]
            for kind, mask in (("image", batch.image), ("text", ~batch.image)):
                for layer, (f, q) in enumerate(zip(*sides, strict=True)):
                    wanted = f[mask].double()
                    error[kind][layer] += (q[mask].double() - wanted).square().sum()
                    norm[kind][layer] += wanted.square().sum()
        return {
            f"{kind}_error": (error[kind] / norm[kind]).tolist() if norm[kind].all() else []
            for kind in error
        }


def _layer_outputs(
    model: nn.Module, names: Sequence[str], inputs: Mapping[str, Any]
) -> list[Tensor]:
    """The hidden states [B, S, hidden] that leave each named layer."""
    outputs: list[Tensor] = []

    def left(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(left).remove)
        model(**inputs)
    return outputs


@torch.no_grad()
def _batch(
    model: nn.Module, every: Sequence[Sample], numbers: Sequence[int], stop: frozenset[int]
) -> Batch:
    samples = [every[number] for number in numbers]
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
    return Batch(
        joined,
        mask,
        ids[:, 1:][mask],
        _answer_logits(model, joined, mask),
        torch.stack([sample.image_mask for sample in samples]),
        tuple(numbers),
    )


def _answer_logits(model: nn.Module, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
    """Log probabilities float64 [answer tokens, vocab]."""
    logits: Tensor = model(**inputs).logits
    return logits[:, :-1][mask].double().log_softmax(-1)
