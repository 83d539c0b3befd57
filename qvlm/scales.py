"""Search of a weight's scales by what they do to the layer's output: symmetric, per group, before any rounding moves.

Objective for a group of a row with weights w, H = sum c u u':

    min over s of  sum_c d_c (Q_s(w_c) - w_c)^2

    conditional    d_c = 1 / [(H + damping mean(diag H) I)^-1]_cc: what an error in column c costs once every other
                   column has answered it, which is what GPTQ's sweep and coordinate descent let them do
    diagonal       d_c = H_cc: as if columns were independent

Q_s rounds to nearest and saturates; s may be negative where the scheme lets it. The grid of few bits is lopsided (-2,
-1, 0, 1 times s at two): the sign of s says which side of zero gets the farther point. H carries the token weights, so
a mix of modalities or VLMQ's factors need no code here.

1. Candidates: ``FACTORS`` times max|w| / qmax, of both signs if the scheme has ``signed_scales``. They reach down to a
   fifth because a grid of two bits has one positive point: the best step for Gaussian weights is about a third of the
   largest of 128.
2. The best candidate of each group; ties keep the larger scale, and the positive one.

What we do differently from the range search of ``ranges``: "conditional", and room for two bits. Two searches were
tried and left out: by the group's block of H with plain rounding, which picks scales that happen to suit the few
directions with most energy, and by the error after a whole sweep for each factor common to a row. On inputs of the
demo's decoder at three bits, held out, the output error after GPTQ was 4.08e-3 with "conditional", 4.29e-3 with
"diagonal", 4.50e-3 with the block and 4.83e-3 with the common factor.

Signs are AutoRound's "full range" symmetric grid. On the demo's decoder at two bits they take two fifths off the
divergence of ``fused`` (README).

Cost: one rounding of the weight per candidate, and the inverse of H for "conditional".
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from qvlm import affine
from qvlm.errors import RecipeError
from qvlm.hessian import Factored
from qvlm.recipe import WeightScheme

FACTORS = tuple(1.0 - 0.02 * i for i in range(41))
OBJECTIVES = ("conditional", "diagonal")
# Weights searched at once: their errors stay in a core's cache.
CHUNK = 1 << 16


def search_scales(weight: Tensor, scheme: WeightScheme, importance: Tensor) -> Tensor:
    """Scales float32 [out, groups] ([1, 1] per tensor) for a weight [out, in] and d [in].

    Raises RecipeError on an asymmetric scheme, CheckpointError as ``affine.weight_scales``.
    """
    if not scheme.symmetric:
        raise RecipeError("scale search: the scheme is asymmetric, expected a symmetric one")
    w, d = weight.detach().float(), importance.float()
    if scheme.granularity == "tensor":
        return _best_scales(w, scheme, d)
    rows = max(1, CHUNK // w.shape[1])
    return torch.cat([_best_scales(part, scheme, d) for part in torch.split(w, rows)])


def _best_scales(w: Tensor, scheme: WeightScheme, d: Tensor) -> Tensor:
    best: Tensor | None = None
    chosen: Tensor | None = None
    for factor, sign in itertools.product(FACTORS, (1, -1) if scheme.signed_scales else (1,)):
        scale = sign * affine.weight_scales(w, scheme, factor)[0]
        error = affine.fake_quantize_weight(w, scheme, scale).sub_(w).square_().mul_(d)
        cost = affine.grouped(error, scheme).sum(-1)
        if scheme.granularity == "tensor":
            cost = cost.sum().reshape(1, 1)
        if best is None or chosen is None:
            best, chosen = cost, scale
        better = cost < best
        best, chosen = torch.where(better, cost, best), torch.where(better, scale, chosen)
    assert chosen is not None
    return chosen


def column_importance(factored: Factored, objective: str) -> Tensor:
    """d [in] float64 for the H of ``factored``; RecipeError on an unknown objective."""
    if objective not in OBJECTIVES:
        raise RecipeError(f"option scales: {objective!r}, expected one of {', '.join(OBJECTIVES)}")
    if objective == "diagonal":
        return factored.diagonal
    return 1 / factored.inverse_diagonal()
