"""The one loop: prefill, then decode, as a generator of tokens; and where its text stops.

Nothing here knows files, images or chat: ``tokens`` needs a decoder state, ``StopText`` needs text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime.decoder import DecoderState
from qvlm_runtime.errors import PromptError
from qvlm_runtime.penalties import Logits

DEFAULT_NEW_TOKENS = 256


@dataclass
class Timings:
    """Seconds and counts of one generation. Decode is every step after the prefill.

    TensorRT's vision graph is put in the GPU's queue and not waited for: its time is in the prefill
    there, which is.

    cached_images are those of ``images`` whose features were known; cached_tokens those of
    ``prompt_tokens`` whose cache rows were kept from an answer before, so that only the others had
    to be run; run_tokens those of them that were, which is fewer where an answer ended early.
    """

    preprocess_s: float = 0.0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    images: int = 0
    prompt_tokens: int = 0
    decode_steps: int = 0
    cached_images: int = 0
    cached_tokens: int = 0
    run_tokens: int = 0

    @property
    def decode_tokens_per_s(self) -> float:
        """Decode speed; 0.0 when there was no decode step."""
        return self.decode_steps / self.decode_s if self.decode_s > 0 else 0.0


def never() -> bool:
    """The ``halt`` of a generation that nobody can interrupt."""
    return False


def tokens(
    state: DecoderState,
    prompt_ids: Sequence[int],
    image_index: Sequence[int],
    positions: NDArray[np.int64],
    choose: Callable[[Logits], int],
    stop_ids: Collection[int],
    max_new_tokens: int,
    timings: Timings,
    prefill_chunk: int | None = None,
    halt: Callable[[], bool] = never,
) -> Iterator[int]:
    """New token ids, ending with the first that is in ``stop_ids`` or after ``max_new_tokens``.

    positions: int64 [1 or 3, S], those of the prompt. prefill_chunk: the prompt is run in pieces of
    that many tokens; None runs it at once. halt is asked before every piece and every step, and
    ends the iterator. ``timings`` is filled while the loop runs; the time its consumer takes is not
    counted.
    """
    start = time.perf_counter()
    chunk = prefill_chunk or len(prompt_ids)
    for at in range(0, len(prompt_ids), chunk):
        if halt():
            return
        piece = slice(at, at + chunk)
        logits = state.step(prompt_ids[piece], image_index[piece], positions[:, piece])
        timings.run_tokens += len(prompt_ids[piece])
    token = choose(logits)
    timings.prefill_s = time.perf_counter() - start
    yield token
    for _ in range(max_new_tokens - 1):
        if token in stop_ids or halt():
            return
        start = time.perf_counter()
        token = choose(state.step((token,)))
        timings.decode_s += time.perf_counter() - start
        timings.decode_steps += 1
        yield token


def new_token_limit(prompt_tokens: int, max_new_tokens: int | None, max_rows: int) -> int:
    """The number of tokens to generate; None means 256, or what there is room for if that is less.

    PromptError if the prompt alone, or the prompt and ``max_new_tokens``, exceed ``max_rows``.
    """
    room = max_rows - prompt_tokens
    if room < 1:
        raise PromptError(
            f"the prompt has {prompt_tokens} tokens and the cache {max_rows} rows, "
            "expected room for one new token. Use a shorter prompt or fewer images."
        )
    if max_new_tokens is None:
        return min(DEFAULT_NEW_TOKENS, room)
    if max_new_tokens > room:
        raise PromptError(
            f"{prompt_tokens} prompt tokens + max_new_tokens {max_new_tokens} exceed the cache of "
            f"{max_rows} rows. Use a shorter prompt or max_new_tokens of at most {room}."
        )
    return max_new_tokens


@dataclass
class StopText:
    """Cuts a stream of text before the first stop string, also one that spans several pieces.

    Text that could be the beginning of a stop string is held back until it is decided.
    """

    stops: Sequence[str]
    stopped: bool = field(default=False, init=False)
    _held: str = field(default="", init=False)

    def push(self, piece: str) -> str:
        """The text that may be given out after one more piece; sets ``stopped``."""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back when the stream ended without a stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
