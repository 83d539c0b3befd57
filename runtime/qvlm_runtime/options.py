"""The options of one generation: how tokens are drawn, when it ends, how the prompt is read.

``Options`` is what the code passes on; ``OptionArguments`` names the same fields as the keyword
arguments of ``Model.generate`` and its siblings, for editors and type checkers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypedDict

from qvlm_runtime.errors import PromptError
from qvlm_runtime.grammar import Schema
from qvlm_runtime.sample import Sampling, check_numbers


@dataclass(frozen=True)
class Options(Sampling):
    """Sampling's fields and these. PromptError if one is out of range.

    max_new_tokens: None means 256, or what the cache has room for if that is less. stop: strings
    that end the text and are not part of it. json_schema: the answer keeps to it (grammar.py).
    timeout: seconds from the first read of the stream; the answer then ends with what it has and
    finish "timeout". prefill_chunk: the prompt is run in pieces of that many tokens, which bounds
    the memory of activations and how long a cancellation waits; None runs it as a whole.
    """

    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    json_schema: Schema | None = None
    timeout: float | None = None
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, ("max_new_tokens", "prefill_chunk"), Integral)
        check_numbers(self, ("timeout",), Real)
        if isinstance(self.stop, str) or not all(self.stop):
            raise PromptError(f"stop: got {self.stop!r}, expected a list of non-empty strings.")
        if self.timeout is not None and not (math.isfinite(self.timeout) and self.timeout > 0):
            raise PromptError(f"timeout: got {self.timeout!r}, expected seconds above 0.")
        for name in ("max_new_tokens", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PromptError(f"{name}: got {value}, expected at least 1.")


class OptionArguments(TypedDict, total=False):
    """Options as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    logprobs: int | None
    seed: int | None
    max_new_tokens: int | None
    stop: Sequence[str]
    json_schema: Schema | None
    timeout: float | None
    prefill_chunk: int | None
