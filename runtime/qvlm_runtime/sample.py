"""Logits to the next token: greedy, temperature, top-k, top-p and min-p as functions of arrays.

The order is that of transformers: penalties and bias, a schema's mask, temperature, top-k, top-p,
min-p. Ties are broken towards the lower token id everywhere, so top_k=1 and temperature -> 0 are
greedy exactly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime import penalties
from qvlm_runtime.errors import PromptError, SessionError
from qvlm_runtime.penalties import Logits

_FIRST_NUCLEUS = 1024  # candidates sorted first for top-p; most nuclei are smaller
_REALS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_LARGEST_BIAS = 1e4  # far beyond any logit, and finite in float32 after every other step


class Constraint(Protocol):
    """What an answer may look like, token by token (grammar.py)."""

    def mask(self, logits: Logits) -> None:
        """Set the logits of the tokens that cannot come next to minus infinity."""

    def accept(self, token: int) -> None:
        """The token was chosen."""


@dataclass(frozen=True)
class Score:
    """The log-probability (natural) of a generated token, and the most likely ones instead of it.

    top: (token id, log-probability), falling. Both are the model's own, before temperature,
    penalties, bias and a schema.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_k, top_p, min_p and seed then change nothing.

    top_k 0, top_p 1.0 and min_p 0.0 keep every token; min_p keeps tokens of at least that share of
    the most likely one's probability. repetition_penalty 1.0 and the other two at 0.0 are off.
    logit_bias: token id to a number that is added. logprobs: how many alternatives to report with
    each token's log-probability; None reports nothing. seed None draws fresh entropy. PromptError
    if a number is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_numbers(self, ("top_k", "logprobs", "seed"), Integral)
        check_numbers(self, _REALS, Real)
        for name, holds, wants in (
            ("temperature", self.temperature >= 0, "a number of at least 0"),
            ("top_k", self.top_k >= 0, "an integer of at least 0 (0: all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "a number in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "a number above 0 (1: off)"),
            ("presence_penalty", True, "a finite number"),
            ("frequency_penalty", True, "a finite number"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "an integer of at least 0"),
            ("seed", self.seed is None or self.seed >= 0, "an integer of at least 0"),
        ):
            value = getattr(self, name)
            if not holds or (value is not None and not math.isfinite(value)):
                raise PromptError(f"{name}: got {value!r}, expected {wants}.")
        for token, amount in self.logit_bias.items():
            numbers = isinstance(token, Integral) and isinstance(amount, Real)
            if not numbers or token < 0 or not abs(amount) <= _LARGEST_BIAS:
                raise PromptError(
                    f"logit_bias: got {token!r}: {amount!r}, expected a token id and a number "
                    f"between -{_LARGEST_BIAS:g} and {_LARGEST_BIAS:g}."
                )

    def chooser(
        self, prompt_ids: Sequence[int] = (), constraint: Constraint | None = None
    ) -> Chooser:
        """The state of one generation: its random generator and what it has said."""
        return Chooser(self, prompt_ids, constraint)


def check_numbers(options: Sampling, names: Sequence[str], kind: type) -> None:
    """PromptError for the first of these fields that is neither None nor of the kind."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not isinstance(value, kind):
            wants = "an integer" if kind is Integral else "a number"
            raise PromptError(f"{name}: got {value!r}, expected {wants}.")


class Chooser:
    """A function from logits float32 [vocab] to a token id; belongs to one generation.

    ``scores`` holds a Score for each token chosen, if log-probabilities are asked for. A call
    raises SessionError if the largest logit is not a finite number.
    """

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int], constraint: Constraint | None
    ) -> None:
        self._sampling = sampling
        self._constraint = constraint
        self._generator = np.random.default_rng(sampling.seed) if sampling.temperature > 0 else None
        self._repeats = sampling.repetition_penalty != 1
        self._counts_matter = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._adjusts = bool(
            self._repeats or self._counts_matter or sampling.logit_bias or constraint is not None
        )
        self._seen = set(prompt_ids) if self._repeats else set[int]()
        self._counts = Counter[int]()
        self.scores: list[Score] = []

    def __call__(self, logits: Logits) -> int:
        best = int(np.argmax(logits))  # the first NaN, if there is one
        if not np.isfinite(logits[best]):
            raise SessionError(
                f"decoder: logit of token {best} is {logits[best]}, expected a finite number. "
                "The graph overflows its float type: export again with the range audit on."
            )
        adjusted = logits
        if self._adjusts:
            adjusted = self._adjust(logits)
            best = int(np.argmax(adjusted))
        token = self._pick(adjusted, best)
        self._note(logits, token)
        return token

    def _adjust(self, logits: Logits) -> Logits:
        rules, adjusted = self._sampling, logits.copy()
        if self._repeats:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            penalties.repetition(adjusted, seen, rules.repetition_penalty)
        if self._counts_matter:
            penalties.counted(
                adjusted, self._counts, rules.presence_penalty, rules.frequency_penalty
            )
        penalties.bias(adjusted, rules.logit_bias)
        if self._constraint is not None:
            self._constraint.mask(adjusted)
        return adjusted

    def _pick(self, logits: Logits, best: int) -> int:
        rules = self._sampling
        if self._generator is None or rules.top_k == 1:
            return best
        ids, weights = candidates(logits, rules.temperature, rules.top_k, rules.top_p, rules.min_p)
        return draw(ids, weights, float(self._generator.random()))

    def _note(self, logits: Logits, token: int) -> None:
        if self._repeats:
            self._seen.add(token)
        if self._counts_matter:
            self._counts[token] += 1
        if self._constraint is not None:
            self._constraint.accept(token)
        if self._sampling.logprobs is not None:
            self.scores.append(score(logits, token, self._sampling.logprobs))


def candidates(
    logits: Logits, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The tokens that may be drawn and their weights.

    Weights are exp((logit - max) / temperature) in float64, not normalised. top-k and top-p keep
    the leading tokens by falling weight, ties by token id; top-p the smallest set whose share of
    all weight (after top-k) is at least top_p, min-p those of at least min_p times the largest
    weight. When all are kept they stay in the order of ids:
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
            return _at_least(np.arange(logits.size), everything, min_p)
        count = _FIRST_NUCLEUS
        ids = _leading(logits, count)
        while ids.size < logits.size and float(everything[ids].sum()) < top_p * total:
            count *= 4
            ids = _leading(logits, count)
        weights = everything[ids]
    if top_p < 1:
        kept = int(np.searchsorted(np.cumsum(weights), top_p * total, side="left")) + 1
        ids, weights = ids[:kept], weights[:kept]
    return _at_least(ids, weights, min_p)


def _at_least(
    ids: NDArray[np.intp], weights: NDArray[np.float64], min_p: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The tokens whose weight is min_p or more; the largest weight of all is 1."""
    if min_p == 0:
        return ids, weights
    kept = weights >= min_p
    return ids[kept], weights[kept]


def draw(ids: NDArray[np.intp], weights: NDArray[np.float64], uniform: float) -> int:
    """The id whose interval of the cumulative weight holds ``uniform`` in [0, 1)."""
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(ids[min(index, ids.size - 1)])


def score(logits: Logits, token: int, alternatives: int) -> Score:
    """Log-softmax, in float64, of a token and of the ``alternatives`` largest logits."""
    values = logits.astype(np.float64)
    largest = values.max()
    norm = float(largest + np.log(np.exp(values - largest).sum()))
    ids = _leading(logits, alternatives) if alternatives else ()
    top = tuple((int(i), float(values[i]) - norm) for i in ids)
    return Score(token, float(values[token]) - norm, top)


def _leading(values: Logits, count: int) -> NDArray[np.intp]:
    """Indices of the ``count`` largest values, falling, ties by index."""
    if count >= values.size:
        return np.argsort(-values, kind="stable")
    threshold = np.partition(values, values.size - count)[values.size - count]
    held = np.flatnonzero(values >= threshold)
    return held[np.argsort(-values[held], kind="stable")[:count]]
