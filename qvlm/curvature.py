"""How much the model's answers move with each token of a linear's output: the end loss's curvature, per token.

With p the float model's distribution at an answer position, the divergence KL(p || p') of a slightly changed model is
half of d' F d, d the change of the output and F the Fisher matrix

    F = sum over answer positions of  E_{k ~ p}[ grad log p_k  (grad log p_k)' ].

Its diagonal needs no sampling of answers: with independent signs e_k,

    l = sum_k e_k sqrt(p_k) log p_k,  sqrt(p_k) held constant,   E_e[ (dl/dz)^2 ] = sum_k p_k (d log p_k / dz)^2,

the cross terms between words and between positions vanish in the mean. One backward pass per sample gives the
gradients at all linears; the curvature of token n is the mean of (dl/dz[n, c])^2 over channels c.

Known as GuidedQuant's weights (Kim et al., ICML 2025, arXiv 2505.07004), there from the gradient of the loss on the
reference text; the signs are ours: where the model is sure of its answer that gradient is close to zero everywhere,
the curvature is not.

Cost: one forward and one backward pass of the model per sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.capture import Sample


def end_curvature(
    model: nn.Module, samples: Sequence[Sample], linears: Mapping[str, nn.Linear], seed: int
) -> dict[str, list[Tensor]]:
    """For each linear by name, the curvature float32 [tokens] of every sample that reaches it.

    The model's weights are left as they are and get no gradient. Samples without an answer give zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {name: [] for name in linears}
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        for sample in samples:
            outputs, logits = _forward(model, sample, linears)
            reached = list(outputs)
            loss = _signed_sum(logits, sample.answer_mask, generator)
            gradients = torch.autograd.grad(
                loss, [outputs[name] for name in reached], allow_unused=True
            )
            for name, gradient in zip(reached, gradients, strict=True):
                tokens = outputs[name].shape[:-1].numel()
                found[name].append(
                    torch.zeros(tokens)
                    if gradient is None
                    else gradient.float().square().mean(-1).reshape(-1)
                )
    finally:
        for parameter, needed in wanted:
            parameter.requires_grad_(needed)
    return found


def _forward(
    model: nn.Module, sample: Sample, linears: Mapping[str, nn.Linear]
) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of the linears that ran, all part of one graph, and the logits [1, S, vocab]."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.enable_grad():
        for name, linear in linears.items():

            def record(module: nn.Module, args: Any, output: Tensor, name: str = name) -> Tensor:
                outputs[name] = output if output.requires_grad else output.requires_grad_(True)
                return outputs[name]

            stack.callback(linear.register_forward_hook(record).remove)
        logits: Tensor = model(**sample.model_inputs()).logits
    return outputs, logits


def _signed_sum(logits: Tensor, answer_mask: Tensor, generator: torch.Generator) -> Tensor:
    """l of the module docstring over the positions that predict an answer token."""
    log_p = logits[0, :-1][answer_mask[1:]].float().log_softmax(-1)
    signs = torch.randint(0, 2, log_p.shape, generator=generator).float() * 2 - 1
    return (signs * (log_p.detach() / 2).exp() * log_p).sum()
