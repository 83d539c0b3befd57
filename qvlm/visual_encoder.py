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

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qvlm import affine
from qvlm.affine import ActivationRange
from qvlm.capture import Sample
from qvlm.fakequant import substituted
from qvlm.ranges import Rounding, simulate_weight
from qvlm.recipe import Format
from qvlm.visual_objective import Model, Settings, Targets, objective


@dataclass
class Found:
    """Optimised roundings; objective on the held-out samples of every epoch, the first before any
    step.
    """

    roundings: dict[str, Rounding]
    objective: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    steps: int = 0


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
