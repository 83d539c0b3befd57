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
from qvlm.hessian import Statistics, inverse_factor, revive_dead
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


@dataclass(frozen=True)
class Solution:
    """Integers of one weight, the damping that was needed and the number of dead input channels."""

    quantized: QuantizedWeight
    damping: float
    dead: int


def gptq_matrix(
    weight: Tensor,
    hessian: Tensor,
    scheme: WeightScheme,
    settings: Settings = Settings(),
    *,
    cross: Tensor | None = None,
    alpha: float = 1.0,
    scales: tuple[Tensor, Tensor | None] | None = None,
) -> Solution:
    """Quantize a weight [out, in] given H [in, in]. Steps 2 to 6.

    cross: D [in, in] of ``hessian.Statistics``, then each column also moves the later ones towards the float stream's
    output, by ``alpha`` of the full correction (GPTAQ). Without it, or with D = 0, this is GPTQ.
    scales: scale and zero point in place of step 2.
    Raises CalibrationError as ``inverse_factor``.
    """
    w = weight.detach().double()
    h, dead = revive_dead(hessian.double())  # 3
    if scales is None:  # 2
        scales = _scales(weight.detach().float(), h.diagonal(), scheme, settings.scales)
    scale, zero = scales
    order = torch.arange(len(h))
    if settings.act_order:  # 4
        order = torch.argsort(h.diagonal(), descending=True, stable=True)
    factor, damping = inverse_factor(h[order][:, order], settings.damping)  # 5
    pull = None
    if cross is not None:
        d = cross.double()[order][:, order]
        pull = alpha * (d @ factor.T).triu(diagonal=1) @ factor
    group = order // (len(h) // scale.shape[1])
    grid = _Grid(scale.double(), None if zero is None else zero.double(), group, scheme.bits)
    integers = torch.empty_like(w)
    integers[:, order] = _sweep(w[:, order], grid, factor, pull, settings.columns)  # 6
    stored = None if zero is None else zero.to(torch.int8)
    return Solution(QuantizedWeight(integers.to(torch.int8), scale, stored), damping, dead)


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
    """The points a column may take: scale and zero_point [out, groups] (or [1, 1]), group [in] of each column."""

    scale: Tensor
    zero_point: Tensor | None
    group: Tensor
    bits: int

    def round(self, column: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Integers [out] of column ``index`` and the values they stand for."""
        qmin, qmax = affine.integer_range(self.bits)
        scale = self.scale[:, self.group[index]]
        integers = torch.round(column / scale)
        if self.zero_point is None:
            integers = integers.clamp(qmin, qmax)
            return integers, integers * scale
        zero = self.zero_point[:, self.group[index]]
        integers = (integers + zero).clamp(qmin, qmax)
        return integers, (integers - zero) * scale


def _sweep(w: Tensor, grid: _Grid, factor: Tensor, pull: Tensor | None, columns: int) -> Tensor:
    """Step 6 on a weight [out, in] in processing order; ``pull`` is P of ``methods.gptaq``."""
    w = w.clone()
    integers = torch.empty_like(w)
    for start in range(0, w.shape[1], columns):
        stop = min(start + columns, w.shape[1])
        errors = torch.empty_like(w[:, start:stop])
        for i in range(start, stop):
            integers[:, i], value = grid.round(w[:, i], i)
            error = (w[:, i] - value) / factor[i, i]
            errors[:, i - start] = error
            w[:, i + 1 : stop] -= torch.outer(error, factor[i, i + 1 : stop])
            if pull is not None:
                w[:, i + 1 : stop] += torch.outer(w[:, i], pull[i, i + 1 : stop])
        w[:, stop:] -= errors @ factor[start:stop, stop:]
        if pull is not None:
            w[:, stop:] += w[:, start:stop] @ pull[start:stop, stop:]
    return integers


def solve(
    layer: StagedLayer, name: str, statistics: Statistics, settings: Settings, alpha: float = 1.0
) -> dict[str, Any]:
    """Quantize linear ``name`` of the layer and put the result in its place; what to report about it."""
    scheme = layer.block.formats[name].weights
    assert scheme is not None
    with layer.naming(name):
        solution = gptq_matrix(
            layer.block.linears[name].weight,
            statistics.hessian,
            scheme,
            settings,
            cross=statistics.cross,
            alpha=alpha,
        )
    layer.finish(name, solution.quantized)
    row: dict[str, Any] = {"tokens": statistics.tokens}
    if solution.damping != settings.damping:
        row["note"] = f"damping raised to {solution.damping:g}"
    if solution.dead:
        row["dead_columns"] = solution.dead
    return row


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
            statistics = layer.statistics(names)
            for name in names:
                rows[name] = solve(layer, name, statistics[name], settings)
        return BlockResult(layer.results, {"linears": rows})
