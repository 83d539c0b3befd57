"""GPTAQ: GPTQ that aims at the float stream's output, not only at its own input's.

Paper: Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", ICML 2025,
arXiv 2504.02692.

Objective, with F the linear's inputs on the float stream and U those on the quantized stream [tokens, in]:

    min over integers Q of  | Q U' - W F' |^2

GPTQ replaces F by U and so corrects its own rounding only; here a later column also makes up for what the layers
before did to the inputs of the columns already fixed.

1. Stages, scales, order and factor as in ``methods.gptq`` (its steps 1 to 5), and D = (F - U)'U beside H = U'U.
2. P = alpha strict_upper(D R') R. Row q of it is alpha D[q, later] (H[later, later])^-1: the shift of the later
   columns that best reproduces w_q (f_q - u_q) in the least-squares sense.
3. In the sweep column i moves every later column j by - e R_ij + w_i P_ij (``gptq.gptq_matrix``).

alpha: D is a sample estimate of in^2 numbers, and the full correction (alpha = 1) fits its noise when tokens are few.
On held-out data alpha = 1 loses against plain GPTQ at about 12 tokens per input channel, where 0.25 (the authors'
constant) wins, and wins at about 60. Option alpha "auto" therefore is rho / (rho + 36) with rho = tokens / in: a
shrinkage whose strength is set by 0.25 at rho = 12.

What we do differently: alpha as above; the un-rounded column enters P in the whole sweep (the authors' code takes
the rounded one beyond the block of columns), so that the result does not depend on ``columns``.

Cost: GPTQ's plus one float forward per stage and sample, and in^2 numbers for D.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvlm.errors import RecipeError
from qvlm.hessian import Statistics
from qvlm.methods import gptq
from qvlm.methods.method import Block, BlockResult, State
from qvlm.methods.stages import StagedLayer
from qvlm.recipe import Recipe

OPTIONS: Mapping[str, Any] = {**gptq.OPTIONS, "alpha": "auto"}
# Tokens per input channel at which half of the correction is applied.
HALF_CORRECTION = 36.0


def check_alpha(recipe: Recipe) -> str | float:
    """The option alpha: "auto" or a number in [0, 1]; RecipeError otherwise."""
    alpha = recipe.options.get("alpha", OPTIONS["alpha"])
    if alpha == "auto":
        return "auto"
    if not isinstance(alpha, (int, float)) or not 0.0 <= alpha <= 1.0:
        raise RecipeError(f"option alpha: {alpha!r}, expected auto or a number in [0, 1]")
    return float(alpha)


def tied_alpha(alpha: str | float, statistics: Statistics) -> float:
    """The number ``alpha``, or for "auto" the share that so many (effective) tokens per channel support."""
    if not isinstance(alpha, str):
        return alpha
    per_channel = statistics.effective_tokens / len(statistics.hessian)
    return per_channel / (per_channel + HALF_CORRECTION)


class Gptaq(gptq.Gptq):
    """The method ``gptaq``."""

    options: Mapping[str, Any] = OPTIONS

    def check(self, recipe: Recipe) -> None:
        """RecipeError for a value that makes no sense."""
        check_alpha(recipe)
        super().check(recipe)

    def quantize_block(self, block: Block, recipe: Recipe, state: State) -> BlockResult:
        """Each stage with H and D."""
        settings, layer = gptq.Settings.of(recipe), StagedLayer(block)
        rows = {}
        for names in layer.stages:
            rows.update(quantize_stage(layer, names, settings, check_alpha(recipe)))
        return BlockResult(layer.results, {"linears": rows})


def quantize_stage(
    layer: StagedLayer, names: list[str], settings: gptq.Settings, alpha: str | float
) -> dict[str, dict[str, Any]]:
    """Quantize one stage of a layer; a report row per linear."""
    statistics = layer.statistics(names, asymmetric=True)
    shares = {name: tied_alpha(alpha, sums) for name, sums in statistics.items()}
    rows = gptq.solve(layer, statistics, settings, shares)
    return {name: {**row, "alpha": shares[name]} for name, row in rows.items()}
