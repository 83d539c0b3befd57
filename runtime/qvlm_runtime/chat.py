"""A prompt or a list of chat messages to the text of a prompt, by the folder's chat template.

The template is a Jinja program that came with a model, so it runs in Jinja's immutable sandbox and
sees plain strings, lists and maps only. Helpers are those of transformers 5: raise_exception,
tojson, strftime_now, loop controls and {% generation %} (which only renders here).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from qvlm_runtime.errors import FolderError, PromptError, SessionError

Message = Mapping[str, Any]
_SOURCES = ("image", "path", "url")  # where a Hugging Face image part may carry its image
# What an expression of a template may raise besides TemplateError.
_TEMPLATE_FAULTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Chat:
    """Messages in content-list form, as a template reads them, and their images in order."""

    messages: list[dict[str, Any]]
    images: list[Any]


def chat(prompt: str | Sequence[Message], images: Sequence[Any] = ()) -> Chat:
    """Normalise what a caller gives.

    A string becomes one user message with as many image parts as images. A list of messages keeps
    its form: content is a string or a list of parts; an image part without an image of its own
    takes the next of ``images``. PromptError if the counts differ or a part is malformed.
    """
    check_list(images)
    if isinstance(prompt, str):
        parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
        return Chat([{"role": "user", "content": parts}], list(images))
    if not prompt:
        raise PromptError("messages: an empty list, expected at least one message.")
    waiting, used = list(images), list[Any]()
    messages = []
    for i, message in enumerate(prompt):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f'{where}: expected {{"role": …, "content": …}}.')
        plain: dict[str, Any] = {
            key: value for key, value in message.items() if isinstance(value, str)
        }
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = []
            for j, part in enumerate(content):
                parts.append(_part(part, f"{where}.content[{j}]", waiting, used))
            plain["content"] = parts
        elif not isinstance(content, str):
            raise PromptError(f"{where}.content: expected a string or a list of parts.")
        messages.append(plain)
    if waiting:
        raise PromptError(
            f"{len(images)} images given, {len(images) - len(waiting)} used by the messages. "
            'Add a {"type": "image"} part for each image.'
        )
    return Chat(messages, used)


def check_list(images: Any) -> None:
    """PromptError for one image where a list of them is expected: a path is a list of letters."""
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise PromptError(
            f"images: {type(images).__name__}, expected a list of images. Put one image into a list."
        )


def _part(part: Any, where: str, waiting: list[Any], used: list[Any]) -> dict[str, str]:
    """One part without its payload; its image goes from ``waiting`` or the part to ``used``."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind != "image":
        raise PromptError(
            f'{where}: expected {{"type": "text", "text": …}} or {{"type": "image"}}.'
        )
    own = [part[key] for key in _SOURCES if part.get(key) is not None]
    if own:
        used.append(own[0])
    elif waiting:
        used.append(waiting.pop(0))
    else:
        raise PromptError(f"{where}: no image is left for this part. Give one image per part.")
    return {"type": "image"}


class ChatTemplate:
    """A compiled chat template. Rendering is safe from several threads."""

    def __init__(self, path: Path, tokens: Mapping[str, str]) -> None:
        """``tokens``: the tokenizer's special tokens by name, as the template may read them.

        FolderError if the file is not a template.
        """
        try:
            import jinja2
        except ImportError as error:
            raise SessionError(
                f"{path}: jinja2 is not installed ({error}). pip install 'qvlm[runtime]'"
            ) from error
        try:
            source = path.read_text(encoding="utf-8")
            self._template = _environment().from_string(source)
        except (OSError, UnicodeDecodeError) as error:
            raise FolderError(f"{path}: not readable ({error})") from error
        except jinja2.TemplateError as error:
            raise FolderError(f"{path}: not a chat template ({error}). Export again.") from error
        self._tokens = dict(tokens)

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt's text. PromptError carries the message of a template that refuses."""
        import jinja2

        try:
            text: str = self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except (jinja2.TemplateError, *_TEMPLATE_FAULTS) as error:
            raise PromptError(f"chat template: {error}. Change the messages.") from error
        return text


def _environment() -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks training spans; its body is rendered."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance variable

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment
