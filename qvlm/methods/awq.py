"""AWQ: channel scales chosen by what they do to the output, folded into the operation before; then clipping.

Paper: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys 2024,
arXiv 2306.00978. With option ``balance: gradient`` this is MBQ (``methods.mbq``).

Objective, for each scale pair (``models.adapter.ScalePair``) with targets W and owner f, the attention, the MLP or
the linear itself:

    min over t of  sum_n c_n | f(X; Q(W diag(s)) diag(1/s))_n - f(X; W)_n |^p,      s_j = mean|x_j|^t

A column whose input is large is made larger before rounding, so that its relative error shrinks; the others of its
group pay. n is a token, c_n its weight: c_n = 1, p = 2 for AWQ.

1. mean|x_j| of each pair's input over all tokens of the float model; for a value projection over the query heads that
   share a channel too.
2. For t = 0, 1/grid ... (grid - 1)/grid: s normalised to sqrt(max s min s) = 1, targets rounded to nearest (inputs
   too, if the format says so, with the range of x / s where it is static), error of the owner's output on
   ``search_samples`` samples. The smallest wins, ties keep the smaller t. t = 0 is s = 1.
3. All s are folded (``qvlm.fold``). Pairs do not disturb each other: s of one changes rows or norms for the other,
   never the columns it judges.
4. The methods ``awq`` and ``mbq`` then go layer by layer: each group's clipping factor by the error of the linear's
   output on the quantized stream (``ranges.output_clip``), then round to nearest.

What we do differently: the clip search sees the cross terms between groups and runs for q and k as well; a linear
without a pair (``Adapter.unfolded``) is clipped only and the report names it.

Cost: step 2 runs every owner ``grid`` times on ``search_samples`` samples and keeps its inputs of one layer for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qvlm import affine
from qvlm.affine import ActivationRange
from qvlm.capture import capture_stream, linear_inputs
from qvlm.errors import CalibrationError, RecipeError
from qvlm.fakequant import substituted
from qvlm.fold import Point, fold_scales, points, unfolded
from qvlm.methods import rtn
from qvlm.methods.mbq import gradient_ratios
from qvlm.methods.method import Block, BlockResult, Context, State
from qvlm.modality import image_tokens
from qvlm.models.adapter import Adapter
from qvlm.progress import Progress
from qvlm.ranges import Rounding, initial_weight, observe, quantize, simulate_weight
from qvlm.recipe import Format, Recipe

OPTIONS: Mapping[str, Any] = {
    "grid": 20,
    "search_samples": 32,  # 0: all
    "balance": "none",  # none, gradient
    "clip": "search",  # search, max
}
BALANCED: Mapping[str, Any] = {**OPTIONS, "balance": "gradient"}  # MBQ's defaults
# Smallest s before it is normalised, as AWQ has it: a channel that is zero on all samples must not stop the others.
SMALLEST = 1e-4


def channel_scale(mean: Tensor, exponent: float) -> Tensor:
    """s [channels] of step 2 from mean|x_j| [channels], float32 and positive; exactly one for exponent 0."""
    s = mean.double().pow(exponent).clamp(min=SMALLEST)
    return (s / (s.max() * s.min()).sqrt()).float()


def weighted_error(found: Tensor, target: Tensor, weights: Tensor, power: float) -> float:
    """sum_n c_n sum_channels |found - target|^power; outputs [..., tokens, channels], c [tokens in all], float64."""
    rows = (found - target).double().abs().pow(power).sum(-1).reshape(-1)
    return float(rows @ weights.double())


@dataclass
class _Call:
    """What an owner got and gave on one sample; the mask of image tokens and c [tokens]."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    image: Tensor
    weights: Tensor

    def again(self, owner: nn.Module) -> Tensor:
        """What the owner gives now."""
        with image_tokens(self.image):
            return _first(owner(*self.args, **self.kwargs))


class ScaleSearch:
    """The transforms ``awq`` and ``mbq``: steps 1 to 3."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options

    def _option(self, recipe: Recipe, key: str) -> Any:
        return recipe.options.get(key, self.options[key])

    def check(self, model: nn.Module, adapter: Adapter, recipe: Recipe) -> None:
        """The options."""
        for key, least in (("grid", 1), ("search_samples", 0)):
            if not isinstance(value := self._option(recipe, key), int) or value < least:
                raise RecipeError(
                    f"option {key}: {value!r}, expected an integer of at least {least}"
                )
        for key, known in (("balance", ("none", "gradient")), ("clip", ("search", "max"))):
            if self._option(recipe, key) not in known:
                raise RecipeError(
                    f"option {key}: {self._option(recipe, key)!r}, expected {' or '.join(known)}"
                )

    def find(self, context: Context, progress: Progress) -> State:
        """Steps 1 and 2: s and the chosen t of each pair, by the source's name."""
        balanced = self._option(context.recipe, "balance") == "gradient"
        ratios: dict[str, float] = {}
        if balanced and "text" in context.formats:
            ratios = gradient_ratios(context, progress)
        state: dict[str, Any] = {}
        for component, formats in context.formats.items():
            found = points(context.model, context.adapter, component, formats)
            if not found:
                continue
            search = _Search(context, component, self._settings(context.recipe), ratios, balanced)
            for point, scale, exponent in search.run(found, progress):
                state[point.source] = scale.numpy()
                state[f"exponent/{point.source}"] = np.array(exponent)
        state.update({f"ratio/{name}": np.array(ratio) for name, ratio in ratios.items()})
        return state

    def _settings(self, recipe: Recipe) -> tuple[int, int]:
        return self._option(recipe, "grid"), self._option(recipe, "search_samples")

    def apply(self, context: Context, state: State) -> dict[str, Any]:
        """Step 3."""
        report: dict[str, Any] = {"exponents": {}, "unfolded": {}}
        for component, formats in context.formats.items():
            found = points(context.model, context.adapter, component, formats)
            fold_scales(context.model, found, state)
            exponents = {p.source: float(state[f"exponent/{p.source}"]) for p in found}
            report["exponents"].update(exponents)
            report["unfolded"].update(unfolded(context.adapter, formats, found))
        ratios = {key[6:]: float(state[key]) for key in state if key.startswith("ratio/")}
        return {**report, "ratios": ratios} if ratios else report


class _Search:
    """Steps 1 and 2 on one component."""

    def __init__(
        self,
        context: Context,
        component: str,
        settings: tuple[int, int],
        ratios: Mapping[str, float],
        balanced: bool,
    ) -> None:
        self.context, self.component = context, component
        self.grid, self.count = settings
        self.ratios, self.power = ratios, 1.0 if balanced else 2.0
        self.stream = capture_stream(context.model, context.adapter, component, context.samples)
        self.stream.expect_inputs()

    def run(self, found: Sequence[Point], progress: Progress) -> list[tuple[Point, Tensor, float]]:
        """(point, s, t) of every point; the stream goes through the float layers once."""
        chosen = []
        hidden = self.stream.inputs
        for index in range(len(self.stream.layers)):
            progress(f"scales {self.component}", index, len(self.stream.layers))
            here = [p for p in found if p.index == index]
            hidden = self.stream.entering(index, hidden)
            for point in here:
                means, calls = self._observe(point, hidden)
                chosen.append((point, *self._best(point, means, calls)))
            with torch.no_grad():
                hidden = [self.stream.forward(index, h, i) for i, h in enumerate(hidden)]
        progress(f"scales {self.component}", len(self.stream.layers), len(self.stream.layers))
        return chosen

    def _observe(self, point: Point, hidden: Sequence[Tensor]) -> tuple[Tensor, list[_Call]]:
        """Step 1: mean|x_j| [in] over all samples; the owner's calls on the first ``search_samples``."""
        model, stream = self.context.model, self.stream
        total, tokens, calls = torch.zeros(0), 0, list[_Call]()
        first = {"x": model.get_submodule(point.targets[0])}
        for sample, state in enumerate(hidden):
            with ExitStack() as stack:
                if not self.count or sample < self.count:
                    image = stream.image_masks[sample]
                    record = _recorder(calls, image, self._weights(point, image))
                    owner = model.get_submodule(point.owner)
                    hook = owner.register_forward_hook(record, with_kwargs=True)
                    stack.callback(hook.remove)
                seen, _ = linear_inputs(stream, point.index, first, state, sample)
            rows = seen["x"].reshape(-1, seen["x"].shape[-1])
            amount = rows.abs().double().sum(0)
            total = amount if not tokens else total + amount
            tokens += len(rows)
        return total / tokens, calls

    def _weights(self, point: Point, image: Tensor) -> Tensor:
        """c of a sample's tokens [tokens]."""
        image = image.reshape(-1)
        ones = torch.ones(len(image))
        ratio = self.ratios.get(point.branch(self.stream.names[point.index]), 1.0)
        return torch.where(image, ratio * ones, ones)

    def _best(self, point: Point, means: Tensor, calls: Sequence[_Call]) -> tuple[Tensor, float]:
        """Step 2: s [channels] and t."""
        mean = point.gathered(means).mean(1)
        best, scale, chosen = torch.inf, torch.ones(0), 0.0
        for step in range(self.grid):
            exponent = step / self.grid
            candidate = channel_scale(mean, exponent)
            error = self._error(point, candidate, calls)
            if error < best:
                best, scale, chosen = error, candidate, exponent
        if not len(scale):
            raise CalibrationError(
                f"{point.source}: the error of its outputs is not finite. Look for an overflow in the float model on "
                "these samples."
            )
        return scale, chosen

    @torch.no_grad()
    def _error(self, point: Point, scale: Tensor, calls: Sequence[_Call]) -> float:
        """The objective for one s."""
        model, formats = self.context.model, self.context.formats[self.component]
        linears: dict[str, nn.Linear] = {}
        for name in point.targets:
            module = model.get_submodule(name)
            assert isinstance(module, nn.Linear)
            if name in formats:
                linears[name] = module
        columns = point.spread(scale)
        ranges = self._ranges(point, linears, columns, calls)
        trial = {
            name: scaled_linear(linear, formats[name], columns, ranges.get(name))
            for name, linear in linears.items()
        }
        owner, total = model.get_submodule(point.owner), 0.0
        with substituted(linears, trial):
            for call in calls:
                total += weighted_error(call.again(owner), call.output, call.weights, self.power)
        return total

    def _ranges(
        self,
        point: Point,
        linears: Mapping[str, nn.Linear],
        columns: Tensor,
        calls: Sequence[_Call],
    ) -> dict[str, ActivationRange]:
        """Ranges of x / s for static inputs."""
        static = rtn.static_linears(linears, self.context.formats[self.component])
        ranges: dict[str, ActivationRange] = {}
        owner = self.context.model.get_submodule(point.owner)
        for call in calls if static else ():
            for name, x in _inputs(owner, static, call).items():
                scheme = self.context.formats[self.component][name].activations
                assert scheme is not None
                found = affine.activation_range(x / columns, scheme, call.image)
                ranges[name] = found.union(ranges[name]) if name in ranges else found
        return ranges


def scaled_linear(
    linear: nn.Linear, format_: Format, columns: Tensor, inputs: ActivationRange | None
) -> Callable[[Tensor], Tensor]:
    """The linear as it will compute with s folded, rounded to nearest: Q(W diag(s)) on the input x / s [..., in]."""
    assert format_.weights is not None
    weight = affine.fake_quantize_weight(linear.weight * columns, format_.weights)
    run = simulate_weight(weight, linear.bias, format_, inputs)
    return lambda x: run(x / columns)


def _recorder(calls: list[_Call], image: Tensor, weights: Tensor) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_Call(args, kwargs, _first(output).detach(), image, weights))

    return record


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _inputs(owner: nn.Module, linears: Mapping[str, nn.Linear], call: _Call) -> dict[str, Tensor]:
    """What the linears read during one call of their owner."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, linear in linears.items():

            def record(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                seen[name] = args[0]

            stack.callback(linear.register_forward_pre_hook(record).remove)
        call.again(owner)
    return seen


# -- step 4


class ClipSearch(rtn.RoundToNearest):
    """The methods ``awq`` and ``mbq`` behind their transforms: step 4."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options

    def quantize_block(self, block: Block, recipe: Recipe, state: State) -> BlockResult:
        """Each linear on its own."""
        if recipe.options.get("clip", self.options["clip"]) == "max":
            return super().quantize_block(block, recipe, state)
        linears = block.layer_linears(block.start)
        observed, _ = observe(
            block.stream, block.start, linears, block.formats, block.quant_inputs, 2.0, "output"
        )
        ranges = rtn.input_ranges(block, block.start, block.quant_inputs)
        results, clips = {}, {}
        for name, linear in linears.items():
            clip = initial_weight(linear.weight, block.formats[name], observed[name], "output")
            results[name] = quantize(linear, block.formats[name], Rounding(clip, ranges.get(name)))
            clips[name] = float(clip.mean())
        return BlockResult(results, {"mean_clip": clips})
