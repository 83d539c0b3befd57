"""The rounding function of one linear as a clipping range, where it starts, and its candidates. No
search, no model.

A rounding function is a uniform quantizer whose free parameter is its range: for the weight a
factor on each group's own maximum, for a static activation a lowest and a highest value. Q-VLM's
search and its visual-encoder step move nothing else.

Initial ranges. The paper: "following QLoRA", minimise an l_p distance between float and quantized
activations, p not given (its code uses 0.5). ``init`` says how that is read for a weight:

    output    |X (W - Q(W))^T|^2, the l_2 distance of the activations the linear gives, from X^T X;
              the groups of a row take their factors in turn, given the others, ``SWEEPS`` times
    lp        sum_c E[|x_c|^p] |w_c - Q(w_c)|^p over a group's columns c: as if columns were
              independent
    lp-plain  sum_c |w_c - Q(w_c)|^p
    minmax    no search: the group's own range, as round to nearest

"output" needs groups; a weight with one scale per row or tensor takes "lp" instead (at 8 bits they
agree closely, and the cost per row is quadratic in the columns). A static activation takes the
shrink factor that minimises sum |x - Q(x)|^p over the observed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvlm import affine, modality
from qvlm.affine import ActivationRange
from qvlm.capture import Stream, linear_inputs
from qvlm.checkpoint import QuantizedLinear
from qvlm.errors import RecipeError
from qvlm.recipe import ActivationScheme, Format, WeightScheme

# Tokens of a linear's input kept for percentiles; the exact minimum and maximum are kept of all
# tokens.
TOKENS = 8192
# Factors on the maximum tried for the initial range: 1.0, 0.98 ... 0.4.
INITIAL_FACTORS = tuple(1.0 - 0.02 * i for i in range(31))
# Rounds over a row's groups in ``output_clip``.
SWEEPS = 2
INITS = ("output", "lp", "lp-plain", "minmax")
# Weight elements quantized at a time in the initial search: 16 MiB of float32.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Rounding:
    """Rounding function of one linear: ``clip`` [out, groups] ([1, 1] per tensor) multiplies each
    group's own range;
    ``inputs`` is a static activation's range, None if its activations are float or dynamic."""

    clip: Tensor
    inputs: ActivationRange | None = None

    def scaled(self, clip: float) -> Rounding:
        """The same with every weight range multiplied by ``clip``."""
        return Rounding(self.clip * clip, self.inputs)

    def at_least(self, clip: float) -> Rounding:
        """The same with no weight range clipped below ``clip`` of the full one."""
        return Rounding(self.clip.clamp(min=clip), self.inputs)


@dataclass
class Observed:
    """What one linear saw: sums of |x|^norm per input channel, and tokens [n, in] for ranges if
    they are wanted.
    """

    norm: float
    keep: int = 0  # tokens to keep of each sample; 0: none
    products: bool = False  # keep X^T X
    power_sum: Tensor | None = None
    gram: Tensor | None = None  # [in, in]
    tokens: list[Tensor] = field(default_factory=list)
    low: Tensor | None = None
    high: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in one sample's input [..., in]."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        powers = rows.abs().pow(self.norm).sum(0)
        self.power_sum = powers if self.power_sum is None else self.power_sum + powers
        if self.products:
            gram = rows.T @ rows
            self.gram = gram if self.gram is None else self.gram + gram
        if not self.keep:
            return
        low, high = rows.amin(0), rows.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.tokens.append(rows[:: max(1, rows.shape[0] // self.keep)].clone())

    def percentile(self, scheme: ActivationScheme, p: float) -> ActivationRange:
        """Range whose bounds are percentiles of the observed values, each channel or all channels
        together.

        p = 1: minimum and maximum of all tokens. Below: the symmetric scheme takes the p-quantile
        of |x| on both sides, the asymmetric one the (1-p)- and the p-quantile of x.
        """
        if self.low is None or self.high is None:
            raise RecipeError("activation range: nothing was observed")
        low, high = self.low, self.high
        if scheme.granularity == "tensor":
            low, high = low.min().reshape(1), high.max().reshape(1)
        if p >= 1.0:
            return ActivationRange(low, high)
        rows = torch.cat(self.tokens)
        if scheme.granularity == "tensor":
            rows = rows.reshape(-1, 1)
        if scheme.symmetric:
            bound = _quantile(rows.abs(), p)
            return ActivationRange(-bound, bound)
        return ActivationRange(_quantile(rows, 1.0 - p), _quantile(rows, p))


def _quantile(rows: Tensor, p: float) -> Tensor:
    """The p-quantile of each column (nearest rank), without torch.quantile's limit of 2^24
    elements.
    """
    count = rows.shape[0]
    rank = min(count, max(1, round(p * (count - 1)) + 1))
    return rows.kthvalue(rank, dim=0).values


def observe(
    stream: Stream,
    index: int,
    linears: Mapping[str, nn.Linear],
    formats: Mapping[str, Format],
    hidden: Sequence[Tensor],
    norm: float,
    init: str = "lp",
) -> tuple[dict[str, Observed], list[Tensor]]:
    """Run float layer ``index`` on a hidden state per sample: what its linears saw, and the layer's
    outputs.
    """
    keep = max(1, TOKENS // max(1, len(hidden)))
    seen = {
        name: Observed(
            norm,
            keep if _static(formats[name]) is not None else 0,
            init == "output" and _grouped(formats[name]),
        )
        for name in linears
    }
    outputs: list[Tensor] = []
    for sample, h in enumerate(hidden):
        inputs, output = linear_inputs(stream, index, linears, h, sample)
        for name, x in inputs.items():
            seen[name].add(x)
        outputs.append(output.detach())
    return seen, outputs


def _static(format_: Format) -> ActivationScheme | None:
    return format_.activations if format_.activations and format_.activations.static else None


def _grouped(format_: Format) -> bool:
    return format_.weights is not None and format_.weights.granularity == "group"


def output_clip(weight: Tensor, scheme: WeightScheme, gram: Tensor) -> Tensor:
    """Factor [out, groups] on each group's range with the least |X (w - Q(w))|^2, ``gram`` = X^T X.

    Coordinate descent from the full ranges over groups; every step takes the best of
    ``INITIAL_FACTORS`` for each row, so the distance never rises. Ties keep the larger factor.
    """
    whole = affine.fake_quantize_weight(weight, scheme) - weight
    errors = affine.grouped(whole, scheme).clone()  # [out, groups, columns]
    out, groups, columns = errors.shape
    factors = torch.ones(out, groups)
    one = replace(scheme, granularity="channel", group_size=None)
    for _ in range(SWEEPS):
        for group in range(groups):
            part = slice(group * columns, (group + 1) * columns)
            errors[:, group] = 0
            pull = errors.reshape(out, -1) @ gram[:, part]  # from the other groups
            best = torch.full((out,), torch.inf)
            chosen = torch.zeros(out, columns)
            for factor in INITIAL_FACTORS:
                error = affine.fake_quantize_weight(weight[:, part], one, clip=factor)
                error -= weight[:, part]
                cost = ((error @ gram[part, part] + 2 * pull) * error).sum(1)
                better = cost < best
                best = torch.where(better, cost, best)
                factors[better, group] = factor
                chosen[better] = error[better]
            errors[:, group] = chosen
    return factors


def initial_clip(
    weight: Tensor, scheme: WeightScheme, importance: Tensor | None, norm: float
) -> Tensor:
    """Factor [out, groups] ([1, 1] per tensor) on each group's range with the least l_p distance
    (module docstring).

    importance [in] weighs the columns (None: all alike). Ties keep the larger factor.
    """
    columns = torch.ones(weight.shape[1]) if importance is None else importance.float()
    if float(columns.sum()) <= 0:
        columns = torch.ones_like(columns)
    if scheme.granularity == "tensor":
        return _best_factor(weight, scheme, columns, norm)
    rows = max(1, CHUNK // weight.shape[1])
    parts = (weight[start : start + rows] for start in range(0, weight.shape[0], rows))
    return torch.cat([_best_factor(part, scheme, columns, norm) for part in parts])


def _best_factor(weight: Tensor, scheme: WeightScheme, columns: Tensor, norm: float) -> Tensor:
    best: Tensor | None = None
    factors: Tensor | None = None
    for factor in INITIAL_FACTORS:
        error = (affine.fake_quantize_weight(weight, scheme, clip=factor) - weight).abs()
        cost = affine.grouped(error.pow(norm) * columns, scheme).sum(-1)  # [out, groups]
        if scheme.granularity == "tensor":
            cost = cost.sum().reshape(1, 1)
        if best is None or factors is None:
            best, factors = cost, torch.full_like(cost, factor)
        better = cost < best
        best = torch.where(better, cost, best)
        factors = torch.where(better, torch.full_like(cost, factor), factors)
    assert factors is not None
    return factors


def initial_range(observed: Observed, scheme: ActivationScheme, norm: float) -> ActivationRange:
    """Range of a static activation: the observed minimum and maximum times the factor of least l_p
    distance.
    """
    full = observed.percentile(scheme, 1.0)
    rows = torch.cat(observed.tokens)
    best: Tensor | None = None
    chosen = full
    for factor in INITIAL_FACTORS:
        low, high = full.low * factor, full.high * factor
        scale, zero = affine.activation_parameters(low, high, scheme)
        error = (affine.fake_quantize_activation(rows, scheme, scale, zero) - rows).abs().pow(norm)
        cost = error.sum(0)
        if scheme.granularity == "tensor":
            cost = cost.sum().reshape(1)
        if best is None:
            best = cost
            continue
        better = cost < best
        best = torch.where(better, cost, best)
        chosen = ActivationRange(
            torch.where(better, low, chosen.low), torch.where(better, high, chosen.high)
        )
    return chosen


def initial_weight(weight: Tensor, format_: Format, observed: Observed, init: str) -> Tensor:
    """Where a weight's clip starts. init: "lp" (module docstring), "lp-plain" (columns alike),
    "minmax" (all ones).
    """
    scheme = _weights(format_)
    weight = weight.detach().float()
    if init == "minmax":
        return torch.ones_like(affine.weight_range(weight, scheme)[0])
    if init not in INITS:
        raise RecipeError(f"option init: {init!r}, expected one of {', '.join(INITS)}")
    if observed.gram is not None and init == "output":
        return output_clip(weight, scheme, observed.gram)
    importance = None if init == "lp-plain" else observed.power_sum
    return initial_clip(weight, scheme, importance, observed.norm)


def initial_inputs(format_: Format, observed: Observed, init: str) -> ActivationRange | None:
    """Where a static activation's range starts; None if the format has none."""
    activations = _static(format_)
    if activations is None:
        return None
    if init == "minmax":
        return observed.percentile(activations, 1.0)
    return initial_range(observed, activations, observed.norm)


def _weights(format_: Format) -> WeightScheme:
    if format_.weights is None:
        raise RecipeError(
            f"format {format_.name!r} quantizes no weight, so it has no range to choose"
        )
    return format_.weights


def simulate(linear: nn.Linear, format_: Format, rounding: Rounding) -> Callable[[Tensor], Tensor]:
    """The linear under this rounding function, as a function of its input; the weight is rounded
    once, here.
    """
    with torch.no_grad():
        weight = affine.fake_quantize_weight(
            linear.weight.detach(), _weights(format_), clip=rounding.clip
        )
    bias = None if linear.bias is None else linear.bias.detach()
    return simulate_weight(weight, bias, format_, rounding.inputs)


def simulate_weight(
    weight: Tensor, bias: Tensor | None, format_: Format, inputs: ActivationRange | None
) -> Callable[[Tensor], Tensor]:
    """A linear with this (already rounded) weight and the format's activation rounding.
    Differentiable.
    """
    activations = format_.activations
    scale: Tensor | None = None
    zero: Tensor | None = None
    if activations is not None and inputs is not None:
        scale, zero = affine.activation_parameters(inputs.low, inputs.high, activations)

    def run(x: Tensor) -> Tensor:
        if activations is not None:
            split = activations.granularity == "modality"
            image = modality.current(x) if split else None
            x = affine.fake_quantize_activation(x, activations, scale, zero, image)
        return F.linear(x, weight, bias)

    return run


def quantize(linear: nn.Linear, format_: Format, rounding: Rounding) -> QuantizedLinear:
    """The linear's integers and scales under this rounding function."""
    weight = linear.weight.detach().float()
    found = affine.quantize_weight(weight, _weights(format_), clip=rounding.clip)
    scale = zero = None
    if format_.activations is not None and rounding.inputs is not None:
        inputs = rounding.inputs
        scale, zero = affine.activation_parameters(inputs.low, inputs.high, format_.activations)
    return QuantizedLinear(
        found.integers.numpy(),
        found.scale.numpy(),
        format_,
        None if found.zero_point is None else found.zero_point.numpy(),
        None if scale is None else scale.float().numpy(),
        None if zero is None else zero.to(torch.int32).numpy(),
    )
