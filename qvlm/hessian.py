"""What a linear's inputs say about its weight: H = sum c u u', D = sum c (f - u) u', and the factor of H^-1.

u is a token's input on the quantized stream, f the same token's on the float stream, c its weight (1 without token
weights). Columns below are input channels. Arrays only: no model, no method.

Sums and factors are float64: a sum over 10^5 tokens holds channels whose energies differ by 10^6 and more, and the
factor of the inverse depends on the smallest of them, so float32 would leave it few true digits. Each sample's own
product is float32, exact enough because it is rounded relative to that sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvlm.errors import CalibrationError

# Each failed factorisation is retried with ten times the damping, up to this factor.
DAMPING_LADDER = (1.0, 10.0, 100.0)


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
    return hessian + torch.diag(dead.to(hessian.dtype) * fill), count


def shrunk(hessian: Tensor, share: float) -> Tensor:
    """H + share diag(H): the same inputs, with noise of its own on every channel, ``share`` of the channel's energy.

    H is a sample's. Channels that fire for few tokens only, and together, are collinear in it: it says that an error
    in one of them costs nothing once the others have answered it. The next such token fires them in other
    proportions. Unlike ``damped`` this is relative to each channel, so that a channel whose mean energy is small, as
    it is rarely used, is protected as well as any.
    """
    return hessian + share * torch.diag(hessian.diagonal())


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping mean(diag H) I."""
    mean = float(hessian.diagonal().mean())
    return hessian + damping * mean * torch.eye(len(hessian), dtype=hessian.dtype)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper R [in, in] with R'R = (H + damping mean(diag H) I)^-1, and the damping that was used.

    With J the reversal of the columns, J H J = L L' gives H = U U' for the upper U = J L J, and R = U^-1: one
    factorisation and one triangular solve, no explicit inverse. Where the factorisation fails the damping is raised
    tenfold, twice; CalibrationError after that or for entries that are not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError(
            "inputs are not finite. Look for an overflow in the float model on these samples."
        )
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    for factor in DAMPING_LADDER:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping * factor).flip(0, 1))
        if not int(failed):
            upper = lower.flip(0, 1)
            return torch.linalg.solve_triangular(upper, identity, upper=True), damping * factor
    raise CalibrationError(
        f"H is not positive definite even with damping {damping * DAMPING_LADDER[-1]:g}. "
        "Give more samples or raise the option damping."
    )
