"""One folder being measured: the runs that measure asks for, on a loaded model.

Every run goes the way of an application (``Model.generate``); only the end tokens are taken away,
so that an answer has the length that was asked for. Each run gets new random frames: a cache of
image features must not answer for the vision graph.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qvlm_runtime.backend import FAST
from qvlm_runtime.bench.plan import Case
from qvlm_runtime.decoder import DecoderState
from qvlm_runtime.errors import PromptError
from qvlm_runtime.loading import load
from qvlm_runtime.manifest import read_manifest, verify_files
from qvlm_runtime.model import Model

Clock = Callable[[], float]
_CHUNK = 256  # tokens of one prefill while a cache is filled


@dataclass(frozen=True)
class Load:
    """Seconds to open the folder, in a fresh process with the imports that takes, and to hash all its
    files before, which leaves them in the page cache; resident bytes before, after and at most.
    """

    seconds: float
    verify_seconds: float
    before_bytes: int
    after_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class FirstToken:
    """Seconds of the parts and of the whole call that gives one token; tokens of the prompt."""

    preprocess: float
    vision: float
    prefill: float
    whole: float
    prompt_tokens: int


@dataclass(frozen=True)
class Repeated:
    """``count`` runs of a part took ``seconds``."""

    count: int
    seconds: float


class Subject(Protocol):
    """What measure drives. FolderSubject is one; worker has one in a process of its own."""

    name: str

    def load(self) -> Load:
        """Open the model; the first call."""

    def target(self) -> str:
        """The target whose graphs were opened."""

    def backend(self) -> str:
        """The engine that runs them."""

    def max_rows(self) -> int:
        """Cache rows of a sequence."""

    def fill(self, context: int) -> tuple[int, int]:
        """Prefill a sequence up to ``context`` tokens; resident bytes now and at most so far."""

    def decode(self, context: int, steps: int) -> list[float]:
        """Seconds of each of ``steps`` decode steps behind ``context`` tokens that were filled."""

    def first_token(self, case: Case) -> FirstToken:
        """Ask for one token."""

    def answer(self, case: Case) -> float:
        """Seconds of a whole answer of the case's length."""

    def repeat(self, part: str, seconds: float) -> Repeated:
        """Run "image" (preprocessing and vision of one frame) or "token" (a decode step) that long."""

    def peak_bytes(self) -> int:
        """The most memory that was resident so far."""

    def close(self) -> None:
        """Let go of the model."""


class FolderSubject:
    """A model folder in this process."""

    def __init__(
        self,
        folder: Path,
        *,
        target: str | None = None,
        backend: str | None = None,
        threads: int | None = None,
        accuracy_level: int = FAST,
        prepared: str | None = None,
        image_size: Sequence[int] = (640, 480),
        clock: Clock = time.perf_counter,
    ) -> None:
        self.name = str(folder)
        self._folder, self._image_size, self._clock = folder, image_size, clock
        self._options: dict[str, Any] = {
            "target": target,
            "backend": backend,
            "threads": threads,
            "accuracy_level": accuracy_level,
            "prepared": prepared,
        }
        self._random = np.random.default_rng(0)
        self._model: Model | None = None
        self._prompts: dict[tuple[int, int], str] = {}
        self._filling: DecoderState | None = None
        self._states: dict[int, DecoderState] = {}

    @property
    def model(self) -> Model:
        """The loaded model."""
        assert self._model is not None, "load() comes first"
        return self._model

    def load(self) -> Load:
        """Hash the files, then open the folder."""
        before = memory()[0]
        start = self._clock()
        verify_files(self._folder, read_manifest(self._folder))
        hashed = self._clock()
        model = load(self._folder, verify=False, **self._options)
        seconds = self._clock() - hashed
        spec = dataclasses.replace(model.manifest.model, eos_token_ids=())
        manifest = dataclasses.replace(model.manifest, model=spec)
        self._model = dataclasses.replace(model, manifest=manifest)
        after, peak = memory()
        return Load(seconds, hashed - start, before, after, peak)

    def target(self) -> str:
        """The target whose graphs were opened."""
        return self.model.target

    def backend(self) -> str:
        """The engine that runs them."""
        return self.model.backend

    def max_rows(self) -> int:
        """Cache rows of a sequence."""
        return self.model.decoder.max_rows

    def fill(self, context: int) -> tuple[int, int]:
        """Prefill in pieces of 256 random tokens; contexts grow from call to call."""
        decoder = self.model.decoder
        if self._filling is None:
            self._filling = decoder.start(decoder.max_rows)
        self._prefill(self._filling, context)
        return memory()

    def _prefill(self, state: DecoderState, context: int) -> None:
        vocab = self.model.manifest.model.vocab_size
        while state.length < context:
            count = min(_CHUNK, context - state.length)
            state.step(self._random.integers(0, vocab, count))

    def decode(self, context: int, steps: int) -> list[float]:
        """Each context has a sequence of its own from its first call on, which goes back to ``context``
        rows: one that went on from context to context would be prefilled again in every round.
        """
        self._filling = None
        if context not in self._states:
            self._states[context] = self.model.decoder.start(context + steps)
            self._prefill(self._states[context], context)
        state = self._states[context]
        state.rewind(context)
        times = []
        for _ in range(steps):
            start = self._clock()
            logits = state.step((1,))
            int(logits.argmax())
            times.append(self._clock() - start)
        return times

    def first_token(self, case: Case) -> FirstToken:
        """One generation of one token; the clock is around the whole call."""
        prompt, frames = self._prompt(case), self._frames(case.images)
        start = self._clock()
        timings = self.model.generate(prompt, frames, max_new_tokens=1).timings
        whole = self._clock() - start
        parts = (timings.preprocess_s, timings.vision_s, timings.prefill_s)
        return FirstToken(*parts, whole, timings.prompt_tokens)

    def answer(self, case: Case) -> float:
        """A whole generation, detokenising included."""
        prompt, frames = self._prompt(case), self._frames(case.images)
        start = self._clock()
        self.model.generate(prompt, frames, max_new_tokens=case.output_tokens)
        return self._clock() - start

    def repeat(self, part: str, seconds: float) -> Repeated:
        """At least one run; tokens are decoded behind the longest context that was decoded at."""
        count, elapsed = 0, 0.0
        context = max(self._states, default=0)
        frames = self._frames(1)
        start = self._clock()
        while count == 0 or elapsed < seconds:
            if part == "image":
                features = self.model.image_features(self.model.pictures(frames))
                features.buffer.read(0, (1,))  # waits for a GPU, which only took the order so far
            else:
                self.decode(context, 1)
            count += 1
            elapsed = self._clock() - start
        return Repeated(count, elapsed)

    def peak_bytes(self) -> int:
        """The most memory that was resident so far."""
        return memory()[1]

    def close(self) -> None:
        """Release the graphs."""
        self._filling = None
        self._states.clear()
        self.model.close()

    def _frames(self, count: int) -> list[np.ndarray]:
        width, height = self._image_size
        return [self._random.integers(0, 256, (height, width, 3), np.uint8) for _ in range(count)]

    def _prompt(self, case: Case) -> str:
        """A text with the case's number of text tokens, or the next more that words can make."""
        key = (case.prompt_tokens, case.images)
        if key not in self._prompts:
            model = self.model
            pictures = model.pictures(self._frames(case.images))

            def tokens(words: int) -> float:
                try:
                    ready = model.prepare(" ".join(["the"] * words), pictures)
                except PromptError:  # too long for the cache, so more than enough words
                    return math.inf
                return ready.image_index.count(-1)

            count = least_words(case.prompt_tokens, tokens)
            self._prompts[key] = " ".join(["the"] * count)
        return self._prompts[key]


def least_words(wanted: int, tokens: Callable[[int], float]) -> int:
    """The least number of words, 1 or more, that makes ``wanted`` tokens.

    PromptError if words make no tokens, as with a tokenizer that takes a text for one word.
    """
    low, high = 0, 1
    while tokens(high) < wanted:
        low, high = high, 2 * high
        if high > 4 * wanted + 64:
            raise PromptError(
                f"prompt_tokens: {low} words make {tokens(low)} tokens, expected {wanted}. "
                "This folder's tokenizer cannot be measured."
            )
    while high - low > 1:
        middle = (low + high) // 2
        if tokens(middle) < wanted:
            low = middle
        else:
            high = middle
    return high


def memory() -> tuple[int, int]:
    """Resident bytes of this process now and at most, as Linux counts them."""
    values = {}
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            values[name] = 1024 * int(rest.split()[0])
    return values["VmRSS"], values["VmHWM"]
