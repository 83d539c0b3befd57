"""Calibration samples that choose between results instead of making them: how a stage that does not help is found out.

Every stage lowers the error on the samples it is fitted to; whether it helped shows on others. One sample in eight is
held out of all fitting; of a weight's successive results the one with the least error on those is kept.
"""

from __future__ import annotations

import math

from torch import Tensor

from qvlm import affine
from qvlm.affine import QuantizedWeight
from qvlm.descent import stream_error
from qvlm.hessian import Statistics

HELD_OUT_EVERY = 8


def split(count: int) -> tuple[list[int], list[int]]:
    """Samples to fit, and those held out; ([0], []) for one sample."""
    held = list(range(HELD_OUT_EVERY - 1, count, HELD_OUT_EVERY)) or [count - 1]
    fit = [i for i in range(count) if i not in set(held)]
    return (fit, held) if fit else ([0], [])


class Best:
    """The best of the integers offered for one weight [out, in] by H and D of held-out samples; the last without them.

    errors: every offer's ``descent.stream_error`` by the name of its stage.
    """

    def __init__(self, weight: Tensor, held: Statistics | None) -> None:
        self.errors: dict[str, float] = {}
        self._float, self._held = weight, held
        self._shift = None if held is None else held.shift(weight)
        self._least = math.inf
        self._winner: QuantizedWeight | None = None

    @property
    def weight(self) -> QuantizedWeight:
        """The winner so far; something must have been offered."""
        if self._winner is None:
            raise ValueError("nothing was offered")
        return self._winner

    def offer(self, stage: str, candidate: QuantizedWeight) -> None:
        """Keep the candidate if it beats all before it."""
        if self._held is None:
            self._winner = candidate
            return
        values = affine.dequantize(candidate)
        error = stream_error(values, self._float, self._held.hessian, self._shift)
        self.errors[stage] = error
        if error < self._least:
            self._least, self._winner = error, candidate
