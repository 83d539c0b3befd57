"""Search of a weight's scales by what they do to the layer's output: symmetric, per group, before any rounding moves.

Objective for a group of a row with weights w, H_g the block of its columns in H = sum c u u':

    min over s of  (Q_s(w) - w) H_g (Q_s(w) - w)'      ("block")
    min over s of  sum_c H_cc (Q_s(w_c) - w_c)^2       ("diagonal": as if columns were independent)

Q_s rounds to nearest and saturates. H carries the token weights, so a mix of modalities or VLMQ's factors need no
code here.

1. Candidates: ``FACTORS`` times max|w| / qmax. They reach down to a fifth because a grid of two bits has one positive
   point: the best step for Gaussian weights is about a third of the largest of 128.
2. The best candidate of each group; ties keep the larger scale.

What we do differently from the range search of ``ranges``: the group's own block of H, and room for two bits. The
search over weight error alone lowers that error and raises the model's divergence, which is why there is none here.

Cost: one rounding of the weight per candidate, and for "block" one product with H_g.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvlm import affine
from qvlm.errors import RecipeError
from qvlm.recipe import WeightScheme

FACTORS = tuple(1.0 - 0.02 * i for i in range(41))
OBJECTIVES = ("diagonal", "block")


def search_scales(
    weight: Tensor, scheme: WeightScheme, hessian: Tensor, objective: str = "block"
) -> Tensor:
    """Scales float32 [out, groups] ([1, 1] per tensor) for a weight [out, in] and H [in, in].

    With one scale for several groups or a whole row of many columns "block" means the block of H it covers.
    Raises RecipeError on an unknown objective or an asymmetric scheme, CheckpointError as ``affine.weight_scales``.
    """
    if objective not in OBJECTIVES:
        raise RecipeError(f"scale search: {objective!r}, expected one of {', '.join(OBJECTIVES)}")
    if not scheme.symmetric:
        raise RecipeError("scale search: the scheme is asymmetric, expected a symmetric one")
    w = weight.detach().float()
    best: Tensor | None = None
    chosen: Tensor | None = None
    for factor in FACTORS:
        scale, _ = affine.weight_scales(w, scheme, factor)
        cost = _cost(affine.fake_quantize_weight(w, scheme, scale) - w, scheme, hessian, objective)
        if best is None or chosen is None:
            best, chosen = cost, scale
        better = cost < best
        best, chosen = torch.where(better, cost, best), torch.where(better, scale, chosen)
    assert chosen is not None
    return chosen


def _cost(error: Tensor, scheme: WeightScheme, hessian: Tensor, objective: str) -> Tensor:
    parts = affine.grouped(error, scheme)  # [out, groups, columns]
    groups, columns = parts.shape[1:]
    if objective == "diagonal":
        cost = (parts.square() * hessian.diagonal().float().reshape(groups, columns)).sum(-1)
    else:
        blocks = hessian.float().reshape(groups, columns, groups, columns)
        own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, columns, columns]
        cost = ((parts.transpose(0, 1) @ own).transpose(0, 1) * parts).sum(-1)
    return cost.sum().reshape(1, 1) if scheme.granularity == "tensor" else cost
