"""Text to token ids and back, from tokenizer.json; the back direction one token at a time.

Detokenisation is by windows: the text of a token depends on its neighbours (byte tokens make up one
character, SentencePiece drops a leading space), so a piece is the difference of two decodes that
begin at the same earlier token. A piece is held back while it ends inside a UTF-8 sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvlm_runtime.errors import FolderError, PromptError, SessionError

_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A Hugging Face fast tokenizer, without transformers. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as FastTokenizer
        except ImportError as error:
            raise SessionError(
                f"{path}: tokenizers is not installed ({error}). pip install 'qvlm[runtime]'"
            ) from error
        try:
            self._fast: Any = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise FolderError(f"{path}: not a tokenizer ({error}). Export again.") from error
        # A folder's file may carry training-time settings; a prompt is never cut or padded.
        self._fast.no_truncation()
        self._fast.no_padding()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; ``add_special_tokens`` applies the tokenizer's post-processor.

        PromptError if the text holds half of a surrogate pair.
        """
        try:
            ids: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:  # a lone surrogate is no text
            raise PromptError(f"the prompt is not valid Unicode ({error}).") from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=True)
        return text

    def to_json(self) -> str:
        """The tokenizer as tokenizer.json text."""
        text: str = self._fast.to_str()
        return text

    def token(self, token_id: int) -> str | None:
        """A token's own spelling, or None if there is no such id."""
        spelling: str | None = self._fast.id_to_token(token_id)
        return spelling


class Detokenizer:
    """Token ids in, pieces of text out; the pieces joined are the text of all ids.

    The one difference from decoding all ids at once: a UTF-8 sequence left unfinished at the end is
    dropped, where a decoder writes a replacement character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the tokens of the last piece
        self._given = ""  # the context's own text
        self._new: list[int] = []  # tokens since then

    def push(self, token_id: int) -> str:
        """The text that is certain after one more token; "" while a character is unfinished."""
        self._new.append(token_id)
        text = self._tokenizer.decode(self._context + self._new)
        piece = text[len(self._given) :]
        if not piece or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._new = self._new, []
        self._given = self._tokenizer.decode(self._context)
        return piece

    def flush(self) -> str:
        """What is left at the end, without an unfinished UTF-8 sequence."""
        text = self._tokenizer.decode(self._context + self._new)
        piece = text[len(self._given) :].rstrip(_REPLACEMENT)
        self._context, self._given, self._new = [], "", []
        return piece
