"""OpenAI's chat completions: the fields of a request to a question and Options, an answer to JSON.

A field that would change the answer and is not known here is refused by name, not ignored. Without
``temperature`` the answer is greedy (OpenAI's own default is 1). Beyond OpenAI's: top_k, min_p and
repetition_penalty, which clients pass through ``extra_body``.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from qvlm_runtime.errors import PromptError
from qvlm_runtime.options import OptionArguments, Options
from qvlm_runtime.sample import Score
from qvlm_runtime.serve.asgi import HttpError
from qvlm_runtime.serve.limits import Limits
from qvlm_runtime.stream import Generation

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Accepted and without an effect on the answer.
_NO_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"
}  # fmt: skip
_NUMBERS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
)  # fmt: skip
_INTEGERS = ("top_k", "seed")
_OTHERS = {
    "model", "messages", "max_tokens", "max_completion_tokens", "stop", "stream", "stream_options",
    "logit_bias", "logprobs", "top_logprobs", "n", "response_format",
}  # fmt: skip
_LOGPROBS = 20
_STOPS = 16
_FINISH = {"stop": "stop", "stop_string": "stop", "length": "length"}


@dataclass(frozen=True)
class Ask:
    """A parsed request. urls are the images' addresses in the order of the image parts."""

    model: str
    messages: list[dict[str, Any]]
    urls: list[str]
    options: OptionArguments
    stream: bool
    include_usage: bool


def parse_request(body: Mapping[str, Any], limits: Limits) -> Ask:
    """Check every field. HttpError 400 naming the first that is wrong."""
    known = {*_NO_EFFECT, *_NUMBERS, *_INTEGERS, *_OTHERS}
    unknown = sorted(key for key, value in body.items() if key not in known and value is not None)
    if unknown:
        raise HttpError(400, f"{unknown[0][:40]}: not supported here.")
    if _value(body, "n", int, 1) != 1:
        raise HttpError(400, "n: only one answer to a request.")
    urls = list[str]()
    messages = _messages(body.get("messages"), urls)
    if len(urls) > limits.images:
        raise HttpError(400, f"messages: {len(urls)} images, at most {limits.images}.")
    stream_options = _value(body, "stream_options", dict, {})
    return Ask(
        _value(body, "model", str, ""),
        messages,
        urls,
        _options(body, limits),
        _value(body, "stream", bool, False),
        _value(stream_options, "include_usage", bool, False),
    )


def _options(body: Mapping[str, Any], limits: Limits) -> OptionArguments:
    options: dict[str, Any] = {"prefill_chunk": limits.prefill_chunk}
    options["max_new_tokens"] = _max_tokens(body, limits)
    options["stop"] = _stops(body)
    for names, kind in ((_NUMBERS, float), (_INTEGERS, int)):
        options |= {k: _value(body, k, kind, None) for k in names if body.get(k) is not None}
    if body.get("logit_bias") is not None:
        options["logit_bias"] = _bias(_value(body, "logit_bias", dict, {}))
    top = _value(body, "top_logprobs", int, 0)
    if _value(body, "logprobs", bool, False):
        if not 0 <= top <= _LOGPROBS:
            raise HttpError(400, f"top_logprobs: got {top}, expected 0 to {_LOGPROBS}.")
        options["logprobs"] = top
    elif top:
        raise HttpError(400, "top_logprobs: expected logprobs: true beside it.")
    options["json_schema"] = _schema(body)
    try:
        Options(**options)
    except PromptError as error:
        raise HttpError(400, str(error)) from error
    return cast(OptionArguments, options)


def _max_tokens(body: Mapping[str, Any], limits: Limits) -> int | None:
    asked = [
        _value(body, key, int, None)
        for key in ("max_completion_tokens", "max_tokens")
        if body.get(key) is not None
    ]
    if not asked:
        return None if limits.new_tokens >= 256 else limits.new_tokens
    if not 1 <= asked[0] <= limits.new_tokens:
        message = f"max_tokens: got {asked[0]}, expected 1 to {limits.new_tokens}."
        raise HttpError(400, message)
    number: int = asked[0]
    return number


def _stops(body: Mapping[str, Any]) -> list[str]:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if (
        not isinstance(stops, list)
        or len(stops) > _STOPS
        or not all(isinstance(text, str) for text in stops)
    ):
        raise HttpError(400, f"stop: expected a string or a list of at most {_STOPS} strings.")
    return stops


def _bias(given: Mapping[str, Any]) -> dict[int, float]:
    if not all(key.isdecimal() and len(key) < 10 for key in given):
        raise HttpError(400, "logit_bias: expected token ids as keys.")
    return {int(key): _value(given, key, float, 0.0) for key in given}


def _schema(body: Mapping[str, Any]) -> dict[str, Any] | None:
    form = _value(body, "response_format", dict, {})
    kind = form.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        schema: dict[str, Any] = _value(
            _value(form, "json_schema", dict, {}), "schema", dict, {"type": "object"}
        )
        return schema
    raise HttpError(400, "response_format: expected the type text, json_object or json_schema.")


def _messages(given: Any, urls: list[str]) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise HttpError(400, "messages: expected a list of at least one message.")
    messages = []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise HttpError(400, f"{where}.role: expected one of {', '.join(_ROLES)}.")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise HttpError(400, f"{where}.content: expected a string or a list of parts.")
        plain = [_part(part, f"{where}.content[{j}]", urls) for j, part in enumerate(parts)]
        messages.append({"role": _ROLES[role], "content": plain})
    return messages


def _part(part: Any, where: str, urls: list[str]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    image = part.get("image_url") if kind == "image_url" else None
    url = image.get("url") if isinstance(image, dict) else None
    if not isinstance(url, str):
        raise HttpError(400, f"{where}: expected a text part or an image_url part.")
    urls.append(url)
    return {"type": "image"}


def _value(body: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """A field of one type; absent and null give the default. HttpError 400."""
    value = body.get(key)
    if value is None:
        return default
    accepted = (int, float) if kind is float else kind
    wrong = not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool)
    # A whole number of JSON may be larger than any float.
    if wrong or (kind in (int, float) and not abs(value) < 1e18):
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
        raise HttpError(400, f"{key}: expected {names.get(kind, 'an object')}.")
    return value


@dataclass(frozen=True)
class Reply:
    """Builds the objects of one answer."""

    model: str
    decode: Callable[[Sequence[int]], str]
    stop_ids: frozenset[int]
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, done: Generation, logprobs: bool) -> dict[str, Any]:
        """The answer in one object."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": done.text, "refusal": None},
            "logprobs": self.logprobs(done.scores) if logprobs else None,
            "finish_reason": _FINISH[done.finish],
        }
        head = self._head("chat.completion", [choice])
        return {**head, "usage": usage(done)}

    def first(self) -> dict[str, Any]:
        """The chunk that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""}, None, None)

    def piece(self, text: str, scores: Sequence[Score] | None) -> dict[str, Any]:
        """A piece of text, with the scores of the tokens since the piece before."""
        return self._chunk({"content": text}, None, scores)

    def last(self, done: Generation, scores: Sequence[Score] | None) -> dict[str, Any]:
        """The chunk that says why the answer ends."""
        return self._chunk({}, _FINISH[done.finish], scores)

    def usage_chunk(self, done: Generation) -> dict[str, Any]:
        """The chunk behind the last, if the client asked for it."""
        return {**self._head("chat.completion.chunk", []), "usage": usage(done)}

    def logprobs(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Log-probabilities of the text's tokens, the end token left out."""

        def entry(token: int, value: float) -> dict[str, Any]:
            # JSON has no infinity; a token that cannot be drawn is that unlikely.
            return {"token": self.decode([token]), "logprob": max(value, -9999.0), "bytes": None}

        content = [
            {
                **entry(score.token_id, score.logprob),
                "top_logprobs": [entry(*alternative) for alternative in score.top],
            }
            for score in scores
            if score.token_id not in self.stop_ids
        ]
        return {"content": content, "refusal": None}

    def _chunk(
        self, delta: dict[str, Any], finish: str | None, scores: Sequence[Score] | None
    ) -> dict[str, Any]:
        logprobs = None if scores is None else self.logprobs(scores)
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._head("chat.completion.chunk", [choice])

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def usage(done: Generation) -> dict[str, Any]:
    """Token counts of an answer; of the prompt's, those whose cache rows were kept."""
    prompt, new = done.timings.prompt_tokens, len(done.token_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": done.timings.cached_tokens},
    }
