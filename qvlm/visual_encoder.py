"""Q-VLM's visual-encoder optimisation: gradient steps on the vision tower's clipping ranges.
Weights stay frozen.

Minimise over the clip factors of the vision tower (Eq. 10)

    L = L_reg + lambda1 L_ent + lambda2 L_err
    L_reg  cross entropy of the answer's tokens (without answers: the float model's own next token)
    L_ent  sum_k importance_k D(k, k+1) over the decoder's layers (Eq. 8; D as in ``entropy``)
    L_err  |X_q^v - X_r^v| / |X_r^v| + eta |X_q^n - X_r^n| / |X_r^n|  (Eq. 9)

where X^v enters the projector and X^n leaves the last decoder layer; q quantized, r float.

1. Float pass over the calibration set: X_r^v, X_r^n, and the hidden states' channel ranges.
2. importance_k = |dE / dX_r^(k)|, E = |X_q^n - X_r^n|, one backward pass through the float decoder
   per sample.
3. Adam on log(clip factor), batch by batch; rounding passes its gradient straight through.
4. After each epoch L on held-out calibration samples; the best state wins, the initial one
   included.

What the paper leaves open, and the reading taken here:

* Eq. 8 is printed without the minus that makes its term an entropy; minimised literally it would
  raise the entropy the paper says it lowers. The minus is used.
* "Rounding functions in the visual encoder" are updated, yet parameters are frozen: clipping ranges
  only, one factor per weight scale and one per static activation bound pair, as log factors from
  the initial range.
* Norms in Eq. 9 are divided by the float norm and the importances by their sum, so that lambda and
  eta have no unit. Adam, its rate, lambda1, lambda2, eta and the held-out share are not given: see
  ``Settings``.
* X_q^n: projector and decoder run at their initial rounding, since the search comes after this
  step.
* L_ent uses an even stride through the elements of each hidden state (``ELEMENTS``).

Source: Q-VLM (NeurIPS 2024, arXiv 2410.08119v3), section 3.3. Batch 8 and 10 epochs are the
paper's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvlm import affine, entropy
from qvlm.affine import ActivationRange
from qvlm.capture import Sample
from qvlm.fakequant import substituted
from qvlm.models.adapter import Adapter
from qvlm.ranges import Rounding, simulate_weight
from qvlm.recipe import Format

log = logging.getLogger(__name__)

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


@dataclass
class Found:
    """Optimised roundings; objective on the held-out samples of every epoch, the first before any
    step.
    """

    roundings: dict[str, Rounding]
    objective: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    steps: int = 0


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


@dataclass
class Ranges:
    """The optimised parameters of one linear: log factors on the weight's clip and on a static
    activation's range.
    """

    linear: nn.Linear
    format: Format
    start: Rounding
    weight: Tensor
    inputs: Tensor | None

    @staticmethod
    def at(linear: nn.Linear, format_: Format, start: Rounding) -> Ranges:
        """No change yet: all log factors zero."""
        inputs = None if start.inputs is None else torch.zeros_like(start.inputs.high)
        return Ranges(linear, format_, start, torch.zeros_like(start.clip), inputs)

    def parameters(self) -> list[Tensor]:
        """The tensors the optimiser moves."""
        return [self.weight] if self.inputs is None else [self.weight, self.inputs]

    def rounding(self) -> Rounding:
        """The rounding function these factors stand for."""
        inputs = self.start.inputs
        if inputs is not None and self.inputs is not None:
            factor = self.inputs.exp()
            inputs = ActivationRange(inputs.low * factor, inputs.high * factor)
        return Rounding(self.start.clip * self.weight.exp(), inputs)

    def fake_weight(self) -> Tensor:
        """The rounded weight [out, in], differentiable in the log factors."""
        scheme = self.format.weights
        assert scheme is not None, "only quantized linears have ranges"
        weight = self.linear.weight.detach()
        return affine.fake_quantize_weight(weight, scheme, clip=self.rounding().clip)


@contextmanager
def quantized(ranges: Mapping[str, Ranges], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, every linear runs with its rounded weight of ``weights`` and its activation
    rounding.
    """
    functions = {
        name: simulate_weight(
            weights[name],
            None if r.linear.bias is None else r.linear.bias.detach(),
            r.format,
            r.rounding().inputs,
        )
        for name, r in ranges.items()
    }
    with substituted({name: r.linear for name, r in ranges.items()}, functions):
        yield


def optimise(
    model: Model,
    samples: Sequence[Sample],
    targets: Targets,
    ranges: Mapping[str, Ranges],
    settings: Settings,
    progress: Callable[[int, float], None] | None = None,
) -> Found:
    """Steps 3 and 4. ``model`` must already run projector and decoder as wanted; ``ranges`` are
    moved in place.

    ``progress(epoch, held-out objective)`` is called before the first step and after every epoch.
    """
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(settings.seed))
    held = max(1, math.ceil(settings.held_out * len(samples)))
    held_out, training = order[:held].tolist(), order[held:].tolist()
    parameters = [p for r in ranges.values() for p in r.parameters()]
    adam = torch.optim.Adam(parameters, lr=settings.rate)
    found = Found({})
    best = [p.clone() for p in parameters]

    def evaluate() -> None:
        found.objective.append(_held_out(model, samples, held_out, targets, ranges, settings))
        if progress is not None:
            progress(len(found.objective) - 1, found.objective[-1]["total"])

    evaluate()
    shuffle = torch.Generator().manual_seed(settings.seed + 1)
    for epoch in range(1, settings.epochs + 1):
        shuffled = [training[i] for i in torch.randperm(len(training), generator=shuffle).tolist()]
        for start in range(0, len(shuffled), settings.batch):
            batch = shuffled[start : start + settings.batch]
            gradients = step_gradients(model, samples, batch, targets, ranges, settings)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            adam.step()
            found.steps += 1
        evaluate()
        if found.objective[-1]["total"] < found.objective[found.best]["total"]:
            found.best, best = epoch, [p.clone() for p in parameters]
        elif epoch - found.best >= settings.patience:
            break
    for parameter, value in zip(parameters, best, strict=True):
        parameter.copy_(value)
    found.roundings = {name: r.rounding() for name, r in ranges.items()}
    return found


def step_gradients(
    model: Model,
    samples: Sequence[Sample],
    batch: Sequence[int],
    targets: Targets,
    ranges: Mapping[str, Ranges],
    settings: Settings,
) -> list[Tensor]:
    """Gradient of the batch's mean objective in every parameter, sample by sample.

    Weights are rounded once for the batch: each sample's gradient goes to the rounded weights
    (leaves), and their sum goes back to the log factors at the end, so memory is that of one
    sample.
    """
    parameters = [p for r in ranges.values() for p in r.parameters()]
    inputs = [r.inputs for r in ranges.values() if r.inputs is not None]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            rounded = {name: r.fake_weight() for name, r in ranges.items()}
            leaves = {name: w.detach().requires_grad_() for name, w in rounded.items()}
            wanted = [*leaves.values(), *inputs]
            sums = [torch.zeros_like(t) for t in wanted]
            for index in batch:
                with quantized(ranges, leaves):
                    seen = model.run(samples[index])
                loss = objective(seen, targets.references[index], targets, settings)["total"]
                # A sample without an image does not reach the vision tower: its gradient is zero.
                if loss.requires_grad:
                    for total, g in zip(
                        sums, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True
                    ):
                        if g is not None:
                            total += g / len(batch)
            weights = [r.weight for r in ranges.values()]
            of_weights = torch.autograd.grad(
                list(rounded.values()), weights, sums[: len(leaves)], allow_unused=True
            )
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    from_weights = iter(of_weights)
    from_inputs = iter(sums[len(leaves) :])
    gradients: list[Tensor] = []
    for r in ranges.values():
        gradient = next(from_weights)
        gradients.append(torch.zeros_like(r.weight) if gradient is None else gradient)
        if r.inputs is not None:
            gradients.append(next(from_inputs))
    return gradients


def _held_out(
    model: Model,
    samples: Sequence[Sample],
    indices: Sequence[int],
    targets: Targets,
    ranges: Mapping[str, Ranges],
    settings: Settings,
) -> dict[str, float]:
    sums: dict[str, float] = {}
    with torch.no_grad(), quantized(ranges, {n: r.fake_weight() for n, r in ranges.items()}):
        for index in indices:
            terms = objective(
                model.run(samples[index]), targets.references[index], targets, settings
            )
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + float(term) / len(indices)
    return sums
