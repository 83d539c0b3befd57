"""Answers that keep to a JSON schema: which tokens may come next, by llguidance (extra [json]).

llguidance compiles the schema to an automaton over the tokenizer's bytes and says, before each
token, which of the vocabulary keep the text a prefix of some valid document: a mask of bits, applied
here with NumPy. White space is fixed to what json.dumps writes, so a model cannot fill its limit
with it. The end tokens are allowed once the document is complete, so an answer that ends by itself
is valid; one that is cut by max_new_tokens is only the beginning of a valid document.

Building the tokenizer's automaton takes from milliseconds to a second and is done once for a model.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from qvlm_runtime.errors import PromptError, SessionError
from qvlm_runtime.penalties import Logits
from qvlm_runtime.tokenizer import Tokenizer

Schema = Mapping[str, Any] | str
_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class JsonGrammars:
    """Makes constraints for one tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = sorted(end_ids)
        self._lock = threading.Lock()
        self._automaton: Any = None

    def constraint(self, schema: Schema) -> JsonConstraint:
        """The constraint of one generation.

        schema: a JSON schema as a map or as JSON text. PromptError if it is not one, or asks for
        what llguidance does not support; SessionError if llguidance is not installed.
        """
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise SessionError(
                f"json_schema: llguidance is not installed ({error}). pip install 'qvlm[json]'"
            ) from error
        try:
            plain = json.loads(schema) if isinstance(schema, str) else dict(schema)
            # llguidance takes the schema as text, so its errors are about the same document.
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(plain), overrides=_LAYOUT)
        except (ValueError, TypeError, RecursionError) as error:
            raise PromptError(f"json_schema: not a JSON schema ({error}).") from error
        matcher = LLMatcher(self._compiled(), grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise PromptError(f"json_schema: {reason}. Change the schema.")
        return JsonConstraint(matcher, self._vocab_size)

    def _compiled(self) -> Any:
        from llguidance import LLTokenizer

        with self._lock:
            if self._automaton is None:
                self._automaton = LLTokenizer(
                    self._tokenizer.to_json(),
                    n_vocab=self._vocab_size,
                    eos_token=self._end_ids,
                )
            return self._automaton


class JsonConstraint:
    """The position of one generation in its schema."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._words = np.zeros((vocab_size + 31) // 32, np.uint32)
        self._vocab_size = vocab_size

    def mask(self, logits: Logits) -> None:
        """Set the logits of the tokens that cannot come next to minus infinity, in place."""
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check()
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")[: self._vocab_size]
        logits[bits == 0] = -np.inf

    def accept(self, token: int) -> None:
        """Move on behind a chosen token."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())
            raise PromptError(f"json_schema: {reason}. Use a simpler schema.")
