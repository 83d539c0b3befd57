"""GPTQ: round a weight column by column, each time moving the rounding error to the columns still to come.

Paper: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023,
arXiv 2210.17323. The update with D is GPTAQ's (``methods.gptaq``); the kernel here does both.

Objective, for each linear with weight W and calibration inputs U [tokens, in] on the quantized stream:

    min over integers Q of  | (Q - W) U' |^2  =  tr (Q - W) H (Q - W)',   H = U'U

1. The layer's linears in the order they run, those that share an input together (a stage: q, k, v; o; gate, up;
   down). H is measured with the stages before already quantized, on inputs as the quantized model rounds them.
2. Scales are fixed before any weight moves (static groups): per group the clipping factor that minimises
   sum_c H_cc (w_c - Q(w_c))^2, or the plain maximum (option ``scales``).
3. H_ii of a channel that is always zero becomes the mean of the others: it is rounded and nothing else.
4. Optional ``act_order``: process columns by falling H_ii. Integers and groups keep the original order.
5. R upper with R'R = (H + damping mean(diag H) I)^-1.
6. For each column i: q = round(w_i / s_i); e = (w_i - q s_i) / R_ii; every later column j moves by - e R_ij. Within
   ``columns`` columns at once, beyond them in one product per block of columns.

What we do differently: scales are searched by the diagonal of H; dead channels keep their rounded weights (the usual
zero would hurt on inputs that calibration did not show); sums, factor and sweep are float64, so that integers do not
depend on how a BLAS orders its sums; the result does not depend on ``columns``.

Cost: per stage one forward per sample; H needs 8 in^2 bytes; the sweep out in^2 multiplications.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvlm import affine
from qvlm.affine import QuantizedWeight
from qvlm.capture import Stream
from qvlm.errors import RecipeError
from qvlm.hessian import Factored, Statistics, factored
from qvlm.methods.method import Block, BlockResult, Context, State
from qvlm.methods.stages import StagedLayer
from qvlm.ranges import initial_clip
from qvlm.recipe import Recipe, WeightScheme

OPTIONS: Mapping[str, Any] = {
    "scales": "search",  # search, max
    "damping": 0.01,  # share of mean(diag H)
    "columns": 128,  # columns swept before the rest is updated
    "act_order": True,
}


@dataclass(frozen=True)
class Settings:
    """The options of ``gptq_matrix``; RecipeError on a value that makes no sense."""

    scales: str = "search"
    damping: float = 0.01
    columns: int = 128
    act_order: bool = True

    def __post_init__(self) -> None:
        if self.scales not in ("search", "max"):
            raise RecipeError(f"option scales: {self.scales!r}, expected search or max")
        if not 0 < self.damping < 1:
            raise RecipeError(f"option damping: {self.damping!r}, expected a number in (0, 1)")
        if self.columns < 1:
            raise RecipeError(f"option columns: {self.columns!r}, expected at least 1")

    @staticmethod
    def of(recipe: Recipe) -> Settings:
        """The recipe's values over the defaults."""
        chosen = {key: recipe.options.get(key, default) for key, default in OPTIONS.items()}
        return Settings(**chosen)

    def factored(self, hessian: Tensor, shrinkage: float = 0.0) -> Factored:
        """Steps 3 to 5 for H [in, in], once for all linears that share their inputs."""
        return factored(hessian, self.damping, self.act_order, shrinkage)


@dataclass(frozen=True)
class Solution:
    """Integers of one weight, the damping that was needed and the number of dead input channels."""

    quantized: QuantizedWeight
    damping: float
    dead: int


def gptq_matrix(
    weight: Tensor,
    hessian: Tensor | Factored,
    scheme: WeightScheme,
    settings: Settings = Settings(),
    *,
    cross: Tensor | None = None,
    alpha: float = 1.0,
    scales: tuple[Tensor, Tensor | None] | None = None,
) -> Solution:
    """Quantize a weight [out, in] given H [in, in], or what ``settings.factored`` made of it. Steps 2 to 6.

    cross: D [in, in] of ``hessian.Statistics``, then each column also moves the later ones towards the float stream's
    output, by ``alpha`` of the full correction (GPTAQ). Without it, or with D = 0, this is GPTQ.
    scales: scale and zero point in place of step 2.
    Raises CalibrationError as ``hessian.factored``.
    """
    h = hessian if isinstance(hessian, Factored) else settings.factored(hessian)  # 3 to 5
    w, order = weight.detach().double(), h.order
    if scales is None:  # 2
        scales = _scales(weight.detach().float(), h.diagonal, scheme, settings.scales)
    scale, zero = scales
    pull = None
    if cross is not None:
        d = cross.double()[order][:, order]
        pull = alpha * (d @ h.factor.T).triu(diagonal=1) @ h.factor
    group = (order // (len(order) // scale.shape[1])).tolist()
    grid = _Grid(scale.double().T, None if zero is None else zero.double().T, group, scheme.bits)
    integers = torch.empty_like(w)
    integers[:, order] = _sweep(w.T[order], grid, h.factor, pull, settings.columns).T  # 6
    stored = None if zero is None else zero.to(torch.int8)
    return Solution(QuantizedWeight(integers.to(torch.int8), scale, stored), h.damping, h.dead)


def _scales(
    weight: Tensor, importance: Tensor, scheme: WeightScheme, scales: str
) -> tuple[Tensor, Tensor | None]:
    clip: float | Tensor = 1.0
    if scales == "search":
        clip = initial_clip(weight, scheme, importance, 2.0)
    scale, zero = affine.weight_scales(weight, scheme, clip)
    return scale.float(), zero


@dataclass(frozen=True)
class _Grid:
    """The points a column may take: scale and zero_point [groups, out] (or [1, 1]), group of each column."""

    scale: Tensor
    zero_point: Tensor | None
    group: list[int]
    bits: int

    def round(self, column: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Integers [out] of column ``index`` and the values they stand for."""
        qmin, qmax = affine.integer_range(self.bits)
        scale = self.scale[self.group[index]]
        integers = torch.round(column / scale)
        if self.zero_point is None:
            integers = integers.clamp(qmin, qmax)
            return integers, integers * scale
        zero = self.zero_point[self.group[index]]
        integers = (integers + zero).clamp(qmin, qmax)
        return integers, (integers - zero) * scale


def _sweep(w: Tensor, grid: _Grid, factor: Tensor, pull: Tensor | None, columns: int) -> Tensor:
    """Step 6 on a weight [in, out], a column of step 6 to a row, in processing order; ``pull`` is P of
    ``methods.gptaq``. Consumes ``w``. Within ``columns`` a column collects its moves when its turn comes.
    """
    integers = torch.empty_like(w)
    for start in range(0, len(w), columns):
        stop = min(start + columns, len(w))
        errors = torch.empty_like(w[start:stop])
        near = factor[start:stop, start:stop].T.contiguous()
        near_pull = None if pull is None else pull[start:stop, start:stop].T.contiguous()
        for i in range(start, stop):
            k = i - start
            w[i].addmv_(errors[:k].T, near[k, :k], alpha=-1)
            if near_pull is not None:
                w[i].addmv_(w[start:i].T, near_pull[k, :k])
            integers[i], value = grid.round(w[i], i)
            errors[k] = (w[i] - value) / near[k, k]
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        if pull is not None:
            w[stop:].addmm_(pull[start:stop, stop:].T, w[start:stop])
    return integers


def solve(
    layer: StagedLayer,
    statistics: Mapping[str, Statistics],
    settings: Settings,
    alphas: Mapping[str, float] | None = None,
) -> dict[str, dict[str, Any]]:
    """Quantize a stage's linears and put the results in their places; what to report about each.

    H is factored once for all that share it. ``alphas`` by linear, for GPTAQ.
    """
    rows: dict[str, dict[str, Any]] = {}
    factors = layer.per_inputs(statistics, lambda sums: settings.factored(sums.hessian))
    for name, sums in statistics.items():
        scheme = layer.block.formats[name].weights
        assert scheme is not None
        with layer.naming(name):
            solution = gptq_matrix(
                layer.block.linears[name].weight,
                factors[name],
                scheme,
                settings,
                cross=sums.cross,
                alpha=1.0 if alphas is None else alphas[name],
            )
        layer.finish(name, solution.quantized)
        rows[name] = {"tokens": sums.tokens}
        if solution.damping != settings.damping:
            rows[name]["note"] = f"damping raised to {solution.damping:g}"
        if solution.dead:
            rows[name]["dead_columns"] = solution.dead
    return rows


class Gptq:
    """The method ``gptq``."""

    options: Mapping[str, Any] = OPTIONS

    def check(self, recipe: Recipe) -> None:
        """RecipeError for a value that makes no sense."""
        Settings.of(recipe)

    def prepare(self, context: Context) -> State:
        """Prepares nothing."""
        return {}

    def partition(self, stream: Stream, recipe: Recipe, state: State) -> list[tuple[int, int]]:
        """One layer per block."""
        return [(i, i + 1) for i in range(len(stream.layers))]

    def quantize_block(self, block: Block, recipe: Recipe, state: State) -> BlockResult:
        """Step 1, then each linear of a stage."""
        settings, layer = Settings.of(recipe), StagedLayer(block)
        rows = {}
        for names in layer.stages:
            rows.update(solve(layer, layer.statistics(names), settings))
        return BlockResult(layer.results, {"linears": rows})
