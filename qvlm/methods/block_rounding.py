"""The joint refinement of one block: its linears' roundings and scales moved together against the block's loss.

Loss of a sample, with h the block's output on the quantized stream and h* on the float stream:

    output    sum_n c_n |h_n - h*_n|^2, c the token weights
    answers   KL(float answers || answers when h goes on through the layers behind the block, still float), the mean
              over answer tokens; text only
    both      each divided by its value at the start, so that neither depends on a unit

Solvers over the same parameters (``signed_rounding``): "gradient" moves every weight's rounding and every scale;
"grid" is Q-VLM's joint search with the candidates ``RATIOS`` times all scales of a layer. Either result is judged by
the loss on held-out samples (``held_out``) and replaces the start only if it is below the start's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qvlm.affine import QuantizedWeight
from qvlm.checkpoint import QuantizedLinear
from qvlm.fakequant import FakeQuantLinear, substituted
from qvlm.methods.held_out import split
from qvlm.methods.method import Block
from qvlm.rounding import joint_search
from qvlm.signed_rounding import Settings, SoftWeight, sign_descent

LOSSES = ("output", "answers", "both")
# Candidates of the grid solver; the first is the start.
RATIOS = (1.0, 0.97, 0.94, 1.03, 1.06)
# Keeps the loss defined where the start is already exact.
TINY = 1e-12


class BlockLoss:
    """The loss of one block on its samples; ``linears`` hold what the block's activations are rounded with.

    targets[i]: the float block's output on sample i. token_weights[i] [tokens] or None.
    """

    def __init__(
        self,
        block: Block,
        linears: Mapping[str, QuantizedLinear],
        targets: Sequence[Tensor],
        token_weights: Sequence[Tensor] | None,
        kind: str,
    ) -> None:
        self.block, self.linears, self.targets = block, linears, targets
        self.token_weights, self.stream = token_weights, block.stream
        self.kind = kind if block.stream.logits is not None else "output"
        self.answers: list[Tensor] = []
        if self.kind != "output":
            with torch.no_grad():
                self.answers = [self._log_answers(h, i) for i, h in enumerate(targets)]
        self.units = (1.0, 1.0)

    def start_at(self, weights: Mapping[str, Tensor], samples: Sequence[int]) -> None:
        """Makes the loss at these weights, over these samples, one unit per term."""
        with torch.no_grad():
            terms = [self._terms(weights, i) for i in samples]
        means = [max(float(torch.stack(t).mean()), TINY) for t in zip(*terms, strict=True)]
        self.units = (means[0], means[1])

    def __call__(self, weights: Mapping[str, Tensor], sample: int) -> Tensor:
        """Loss of one sample, differentiable in the weights [out, in] by name."""
        output, answers = self._terms(weights, sample)
        return output / self.units[0] + answers / self.units[1]

    def functions(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """The linears with these weights, as functions of their inputs."""
        found = {}
        for name, weight in weights.items():
            linear = FakeQuantLinear.from_quantized(
                self.linears[name], self.block.linears[name].bias
            )
            linear.weight = weight
            found[name] = linear.forward
        return found

    def _terms(self, weights: Mapping[str, Tensor], sample: int) -> tuple[Tensor, Tensor]:
        with substituted(self.block.linears, self.functions(weights)):
            hidden = self.block.run(self.block.quant_inputs[sample], sample)
        nothing = torch.zeros(())
        output = nothing
        if self.kind != "answers":
            output = self._output_error(hidden, sample)
        if self.kind == "output" or not len(self.answers[sample]):
            return output, nothing
        wanted = self.answers[sample]
        found = self._log_answers(hidden, sample)
        return output, (wanted.exp() * (wanted - found)).sum(-1).mean()

    def _output_error(self, hidden: Tensor, sample: int) -> Tensor:
        difference = (hidden - self.targets[sample]).reshape(-1, hidden.shape[-1])
        errors = difference.square().sum(-1)
        if self.token_weights is not None:
            errors = errors * self.token_weights[sample]
        return errors.mean()

    def _log_answers(self, hidden: Tensor, sample: int) -> Tensor:
        """Log probabilities [answer tokens, vocab] after the float layers behind the block."""
        assert self.stream.logits is not None
        asked = self.stream.answer_masks[sample]
        if not bool(asked.any()):
            return hidden.new_zeros(0, 0)
        hidden = self.stream.run(self.block.stop, len(self.stream.layers), hidden, sample)
        return self.stream.logits(hidden[asked][None])[0].log_softmax(-1)


def gradient_solver(
    loss: BlockLoss, soft: Mapping[str, SoftWeight], settings: Settings
) -> tuple[dict[str, QuantizedWeight], dict[str, Any]]:
    """The block after signed gradient descent, never worse on held-out samples than before; and what to report."""
    fit, held = split(len(loss.targets))
    if not held:
        return {name: s.start for name, s in soft.items()}, {"note": "one sample: nothing to judge"}
    loss.start_at({name: s.weight() for name, s in soft.items()}, held)
    found = sign_descent(soft, loss, fit, held, settings)
    moved = sum(int((found.weights[n].integers != s.start.integers).sum()) for n, s in soft.items())
    total = sum(s.start.integers.numel() for s in soft.values())
    return found.weights, {"held_out": found.losses, "moved": moved / total}


def grid_solver(
    loss: BlockLoss, soft: Mapping[str, SoftWeight]
) -> tuple[dict[str, QuantizedWeight], dict[str, Any]]:
    """The block after Q-VLM's joint search over scales, never worse on held-out samples than before."""
    block, (fit, held) = loss.block, split(len(loss.targets))
    start = {name: s.start for name, s in soft.items()}
    if not held:
        return start, {"note": "one sample: nothing to judge"}
    states: dict[tuple[int, int], dict[str, Any]] = {}

    def layer(position: int, candidate: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        index = block.start + position
        linears = block.layer_linears(index)
        if (position, candidate) not in states:
            weights = {n: soft[n].stretched(RATIOS[candidate]).weight() for n in linears}
            states[position, candidate] = loss.functions(weights)
        with torch.no_grad(), substituted(linears, states[position, candidate]):
            return [block.stream.forward(index, h, i) for h, i in zip(hidden, fit, strict=True)]

    counts = [len(RATIOS)] * (block.stop - block.start)
    search = joint_search(
        layer, counts, [block.quant_inputs[i] for i in fit], [loss.targets[i] for i in fit]
    )
    chosen = {
        name: soft[name].stretched(RATIOS[search.choice[index - block.start]])
        for index in range(block.start, block.stop)
        for name in block.layer_linears(index)
    }
    loss.start_at({name: s.weight() for name, s in soft.items()}, held)
    errors = []
    for state in (soft, chosen):
        weights = {name: s.weight() for name, s in state.items()}
        with torch.no_grad():
            errors.append(sum(float(loss(weights, i)) for i in held) / len(held))
    report = {"choice": list(search.choice), "held_out": errors}
    if errors[1] < errors[0]:
        return {name: s.quantized() for name, s in chosen.items()}, report
    return start, report
