"""Products with a weight that is too large for one constant: pieces along K, summed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from qvlm_export.graph import GraphBuilder
from qvlm_export.weights import Array


@dataclass(frozen=True)
class Piece:
    """Input features [first, last) of a weight that has ``whole`` of them."""

    first: int
    last: int
    whole: int

    @property
    def depth(self) -> int:
        """Input features in it."""
        return self.last - self.first

    @property
    def suffix(self) -> str:
        """What its constants' names end in."""
        return "" if self.depth == self.whole else f".{self.first}"

    def columns(self, array: Array) -> Array:
        """Its part of an array [out_features, columns], whose columns stand for equally many inputs."""
        each = self.whole // array.shape[1]
        return array[:, self.first // each : self.last // each]


def summed(
    b: GraphBuilder,
    x: ir.Value,
    depth: int,
    nbytes: int,
    step: int,
    least: int,
    product: Callable[[ir.Value, Piece], ir.Value],
) -> ir.Value:
    """One product, or the sum of products of pieces of K where the weight of ``nbytes`` is above the
    target's ``max_constant``.

    Pieces are multiples of ``step`` inputs and hold at least ``least``. They are cut along K because
    pieces along N, which read the same tensor, are joined again by TensorRT's compiler into one
    weight; sums over different inputs are not.
    """
    limit = b.target.max_constant
    count = 1 if limit is None else min(math.ceil(nbytes / limit), depth // least)
    if count <= 1:
        return product(x, Piece(0, depth, depth))
    edges = [step * (depth // step * i // count) for i in range(count)] + [depth]
    total: ir.Value | None = None
    for first, last in pairwise(edges):
        part = b.op("Slice", x, b.i64(first), b.i64(last), b.i64(-1))
        part = product(part, Piece(first, last, depth))
        total = part if total is None else b.op("Add", total, part)
    assert total is not None
    return total
