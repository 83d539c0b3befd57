"""Orthogonal matrices that mix all channels, without storing them. Arrays only.

    Q = diag(signs) (F_1 x F_2 x ...),   x' = x Q

x the Kronecker product. The factors of n = 2^k m are Hadamard matrices of at most 64 (Sylvester's) and, for an odd
m > 1, the orthonormal cosine transform DCT-II of size m: every entry of Q is at most sqrt(2 / n) in size, so an outlier
channel spreads evenly over all. Applied factor by factor a row costs n (n_1 + n_2 + ...) products instead of n^2.
Products are float64, some rows at a time; the result has the input's type. Q is orthogonal to 1e-15.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers rotated at a time: 128 MiB of float64.
CHUNK = 1 << 24
# Factors up to here are applied as matrices; 4096 is 64 x 64.
LARGEST_FACTOR = 64


def random_signs(count: int, generator: torch.Generator) -> Tensor:
    """+1 or -1 int8 [count]."""
    return (2 * torch.randint(0, 2, (count,), generator=generator) - 1).to(torch.int8)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of a power of two, scaled to be orthogonal, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(two, matrix)
    scaled: Tensor = matrix / size**0.5
    return scaled


def cosine(size: int) -> Tensor:
    """The orthonormal DCT-II, float64: entry [k, j] is c_k cos(pi (2 j + 1) k / (2 size))."""
    steps = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi * (2 * steps + 1) * steps[:, None] / (2 * size))
    matrix *= (2.0 / size) ** 0.5
    matrix[0] = size**-0.5
    return matrix


def factors(size: int) -> list[Tensor]:
    """F_1, F_2 ... of a size."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    even, found = size // odd, list[Tensor]()
    while even > 1:
        step = min(even, LARGEST_FACTOR)
        found.append(hadamard(step))
        even //= step
    return [*found, cosine(odd)] if odd > 1 or not found else found


@dataclass(frozen=True)
class Rotation:
    """Q of ``signs`` [n], each +1 or -1."""

    signs: Tensor

    def columns(self, x: Tensor) -> Tensor:
        """x Q for x [..., n]."""
        parts = factors(len(self.signs))
        rows = x.reshape(-1, len(self.signs))
        result = torch.empty_like(rows)
        count = max(1, CHUNK // len(self.signs))
        for start in range(0, len(rows), count):
            y = rows[start : start + count].double() * self.signs.double()
            y = y.reshape(-1, *(len(f) for f in parts))
            for axis, factor in enumerate(parts, 1):
                y = torch.movedim(torch.movedim(y, axis, -1) @ factor, -1, axis)
            result[start : start + count] = y.reshape(-1, len(self.signs))
        return result.reshape(x.shape)

    def rows(self, x: Tensor) -> Tensor:
        """Q' x for x [n, ...]."""
        return torch.movedim(self.columns(torch.movedim(x, 0, -1)), -1, 0)
