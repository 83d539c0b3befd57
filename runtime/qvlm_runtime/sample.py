"""Logits to the next token: greedy, temperature, top-k and top-p as pure functions of arrays.

The order is temperature, then top-k, then top-p, as transformers applies them. Ties are broken
towards the lower token id everywhere, so top_k=1 and temperature -> 0 are greedy exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime.errors import PromptError, SessionError

Logits = NDArray[np.float32]
_FIRST_NUCLEUS = 1024  # candidates sorted first for top-p; most nuclei are smaller


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy, and the other three then change nothing.

    top_k 0 and top_p 1.0 keep every token; seed None draws fresh entropy. PromptError if a number
    is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, holds, wants in (
            ("temperature", self.temperature, self.temperature >= 0, "a number of at least 0"),
            ("top_k", self.top_k, self.top_k >= 0, "an integer of at least 0 (0: all tokens)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("seed", self.seed, self.seed is None or self.seed >= 0, "an integer of at least 0"),
        ):
            if not holds or (value is not None and not math.isfinite(value)):
                raise PromptError(f"{name}: got {value!r}, expected {wants}.")

    def chooser(self) -> Callable[[Logits], int]:
        """A function from logits float32 [vocab] to a token id; owns this generation's generator.

        It raises SessionError if the largest logit is not a finite number.
        """
        generator = np.random.default_rng(self.seed) if self.temperature > 0 else None

        def choose(logits: Logits) -> int:
            best = int(np.argmax(logits))  # the first NaN, if there is one
            if not np.isfinite(logits[best]):
                raise SessionError(
                    f"decoder: logit of token {best} is {logits[best]}, expected a finite number. "
                    "The graph overflows its float type: export again with the range audit on."
                )
            if generator is None or self.top_k == 1:
                return best
            ids, weights = candidates(logits, self.temperature, self.top_k, self.top_p)
            return draw(ids, weights, float(generator.random()))

        return choose


def candidates(
    logits: Logits, temperature: float, top_k: int, top_p: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The tokens that may be drawn and their weights.

    Weights are exp((logit - max) / temperature) in float64, not normalised. top-k and top-p keep
    the leading tokens by falling weight, ties by token id; top-p the smallest set whose share of
    all weight (after top-k) is at least top_p. When all are kept they stay in the order of ids:
    sorting a vocabulary of 150,000 takes longer than many a decode step.
    """
    largest = float(logits.max())

    def weigh(values: Logits) -> NDArray[np.float64]:
        weights: NDArray[np.float64] = np.exp((values.astype(np.float64) - largest) / temperature)
        return weights

    if top_k and top_k < logits.size:
        ids = _leading(logits, top_k)
        weights = weigh(logits[ids])
        total = float(weights.sum())
    else:
        everything = weigh(logits)
        total = float(everything.sum())
        if top_p == 1:
            return np.arange(logits.size), everything
        count = _FIRST_NUCLEUS
        ids = _leading(logits, count)
        while ids.size < logits.size and float(everything[ids].sum()) < top_p * total:
            count *= 4
            ids = _leading(logits, count)
        weights = everything[ids]
    if top_p < 1:
        kept = int(np.searchsorted(np.cumsum(weights), top_p * total, side="left")) + 1
        ids, weights = ids[:kept], weights[:kept]
    return ids, weights


def draw(ids: NDArray[np.intp], weights: NDArray[np.float64], uniform: float) -> int:
    """The id whose interval of the cumulative weight holds ``uniform`` in [0, 1)."""
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(ids[min(index, ids.size - 1)])


def _leading(values: Logits, count: int) -> NDArray[np.intp]:
    """Indices of the ``count`` largest values, falling, ties by index."""
    if count >= values.size:
        return np.argsort(-values, kind="stable")
    threshold = np.partition(values, values.size - count)[values.size - count]
    held = np.flatnonzero(values >= threshold)
    return held[np.argsort(-values[held], kind="stable")[:count]]
