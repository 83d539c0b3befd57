"""Which format each unit gets under a budget of bytes: a multiple-choice knapsack over measured divergences.

    min  sum_u kl[u, f(u)]   subject to   sum_u bytes[u, f(u)] <= budget,   one format f(u) for each unit u

It assumes that divergences add; ``qvlm sensitivity`` measures the result and prints both numbers.

1. A state is (bytes, kl) of the units decided so far. Start with (0, 0).
2. Each unit turns every state into one per format. States that cannot be completed within the budget go; of the rest
   the Pareto front stays: with bytes rising, only states of strictly less divergence (Nemhauser and Ullmann 1969).
3. The last state of the last front is the optimum; its choices are followed back.

This is exact. Layers of equal shape make equal byte counts, so the front of a 7B model has thousands of states, not
4^60. Should it pass ``LIMIT``, it is thinned to the best state of each of ``LIMIT`` equal intervals of bytes: the
result still keeps the budget, and is within ``kl - bound`` of the optimum, with the Lagrangian bound

    max over m >= 0 of  sum_u min_f (kl[u, f] + m bytes[u, f]) - m budget

Cost: units x formats x LIMIT additions and one sort per unit. Arrays only: no model, no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qvlm.errors import RecipeError

# States of a front kept exactly: 60 units of 4 formats take a second and 100 MB.
LIMIT = 100_000
# Halvings of the multiplier's interval: beyond float64's 52 digits nothing changes.
_HALVINGS = 60


@dataclass(frozen=True)
class Choice:
    """One format of one unit: bytes as deployed and divergence in nats per token."""

    format: str
    nbytes: int
    kl: float


@dataclass(frozen=True)
class Allocation:
    """A choice per unit. kl: their sum, the prediction; bound: no allocation within the budget has less."""

    choices: Mapping[str, Choice]
    nbytes: int
    kl: float
    bound: float


def allocate(units: Mapping[str, Sequence[Choice]], budget: int, limit: int = LIMIT) -> Allocation:
    """The choices of least total divergence within ``budget`` bytes; RecipeError if there are none."""
    smallest = [min(choice.nbytes for choice in choices) for choices in units.values()]
    if sum(smallest) > budget:
        raise RecipeError(
            f"budget: {budget} bytes for what can be quantized, the smallest formats take {sum(smallest)}. "
            "Raise the budget or add a smaller format."
        )
    left = sum(smallest)
    nbytes, kl = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    exact = True
    for choices, least in zip(units.values(), smallest, strict=True):
        left -= least
        size = np.array([choice.nbytes for choice in choices])[:, None]
        cost = np.array([choice.kl for choice in choices])[:, None]
        all_bytes, all_kl = (nbytes + size).ravel(), (kl + cost).ravel()
        kept = _front(all_bytes, all_kl, budget - left)
        if len(kept) > limit:
            kept, exact = _thinned(kept, all_bytes[kept], limit), False
        trail.append((kept // len(nbytes), kept % len(nbytes)))
        nbytes, kl = all_bytes[kept], all_kl[kept]
    picked = _follow(units, trail)
    total = sum(choice.kl for choice in picked.values())
    bound = total if exact else min(total, lagrangian_bound(units, budget))
    return Allocation(picked, sum(c.nbytes for c in picked.values()), total, bound)


def _front(
    nbytes: npt.NDArray[np.int64], kl: npt.NDArray[np.float64], most: int
) -> npt.NDArray[np.int64]:
    """Indices of the Pareto front within ``most`` bytes, bytes rising and divergence falling."""
    order = np.lexsort((kl, nbytes))
    order = order[nbytes[order] <= most]
    best = np.minimum.accumulate(kl[order])
    better = np.ones(len(order), bool)
    better[1:] = best[1:] < best[:-1]
    front: npt.NDArray[np.int64] = order[better]
    return front


def _thinned(
    kept: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64], limit: int
) -> npt.NDArray[np.int64]:
    """The last state (least divergence) of each interval, and the smallest of all: the way out of a tight budget."""
    edges = np.linspace(nbytes[0], nbytes[-1], limit)
    last = np.searchsorted(nbytes, edges, side="right") - 1
    thinned: npt.NDArray[np.int64] = kept[np.unique(np.concatenate([[0], last]))]
    return thinned


def _follow(
    units: Mapping[str, Sequence[Choice]],
    trail: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
) -> dict[str, Choice]:
    state = len(trail[-1][0]) - 1 if trail else 0
    picked = {}
    for name, (choice, previous) in zip(reversed(list(units)), reversed(trail), strict=True):
        picked[name] = units[name][int(choice[state])]
        state = int(previous[state])
    return dict(reversed(picked.items()))


def lagrangian_bound(units: Mapping[str, Sequence[Choice]], budget: int) -> float:
    """A number that no allocation within the budget goes below."""

    def relaxed(multiplier: float) -> tuple[float, int]:
        best = [
            min(choices, key=lambda c: (c.kl + multiplier * c.nbytes, c.nbytes))
            for choices in units.values()
        ]
        used = sum(c.nbytes for c in best)
        return sum(c.kl for c in best) + multiplier * (used - budget), used

    low, high = 0.0, max(c.kl for choices in units.values() for c in choices) + 1.0
    bound = max(relaxed(low)[0], relaxed(high)[0])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        value, used = relaxed(middle)
        bound = max(bound, value)
        low, high = (middle, high) if used > budget else (low, middle)
    return bound
