"""One weight and its inputs on two streams, drawn by seed, and the error of a quantized weight. For tests only."""

from __future__ import annotations

import torch

from qvlm import affine
from qvlm.affine import QuantizedWeight
from qvlm.descent import row_errors


def problem(
    rows: int = 6, columns: int = 48, tokens: int = 300, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """A weight, float and quantized inputs (correlated, unequal channels), H and D."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.logspace(0, -1, columns)[:, None] * torch.randn(
        columns, columns, generator=generator
    )
    f = (torch.randn(tokens, columns, generator=generator) @ mix).double()
    u = f + 0.1 * f.std() * torch.randn(tokens, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, f, u, u.T @ u, (f - u).T @ u


def error(weight: QuantizedWeight, wanted: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    values = affine.dequantize(weight).double()
    return row_errors(values, wanted, hessian)
