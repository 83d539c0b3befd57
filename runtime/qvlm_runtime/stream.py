"""One answer while it is made: pieces of text, cancellation, timeout, and the Generation at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from qvlm_runtime.context import Context
from qvlm_runtime.errors import PromptError
from qvlm_runtime.generate import StopText, Timings, tokens
from qvlm_runtime.options import Options
from qvlm_runtime.prompt import Prompt
from qvlm_runtime.sample import Chooser, Score
from qvlm_runtime.tokenizer import Detokenizer

if TYPE_CHECKING:
    from qvlm_runtime.model import Model

Finish = Literal["stop", "stop_string", "length", "cancelled", "timeout"]


@dataclass(frozen=True)
class Generation:
    """One finished answer.

    token_ids: every generated id, the end token included. finish: "stop" (an end token),
    "stop_string", "length" (max_new_tokens), "cancelled" or "timeout" (the text is what there was).
    scores: one for each token if log-probabilities were asked for. dropped_messages: messages that
    a conversation left out of the prompt to make room.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    timings: Timings
    scores: tuple[Score, ...] = ()
    dropped_messages: int = 0


@dataclass(frozen=True)
class Request:
    """What one answer is made from; ``limit`` is the largest number of new tokens."""

    prompt: Prompt
    options: Options
    chooser: Chooser
    limit: int
    timings: Timings
    dropped_messages: int = 0


class Stream(Iterator[str]):
    """Pieces of one answer's text; ``generation`` when the last was read.

    Read by one thread. ``cancel`` may be called from any: the answer then ends before another token
    is computed. A stream that is left early is closed with ``close``, a with statement, or by
    dropping it; that frees its cache.
    """

    def __init__(
        self,
        model: Model,
        request: Request,
        context: Context,
        release: Callable[[bool], None],
        on_finish: Callable[[Generation], None] | None = None,
    ) -> None:
        """release: what becomes of the context; called once, at the end, with whether the answer
        failed. on_finish: called with an answer that was read to its end.
        """
        self.closed = False
        self._failed = False
        self._answer = _Answer(model, request, on_finish)
        self._release = release
        self._pieces = self._answer.run(context)

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except BaseException as end:  # the end, a fault or an interrupt: nothing is left to run
            self._failed = not isinstance(end, StopIteration)
            self.close()
            raise

    def read(self) -> Generation:
        """Read all pieces that are left; the finished answer."""
        for _ in self:
            pass
        return self.generation

    @property
    def generation(self) -> Generation:
        """The finished answer. PromptError while pieces are still to be read."""
        if self._answer.generation is None:
            raise PromptError("the stream is not finished. Read all of its pieces first.")
        return self._answer.generation

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids generated so far."""
        return tuple(self._answer.ids)

    @property
    def scores(self) -> list[Score]:
        """Scores of the tokens so far, if log-probabilities were asked for."""
        return self._answer.request.chooser.scores

    @property
    def timings(self) -> Timings:
        """Times and counts so far."""
        return self._answer.request.timings

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._answer.cancel.is_set()

    def cancel(self) -> None:
        """End the answer before another token is computed. Safe from any thread, at any time."""
        self._answer.cancel.set()

    def close(self) -> None:
        """Stop reading and free what the answer holds. For the thread that reads."""
        if not self.closed:
            self.closed = True
            self._pieces.close()
            self._release(self._failed)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Answer:
    """What runs behind a Stream. It does not know the Stream, so dropping that ends it at once."""

    def __init__(
        self, model: Model, request: Request, on_finish: Callable[[Generation], None] | None
    ) -> None:
        self.request = request
        self.cancel = threading.Event()
        self.generation: Generation | None = None
        self.ids: list[int] = []
        self._model = model
        self._on_finish = on_finish
        self._deadline: float | None = None
        self._finish: Finish = "length"

    def run(self, context: Context) -> Generator[str, None, None]:
        """The pieces; ``generation`` is set behind the last."""
        options, keys = self.request.options, self.request.prompt.keys()
        if options.timeout is not None:
            self._deadline = time.monotonic() + options.timeout
        stops, detokenizer = StopText(options.stop), Detokenizer(self._model.tokenizer)
        given, ids = list[str](), self.ids
        try:
            for token in self._tokens(context, context.reuse(keys)):
                ids.append(token)
                if token in self._model.stop_ids:
                    self._finish = "stop"
                    break
                piece = stops.push(detokenizer.push(token))
                if piece:
                    given.append(piece)
                    yield piece
                if stops.stopped:
                    break
            if not stops.stopped:
                last = stops.push(detokenizer.flush()) + stops.flush()
                if last:
                    given.append(last)
                    yield last
        finally:
            context.record([*keys, *ids])
        if stops.stopped:
            self._finish = "stop_string"
        self.generation = Generation(
            "".join(given),
            tuple(ids),
            self._finish,
            self.request.timings,
            tuple(self.request.chooser.scores),
            self.request.dropped_messages,
        )
        if self._on_finish is not None:
            self._on_finish(self.generation)

    def _tokens(self, context: Context, kept: int) -> Iterator[int]:
        """Vision for the pictures behind the kept rows, then the loop."""
        request, model = self.request, self._model
        timings = request.timings
        timings.cached_tokens = kept
        part = request.prompt.behind(kept)
        timings.cached_images = len(request.prompt.pictures) - len(part.pictures)
        start = time.perf_counter()
        features = model.features(part.pictures, timings, self._halt)
        timings.vision_s = time.perf_counter() - start
        if self._halt():
            return
        context.state.set_features(features)
        yield from tokens(
            context.state,
            part.token_ids,
            part.image_index,
            part.positions,
            request.chooser,
            model.stop_ids,
            request.limit,
            timings,
            request.options.prefill_chunk,
            self._halt,
        )

    def _halt(self) -> bool:
        if self.cancel.is_set():
            self._finish = "cancelled"
        elif self._deadline is not None and time.monotonic() >= self._deadline:
            self._finish = "timeout"
        else:
            return False
        return True
