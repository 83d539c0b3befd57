"""What a linear's inputs say about its weight: H = sum c u u', D = sum c (f - u) u', and the factor of H^-1.

u is a token's input on the quantized stream, f the same token's on the float stream, c its weight (1 without token
weights). Columns below are input channels. Arrays only: no model, no method.

Sums and factors are float64: a sum over 10^5 tokens holds channels whose energies differ by 10^6 and more, and the
factor of the inverse depends on the smallest of them, so float32 would leave it few true digits. Each sample's own
product is float32, exact enough because it is rounded relative to that sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qvlm.errors import CalibrationError

# Each failed factorisation is retried with ten times the damping, up to this factor.
DAMPING_LADDER = (1.0, 10.0, 100.0)
# Triangles up to this size are inverted by one solve.
SOLVED = 256


class Statistics:
    """H and D of one linear, fed sample by sample.

    hessian and cross are float64 [in, in]; cross is None unless ``asymmetric``: D[i, j] = sum c (f_i - u_i) u_j.
    """

    def __init__(self, columns: int, asymmetric: bool = False) -> None:
        self.hessian = torch.zeros(columns, columns, dtype=torch.float64)
        self.cross = torch.zeros_like(self.hessian) if asymmetric else None
        self.tokens = 0
        self._weight_sum = 0.0
        self._weight_squares = 0.0

    def add(
        self, quant: Tensor, target: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Take in one sample: u [..., in], f of the same shape if asymmetric, c [tokens] >= 0."""
        u = quant.detach().reshape(-1, quant.shape[-1]).float()
        c = torch.ones(len(u)) if weights is None else weights.float()
        weighted = u if weights is None else u * c[:, None]
        self.hessian += (weighted.T @ u).double()
        if self.cross is not None:
            if target is None:
                raise ValueError("asymmetric statistics need the float stream's input")
            f = target.detach().reshape(u.shape).float()
            self.cross += ((f - u).T @ weighted).double()
        self.tokens += len(u)
        self._weight_sum += float(c.double().sum())
        self._weight_squares += float(c.double().square().sum())

    def shift(self, weight: Tensor) -> Tensor | None:
        """w D float64 of a weight [out, in]: what the float stream asks of its outputs; None without D."""
        return None if self.cross is None else weight.detach().double() @ self.cross

    @property
    def effective_tokens(self) -> float:
        """(sum c)^2 / sum c^2: as many equally weighted tokens carry the same information."""
        return self._weight_sum**2 / self._weight_squares if self._weight_squares else 0.0


def revive_dead(hessian: Tensor) -> tuple[Tensor, int]:
    """H with the mean of the live diagonal on every dead column (H_ii = 0), and how many there were.

    An input channel that is always zero has zero rows and columns in H: with a diagonal of its own it takes part in
    no compensation, so its weights are simply rounded.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    count = int(dead.sum())
    if not count:
        return hessian, 0
    live = diagonal[~dead]
    fill = float(live.mean()) if len(live) else 1.0
    revived = hessian.clone()
    revived.diagonal()[dead] = fill
    return revived, count


def shrunk(hessian: Tensor, share: float) -> Tensor:
    """H + share diag(H): the same inputs, with noise of its own on every channel, ``share`` of the channel's energy.

    H is a sample's. Channels that fire for few tokens only, and together, are collinear in it: it says that an error
    in one of them costs nothing once the others have answered it. The next such token fires them in other
    proportions. Unlike ``damped`` this is relative to each channel, so that a channel whose mean energy is small, as
    it is rarely used, is protected as well as any.
    """
    found = hessian.clone()
    found.diagonal().mul_(1 + share)
    return found


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping mean(diag H) I."""
    found = hessian.clone()
    found.diagonal().add_(damping * float(hessian.diagonal().mean()))
    return found


@dataclass(frozen=True)
class Factored:
    """H of linears that share their inputs, with what every one of them needs of it; all float64.

    diagonal [in]: of H without dead columns (``dead`` of them revived); damped [in, in]: H with ``damping`` times the
    diagonal's mean added to it. order [in]: the columns as a sweep processes them. factor and upper [in, in], both
    upper triangular: R'R = damped^-1 and U U' = damped, in that order.
    """

    diagonal: Tensor
    damped: Tensor
    damping: float
    dead: int
    order: Tensor
    factor: Tensor
    upper: Tensor

    def inverse_diagonal(self) -> Tensor:
        """The diagonal [in] of damped^-1."""
        found = torch.empty_like(self.damped[0])
        found[self.order] = self.factor.square().sum(0)
        return found

    def over(self, rows: Tensor) -> Tensor:
        """x damped^-1 for x [rows, in]: two triangular solves, x U^-T U^-1."""
        found = torch.empty_like(rows)
        half = torch.linalg.solve_triangular(
            self.upper.T, rows[:, self.order], upper=False, left=False
        )
        found[:, self.order] = torch.linalg.solve_triangular(
            self.upper, half, upper=True, left=False
        )
        return found


def factored(
    hessian: Tensor, damping: float, act_order: bool = True, shrinkage: float = 0.0
) -> Factored:
    """Factors of H [in, in] ``shrunk`` by ``shrinkage``, columns by falling H_ii (``act_order``) or as they come.

    With J the reversal of the columns, J H J = L L' gives H = U U' for the upper U = J L J, and R = U^-1: one
    factorisation and one triangular inverse. Where the factorisation fails the damping is raised tenfold, twice;
    CalibrationError after that or for entries that are not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError(
            "inputs are not finite. Look for an overflow in the float model on these samples."
        )
    live, dead = revive_dead(hessian.double())
    live = shrunk(live, shrinkage)
    order = torch.arange(len(live))
    if act_order:
        order = torch.argsort(live.diagonal(), descending=True, stable=True)
    for factor in DAMPING_LADDER:
        raised, last_first = damped(live, damping * factor), order.flip(0)
        lower, failed = torch.linalg.cholesky_ex(raised[last_first][:, last_first])
        if not int(failed):
            upper = lower.flip(0, 1)
            return Factored(
                live.diagonal(), raised, damping * factor, dead, order, _inverse(upper), upper
            )
    raise CalibrationError(
        f"H is not positive definite even with damping {damping * DAMPING_LADDER[-1]:g}. "
        "Give more samples or raise the option damping."
    )


def _inverse(upper: Tensor) -> Tensor:
    """U^-1 of an upper triangular U by halves: a third of the multiplications of a solve for all columns."""
    count = len(upper)
    if count <= SOLVED:
        identity = torch.eye(count, dtype=upper.dtype)
        found: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
        return found
    half = count // 2
    found = torch.zeros_like(upper)
    found[:half, :half] = _inverse(upper[:half, :half])
    found[half:, half:] = _inverse(upper[half:, half:])
    found[:half, half:] = -(found[:half, :half] @ upper[:half, half:]) @ found[half:, half:]
    return found
