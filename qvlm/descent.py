"""Integer coordinate descent: change one integer of a row at a time, only where the output error falls.

Objective for a weight row with target t, integers q and scales s (z zero points), H the inputs' second moment:

    E(q, s) = (v - t) H (v - t)',   v_c = s_g(c) (q_c - z_g(c))

1. ``target``: with H = sum c u u' and D = sum c (f - u) u' (``hessian``), sum c |q u - w f|^2 is E up to a constant
   for t = w (H + D) H^-1; alpha scales D, damping keeps H^-1 sane.
2. ``descend``: for every column in turn the integer that minimises E given all others,
   q_c = round((v_c - [(v - t) H]_c / H_cc) / s + z), clipped to the grid; it replaces the old one where E falls by
   more than rounding noise. Rows are independent and move together.
3. ``refit_scales``: the s that minimise E for fixed q solve a linear system of as many unknowns per row as it has
   groups; rounded to float16, and kept for the rows where E falls.

E never rises in any step, in float64. Source: coordinate descent on layer-wise quantization is QuantEase (Behdin et
al., arXiv 2309.01885); the target is the continuous optimum of GPTAQ's objective (``methods.gptaq``). What we do
differently: the asymmetric target, token weights (inside H and D), the scales' re-fit.

Cost: out in^2 multiplications to begin with, as many per round times the share of integers that move; the re-fit one
and a half times out in^2 and a solve per row. GPTQ's sweep is half of out in^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvlm import affine
from qvlm.affine import QuantizedWeight
from qvlm.hessian import Factored

# A move must lower E by this share of the row's error: below it float64 rounding decides.
LEAST_GAIN = 1e-12
# Columns whose moves reach the columns behind them in one product.
COLUMNS = 64


def target(weight: Tensor, factored: Factored, shift: Tensor | None, alpha: float) -> Tensor:
    """t [out, in] float64: w + alpha (w D) (H + damping mean(diag H) I)^-1; w itself without ``shift``, w D."""
    w = weight.detach().double()
    if shift is None or alpha == 0.0:
        return w
    found: Tensor = w + alpha * factored.over(shift)
    return found


def row_errors(values: Tensor, wanted: Tensor, hessian: Tensor) -> Tensor:
    """E [out] of weights [out, in] against targets [out, in], float64."""
    difference = values.double() - wanted
    return ((difference @ hessian) * difference).sum(1)


def stream_error(values: Tensor, weight: Tensor, hessian: Tensor, shift: Tensor | None) -> float:
    """sum c |v u - w f|^2 for values v and a weight w [out, in], less what v = w has; H as in ``target``, shift = w D.

    Unlike E it needs no target, so that H and D may be of other samples than the integers come from.
    """
    difference = values.double() - weight.detach().double()
    pull = difference @ hessian
    if shift is not None:
        pull -= 2 * shift
    return float(pull.mul_(difference).sum())


def descend(
    start: QuantizedWeight, wanted: Tensor, hessian: Tensor, bits: int, sweeps: int
) -> QuantizedWeight:
    """Step 2 from ``start`` on, scales fixed. wanted [out, in] and hessian [in, in] float64, H_cc > 0.

    Ends before ``sweeps`` rounds over the columns if one changes nothing.
    """
    qmin, qmax = affine.integer_range(bits)
    scale, zero = _columns(start)
    difference = scale * (start.integers.double() - zero) - wanted
    pull = difference @ hessian  # (v - t) H, kept up to date
    noise = LEAST_GAIN * (pull * difference).sum(1)
    # By column, as they are read and written.
    scale, integers = scale.T.contiguous(), start.integers.T.contiguous().double()
    diagonal = hessian.diagonal()[:, None]
    for _ in range(sweeps):
        changed = False
        for first in range(0, len(hessian), COLUMNS):
            last = min(first + COLUMNS, len(hessian))
            here, near = pull[:, first:last].T.contiguous(), hessian[first:last, first:last]
            moves = torch.zeros_like(here)
            steps = -1 / (diagonal[first:last] * scale[first:last])  # integers per unit of pull
            # A step of n integers gains H_cc s^2 n (2 n' - n), n' the real number of least E.
            least = noise * steps / -scale[first:last]
            for k, (s, old) in enumerate(zip(scale[first:last], integers[first:last], strict=True)):
                real = here[k].addmv_(moves[:k].T, near[k, :k]).mul_(steps[k])
                step = (old + real).round_().clamp_(qmin, qmax).sub_(old)
                step *= (real - step).add_(real).mul_(step) > least[k]
                old += step
                torch.mul(step, s, out=moves[k])
            if bool(moves.any()):
                changed = True
                # Behind a start that was swept one integer in a hundred moves, fewer in every round.
                torch.addmm(pull, moves.T.to_sparse(), hessian[first:last], out=pull)
        if not changed:
            break
    found = integers.T.contiguous().to(torch.int8)
    return QuantizedWeight(found, start.scale, start.zero_point)


def refit_scales(start: QuantizedWeight, wanted: Tensor, hessian: Tensor) -> QuantizedWeight:
    """Step 3: the scales of least E for these integers, float16 values. Arguments as ``descend``.

    With M_gh = q_g H_gh q_h' and r_g = q_g [H t']_g (q_g a row's integers of group g), E(s) = s M s' - 2 s r + const,
    so that M s = r is solved per row. A weight with one scale in all ([1, 1]) is returned as it is. So is a row one
    of whose best scales has another sign than before or fits no normal float16.
    """
    rows, groups = start.scale.shape
    if rows != len(start.integers):
        return start
    scale, zero = (x.reshape(rows, groups, -1) for x in _columns(start))
    old, grid = scale[:, :, 0], start.integers.double().reshape(rows, groups, -1) - zero
    right = ((wanted @ hessian).reshape(rows, groups, -1) * grid).sum(2)
    system = torch.empty(rows, groups, groups, dtype=torch.float64)
    for g, part in enumerate(hessian.reshape(groups, -1, len(hessian))):
        # M is symmetric: the groups from g on are enough.
        reach = (grid[:, g] @ part[:, g * len(part) :]).reshape(rows, groups - g, -1)
        system[:, g, g:] = (reach * grid[:, g:]).sum(2)
        system[:, g:, g] = system[:, g, g:]
    # An all-zero group has no say: a unit row keeps the system solvable and leaves its scale alone below.
    empty = system.diagonal(dim1=1, dim2=2) <= 0
    solvable = system + torch.diag_embed(empty.double())
    found = torch.linalg.lstsq(solvable, right[:, :, None]).solution[:, :, 0]
    found = torch.where(empty, old, found).float().to(torch.float16).double()
    valid = (torch.isfinite(found) & (found * old.sign() >= affine.SMALLEST_SCALE)).all(1)
    found = torch.where(valid[:, None], found, old)

    def cost(s: Tensor) -> Tensor:
        """E [out] up to a constant."""
        return ((system @ s[:, :, None])[:, :, 0] * s - 2 * s * right).sum(1)

    chosen = torch.where((cost(found) < cost(old))[:, None], found, old)
    return QuantizedWeight(start.integers, chosen.float(), start.zero_point)


def coordinate_optima(start: QuantizedWeight, wanted: Tensor, hessian: Tensor) -> Tensor:
    """For every weight [out, in] the real number (in integers) of least E given all others, float64.

    After ``descend`` has ended by itself, rounding and clipping it gives the integers again.
    """
    scale, zero = _columns(start)
    integers = start.integers.double()
    pull = (scale * (integers - zero) - wanted) @ hessian
    return integers - pull / (hessian.diagonal() * scale)


def _columns(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every weight, [out, in] float64."""
    out, columns = weight.integers.shape
    groups = weight.scale.shape[1]

    def spread(x: Tensor) -> Tensor:
        return x.double().repeat_interleave(columns // groups, 1).expand(out, columns)

    zero = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    return spread(weight.scale), spread(zero)
