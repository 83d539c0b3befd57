"""What Q-VLM's visual-encoder step minimises: L of one sample, and what L needs from the float model.

The formula and what the paper leaves open: ``visual_encoder``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvlm import entropy
from qvlm.capture import Sample
from qvlm.models.adapter import Adapter

# Elements of a hidden state that enter L_ent, per sample.
ELEMENTS = 1 << 12


@dataclass(frozen=True)
class Settings:
    """lambda1 and lambda2 are ``entropy`` and ``error``; ``bits``: rounding points of D; patience:
    epochs without gain.
    """

    epochs: int = 10
    batch: int = 8
    rate: float = 2e-3
    entropy: float = 0.01
    error: float = 1.0
    eta: float = 1.0
    held_out: float = 0.125
    patience: int = 2
    bits: int = 4
    exponent: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Seen:
    """One forward of the whole model: X^v, the hidden states X^(1..n) around the decoder's layers,
    the logits.
    """

    vision: Tensor | None
    hidden: list[Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Reference:
    """What the float model gave for one sample: X_r^v, X_r^n, and the labels of L_reg as
    (positions, tokens).
    """

    vision: Tensor | None
    last: Tensor
    positions: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Targets:
    """References of all samples, channel ranges of every hidden state, importance of every decoder
    layer (sum 1).
    """

    references: list[Reference]
    ranges: list[tuple[Tensor, Tensor]]
    importance: list[float]


def relative_error(x: Tensor, reference: Tensor) -> Tensor:
    """|x - reference| / |reference|, Frobenius."""
    # The tiny constant keeps the gradient of the root finite where x equals its reference.
    distance = ((x - reference).square().sum() + 1e-20).sqrt()
    return distance / reference.square().sum().sqrt().clamp_min(1e-10)


def entropy_loss(
    hidden: Sequence[Tensor],
    ranges: Sequence[tuple[Tensor, Tensor]],
    importance: Sequence[float],
    bits: int,
    exponent: int = 2,
) -> Tensor:
    """Eq. 8 with its minus: sum over k of importance_k times the conditional entropy of hidden[k+1]
    given hidden[k].
    """
    levels = 1 << bits
    stride = max(1, hidden[0].numel() // ELEMENTS)
    total = hidden[0].new_zeros(())
    assigned = [
        entropy.soft_assignment(
            h.reshape(-1)[::stride],
            low.expand(h.shape).reshape(-1)[::stride],
            high.expand(h.shape).reshape(-1)[::stride],
            levels,
            exponent,
        )
        for h, (low, high) in zip(hidden, ranges, strict=True)
    ]
    for k, weight in enumerate(importance):
        total = total + weight * entropy.conditional_entropy(assigned[k].T @ assigned[k + 1])
    return total


def objective(
    seen: Seen, reference: Reference, targets: Targets, settings: Settings
) -> dict[str, Tensor]:
    """Eq. 10 of one sample and its three terms: total, regression, entropy, error."""
    logits = seen.logits[reference.positions]
    wide = torch.promote_types(logits.dtype, torch.float32)
    regression = F.cross_entropy(logits.to(wide), reference.tokens)
    spread = entropy_loss(
        seen.hidden, targets.ranges, targets.importance, settings.bits, settings.exponent
    )
    error = settings.eta * relative_error(seen.hidden[-1], reference.last)
    if seen.vision is not None and reference.vision is not None:
        error = error + relative_error(seen.vision, reference.vision)
    total = regression + settings.entropy * spread + settings.error * error
    return {"total": total, "regression": regression, "entropy": spread, "error": error}


class Model:
    """The whole vision-language model as a function of a sample, seen at the places the objective
    needs.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.model = model
        self.projector = model.get_submodule(adapter.projector)
        self.layers = [model.get_submodule(n) for n in adapter.layer_names(model, "text")]

    def run(self, sample: Sample, leaf: bool = False) -> Seen:
        """One forward. ``leaf``: cut the graph before the first decoder layer and start a new one
        there.
        """
        vision: list[Tensor] = []
        hidden: list[Tensor] = []

        def before_projector(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            vision.append(args[0])

        def before_layer(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
        ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]] | None:
            positional = bool(args)
            x = args[0] if positional else kwargs["hidden_states"]
            if leaf and not hidden:
                x = x.detach().requires_grad_()
            hidden.append(x)
            if positional:
                return (x, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": x}

        def after_last(
            module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]
        ) -> None:
            hidden.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            hooks = [self.projector.register_forward_pre_hook(before_projector)]
            hooks += [
                layer.register_forward_pre_hook(before_layer, with_kwargs=True)
                for layer in self.layers
            ]
            hooks.append(self.layers[-1].register_forward_hook(after_last))
            for hook in hooks:
                stack.callback(hook.remove)
            logits: Tensor = self.model(**sample.model_inputs()).logits
        return Seen(vision[0] if vision else None, hidden, logits[0])


def labels(sample: Sample, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in the logits [S, vocab] and the tokens they should predict; without an answer the
    argmax at the end.
    """
    answer = sample.answer_mask.nonzero().reshape(-1)
    answer = answer[answer > 0]
    if len(answer):
        return answer - 1, sample.input_ids[0, answer]
    last = torch.tensor([logits.shape[0] - 1])
    return last, logits[last].argmax(-1)


def reference_pass(model: Model, samples: Sequence[Sample]) -> Targets:
    """Step 1; the importances are left equal."""
    references: list[Reference] = []
    ranges: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for sample in samples:
            seen = model.run(sample)
            positions, tokens = labels(sample, seen.logits)
            references.append(Reference(seen.vision, seen.hidden[-1], positions, tokens))
            found = [entropy.channel_ranges([h]) for h in seen.hidden]
            if not ranges:
                ranges = found
            ranges = [
                (torch.minimum(a, c), torch.maximum(b, d))
                for (a, b), (c, d) in zip(ranges, found, strict=True)
            ]
    layers = len(model.layers)
    return Targets(references, ranges, [1.0 / layers] * layers)


def layer_importance(
    model: Model, samples: Sequence[Sample], quantized_last: Sequence[Tensor]
) -> list[float]:
    """Step 2: |dE / dX_r^(k)| of each decoder layer's input, mean over samples, divided by the sum
    over layers.

    ``model`` runs in float; quantized_last[i] is X_q^n of sample i. Equal importances if every
    gradient is zero.
    """
    sums = [0.0] * len(model.layers)
    with torch.enable_grad():
        for sample, last in zip(samples, quantized_last, strict=True):
            seen = model.run(sample, leaf=True)
            error = ((seen.hidden[-1] - last).square().sum() + 1e-20).sqrt()
            gradients = torch.autograd.grad(error, seen.hidden[:-1])
            sums = [s + float(g.norm()) for s, g in zip(sums, gradients, strict=True)]
    total = sum(sums)
    return [s / total for s in sums] if total > 0 else [1.0 / len(sums)] * len(sums)
