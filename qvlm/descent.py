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

Cost: a sweep is out in^2 multiplications, as GPTQ's; the re-fit is one product with H and a solve per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvlm import affine
from qvlm.affine import QuantizedWeight
from qvlm.hessian import damped

# A move must lower E by this share of the row's error: below it float64 rounding decides.
LEAST_GAIN = 1e-12
# Columns whose moves reach the columns behind them in one product.
COLUMNS = 64


def target(
    weight: Tensor, hessian: Tensor, cross: Tensor | None, alpha: float, damping: float
) -> Tensor:
    """t [out, in] float64: w + alpha w D (H + damping mean(diag H) I)^-1; the weight itself without D.

    ``hessian`` must have no dead column (``hessian.revive_dead``).
    """
    w = weight.detach().double()
    if cross is None or alpha == 0.0:
        return w
    shift: Tensor = torch.linalg.solve(damped(hessian, damping), (w @ cross).T).T  # H is symmetric
    found: Tensor = w + alpha * shift
    return found


def row_errors(values: Tensor, wanted: Tensor, hessian: Tensor) -> Tensor:
    """E [out] of weights [out, in] against targets [out, in], float64."""
    difference = values.double() - wanted
    return ((difference @ hessian) * difference).sum(1)


def stream_error(values: Tensor, weight: Tensor, hessian: Tensor, cross: Tensor | None) -> float:
    """sum c |v u - w f|^2 for values v and a weight w [out, in], less what v = w has; H and D as in ``target``.

    Unlike E it needs no target, so that H and D may be of other samples than the integers come from.
    """
    difference = values.double() - weight.detach().double()
    found = ((difference @ hessian) * difference).sum()
    if cross is not None:
        found = found - 2 * ((weight.detach().double() @ cross) * difference).sum()
    return float(found)


def descend(
    start: QuantizedWeight, wanted: Tensor, hessian: Tensor, bits: int, sweeps: int
) -> QuantizedWeight:
    """Step 2 from ``start`` on, scales fixed. wanted [out, in] and hessian [in, in] float64, H_cc > 0.

    Ends before ``sweeps`` rounds over the columns if one changes nothing.
    """
    qmin, qmax = affine.integer_range(bits)
    scale, zero = _columns(start)
    integers = start.integers.double()
    difference = scale * (integers - zero) - wanted
    pull = difference @ hessian  # (v - t) H, kept up to date
    diagonal = hessian.diagonal()
    noise = LEAST_GAIN * (pull * difference).sum(1)
    scale, integers = scale.T.contiguous(), integers.T.contiguous()  # by column, as they are read
    for _ in range(sweeps):
        changed = False
        for first in range(0, len(hessian), COLUMNS):
            last = min(first + COLUMNS, len(hessian))
            # [columns, out]: a column is read and written at once.
            near = pull[:, first:last].T.contiguous()
            moves = torch.zeros_like(near)
            for c in range(first, last):
                s, old, g = scale[c], integers[c], near[c - first]
                best = torch.round(old - g / (diagonal[c] * s)).clamp(qmin, qmax)
                move = s * (best - old)
                gains = -(2 * g + diagonal[c] * move) * move > noise
                if not bool(gains.any()):
                    continue
                move = torch.where(gains, move, 0.0)
                integers[c] = torch.where(gains, best, old)
                moves[c - first] = move
                # Columns before c are read again in the next round only, when ``pull`` holds their new values.
                near[c - first + 1 :] += torch.outer(hessian[c, c + 1 : last], move)
            if bool(moves.any()):
                changed = True
                pull += moves.T @ hessian[first:last]
        if not changed:
            break
    found = integers.T.contiguous().to(torch.int8)
    return QuantizedWeight(found, start.scale, start.zero_point)


def refit_scales(start: QuantizedWeight, wanted: Tensor, hessian: Tensor) -> QuantizedWeight:
    """Step 3: the scales of least E for these integers, positive float16 values. Arguments as ``descend``.

    A weight with one scale in all ([1, 1]) is returned as it is. So is a row whose best scales are not positive or
    fit no normal float16.
    """
    rows, groups = start.scale.shape
    if rows != len(start.integers):
        return start
    scale, zero = _columns(start)
    grid = (start.integers.double() - zero).reshape(rows, groups, -1)
    blocks = torch.eye(groups, dtype=torch.float64).repeat_interleave(grid.shape[2], 1)
    spread = (
        grid.reshape(rows, 1, -1) * blocks
    )  # [out, groups, in]: a row's integers, one group each
    products = spread.reshape(rows * groups, -1) @ hessian
    products = products.reshape(rows, groups, -1)
    system = products @ spread.transpose(1, 2)
    right = (products @ wanted[:, :, None])[:, :, 0]
    # An all-zero group has no say: a unit row keeps the system solvable and leaves its scale alone below.
    empty = system.diagonal(dim1=1, dim2=2) <= 0
    system = system + torch.diag_embed(empty.double())
    found = torch.linalg.lstsq(system, right[:, :, None]).solution[:, :, 0]
    found = torch.where(empty, start.scale.double(), found).float().to(torch.float16).double()
    valid = (torch.isfinite(found) & (found >= affine.SMALLEST_SCALE)).all(1)
    safe = torch.where(valid[:, None], found, start.scale.double())
    old = row_errors(scale * (start.integers.double() - zero), wanted, hessian)
    new = row_errors((grid * safe[:, :, None]).reshape(rows, -1), wanted, hessian)
    chosen = torch.where((new < old)[:, None], safe, start.scale.double())
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
