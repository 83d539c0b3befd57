"""Several turns on one cache: each turn runs only the tokens that the cache does not hold yet.

The whole conversation is rendered and tokenized again at every turn, and compared token by token
with what the cache holds; rows behind the first difference are forgotten. So an answer never
depends on the cache: a tokenizer that joins the words of two turns, or a template that writes past
answers in another way, costs time and nothing else.

A turn counts once its stream was read to the end (also to an end by cancellation or timeout: the
text so far is the answer). A stream that is closed earlier, or fails, leaves the conversation as it
was.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from qvlm_runtime.aio import AsyncStream
from qvlm_runtime.context import Context
from qvlm_runtime.errors import PromptError
from qvlm_runtime.generate import DEFAULT_NEW_TOKENS
from qvlm_runtime.options import OptionArguments, Options
from qvlm_runtime.stream import Generation, Request, Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from qvlm_runtime.model import Model

WhenFull = Literal["error", "drop_oldest"]


class Conversation:
    """Made by ``Model.conversation``. One answer at a time; several conversations at once.

    messages: the turns so far, in Hugging Face's form; they may be changed between turns.

    when_full says what happens when prompt and answer exceed ``max_rows``: "error" raises
    PromptError, "drop_oldest" leaves out the oldest question with its answer, again until the rest
    fits (the system message stays), and Generation.dropped_messages tells how many messages went.
    With "drop_oldest" an answer without max_new_tokens makes room for 256 tokens.
    """

    def __init__(
        self, model: Model, system: str | None, max_rows: int, when_full: WhenFull
    ) -> None:
        self._model = model
        self._max_rows = max_rows
        self._when_full = when_full
        self._context = Context(model.decoder, max_rows, model.budget)
        self._lock = threading.Lock()
        self._active: weakref.ref[Stream] | None = None
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self.messages.append(_message("system", system))

    @property
    def cache_bytes(self) -> int:
        """Memory that this conversation's cache takes, from its beginning to ``close``."""
        return self._model.cache_bytes(self._max_rows)

    @property
    def cached_tokens(self) -> int:
        """Rows of the cache that are valid."""
        return self._context.state.length

    def ask(
        self, question: str, images: Sequence[Any] = (), **options: Unpack[OptionArguments]
    ) -> Generation:
        """Ask and wait for the answer; arguments and errors are those of ``Model.generate``."""
        return self.stream(question, images, **options).read()

    def stream(
        self, question: str, images: Sequence[Any] = (), **options: Unpack[OptionArguments]
    ) -> Stream:
        """Ask and get the answer in pieces. PromptError while another answer is being read."""
        with self._lock:
            active = self._active() if self._active is not None else None
            if active is not None and not active.closed:
                raise PromptError(
                    "the conversation is answering. Read its stream to the end or close it first."
                )
            asked = _message("user", question, self._model.pictures(images))
            messages, request = self._fitting([*self.messages, asked], Options(**options))

            def finished(generation: Generation) -> None:
                self.messages = [*messages, _message("assistant", generation.text)]

            stream = Stream(self._model, request, self._context, _keep, finished)
            self._active = weakref.ref(stream)
            return stream

    def astream(
        self, question: str, images: Sequence[Any] = (), **options: Unpack[OptionArguments]
    ) -> AsyncStream:
        """As ``stream``, for ``async for``; all work is done in the event loop's threads."""
        return AsyncStream(lambda: self.stream(question, images, **options))

    async def aask(
        self, question: str, images: Sequence[Any] = (), **options: Unpack[OptionArguments]
    ) -> Generation:
        """As ``ask``, awaited. Cancelling the task ends the answer within one token."""
        return await self.astream(question, images, **options).read()

    def close(self) -> None:
        """Free the cache; a later question raises SessionError."""
        self._context.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _fitting(
        self, messages: list[dict[str, Any]], options: Options
    ) -> tuple[list[dict[str, Any]], Request]:
        """The messages that fit, by the policy, and the request made of them."""
        room = options.max_new_tokens or DEFAULT_NEW_TOKENS
        dropped = 0
        while self._when_full == "drop_oldest":
            shorter = _without_oldest(messages)
            if shorter is None or self._model.count_tokens(messages) + room <= self._max_rows:
                break
            dropped += len(messages) - len(shorter)
            messages = shorter
        request = self._model.request(messages, (), options, self._max_rows, dropped)
        return messages, request


def _keep(failed: bool) -> None:
    """The cache stays the conversation's, also when an answer failed."""


def _without_oldest(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Without the first question and its answer; None if only the last question is there."""
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return messages[: asked[0]] + messages[asked[1] :] if len(asked) > 1 else None


def _message(role: str, text: str, pictures: Sequence[Any] = ()) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}
