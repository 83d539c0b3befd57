"""SmoothQuant: move the size of outlier channels from a linear's input into its weight, then round to nearest.

Paper: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
ICML 2023, arXiv 2211.10438.

One scale for a whole input (or token) is set by its largest channel; a weight has a scale per output row, so its
columns may differ at little cost. With x_j an input channel and W_j the columns that read it,

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha),      x_j / s_j,      W_j s_j

alpha = 1 makes all input channels equally large, alpha = 0 all columns; 0.5 gives both the size sqrt(max|x| max|W|).

1. max|x_j| of every scale pair's input over all calibration tokens, on the float model; max|W_j| over the pair's
   linears together.
2. s of every pair, folded into the operation before (``qvlm.fold``).
3. The method ``smoothquant`` then is round to nearest.

What we do differently: all pairs that an architecture has, not only the two behind norms; for a value projection the
maxima run over the query heads that share a channel; linears that keep float inputs (weight-only formats) are left
alone, where no input is rounded there is nothing to gain; a channel that is zero on all samples, or whose columns
are, keeps s = 1.

Cost: one forward per sample and component.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.capture import capture_stream, linear_inputs
from qvlm.errors import RecipeError
from qvlm.fold import Point, fold_scales, points, unfolded
from qvlm.methods.method import Context, State
from qvlm.models.adapter import Adapter
from qvlm.progress import Progress
from qvlm.recipe import Recipe

OPTIONS: Mapping[str, Any] = {"alpha": 0.5}


def smoothing_scale(inputs: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """s [channels] from max|x_j| and max|W_j| [channels]; float32, positive."""
    x, w = inputs.double(), columns.double()
    live = (x > 0) & (w > 0)
    ones = torch.ones_like(x)
    x, w = torch.where(live, x, ones), torch.where(live, w, ones)
    return (x.pow(alpha) / w.pow(1.0 - alpha)).float()


class Smoothing:
    """The transform ``smoothquant``."""

    options: Mapping[str, Any] = OPTIONS

    def check(self, model: nn.Module, adapter: Adapter, recipe: Recipe) -> None:
        """The option alpha."""
        alpha = recipe.options.get("alpha", OPTIONS["alpha"])
        if not isinstance(alpha, (int, float)) or not 0.0 <= alpha <= 1.0:
            raise RecipeError(f"option alpha: {alpha!r}, expected a number in [0, 1]")

    def find(self, context: Context, progress: Progress) -> State:
        """Steps 1 and 2: s by the source's name."""
        alpha = float(context.recipe.options.get("alpha", OPTIONS["alpha"]))
        scales = {}
        for number, component in enumerate(context.formats):
            progress("smoothquant", number, len(context.formats))
            found = smoothed_points(context, component)
            inputs = _largest_inputs(context, component, found)
            for point in found:
                columns = _largest_columns(context.model, point)
                x, w = (point.gathered(m).amax(1) for m in (inputs[point.source], columns))
                scales[point.source] = smoothing_scale(x, w, alpha).numpy()
        progress("smoothquant", len(context.formats), len(context.formats))
        return scales

    def apply(self, context: Context, state: State) -> dict[str, Any]:
        """Fold every s."""
        report: dict[str, Any] = {"spread": {}, "unfolded": {}}
        for component, formats in context.formats.items():
            found = smoothed_points(context, component)
            report["spread"].update(fold_scales(context.model, found, state))
            wanted = [name for name, f in formats.items() if f.activations is not None]
            report["unfolded"].update(unfolded(context.adapter, wanted, found))
        return report


def smoothed_points(context: Context, component: str) -> list[Point]:
    """The pairs of a component with a linear whose input is rounded."""
    formats = context.formats[component]
    rounded = [name for name, format_ in formats.items() if format_.activations is not None]
    return points(context.model, context.adapter, component, rounded)


def _largest_inputs(context: Context, component: str, found: Sequence[Point]) -> dict[str, Tensor]:
    """max|x_j| [in] over all samples of what each point's targets read, by the source's name."""
    if not found:
        return {}
    largest: dict[str, Tensor] = {}
    stream = capture_stream(context.model, context.adapter, component, context.samples)
    stream.expect_inputs()
    for sample, hidden in enumerate(stream.inputs):
        for index in range(len(stream.layers)):
            wanted = {p.source: p.targets[0] for p in found if p.index == index}
            linears = {s: context.model.get_submodule(name) for s, name in wanted.items()}
            seen, hidden = linear_inputs(stream, index, linears, hidden, sample)
            for source, x in seen.items():
                high = x.abs().reshape(-1, x.shape[-1]).amax(0)
                largest[source] = torch.maximum(largest.get(source, high), high)
    return largest


def _largest_columns(model: nn.Module, point: Point) -> Tensor:
    """max|W_j| [in] over the point's targets."""
    weights = [model.get_parameter(f"{name}.weight").detach() for name in point.targets]
    return torch.cat(weights).abs().amax(0)
