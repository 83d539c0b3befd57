"""What one server lets a request cost. Every number is an option of qvlm-serve."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds.

    body_bytes and body_seconds: a request's body and how long it may take to arrive. image_pixels:
    of one image, read from its header before it is decoded. new_tokens: the largest max_tokens.
    concurrent answers run at once, ``queue`` further requests arrive or wait, for at most
    queue_seconds; so bodies take at most (concurrent + queue) * body_bytes at a time.
    request_seconds: an answer from its turn to its last byte, a slow reader included.
    prefill_chunk bounds activation memory and how long a cancellation waits. kept_caches: caches of
    finished answers, see kept.py; None is ``concurrent``, which takes no more memory than that many
    answers at once may take anyway.
    """

    body_bytes: int = 32 << 20
    body_seconds: float = 30.0
    images: int = 8
    image_pixels: int = 25_000_000
    new_tokens: int = 1024
    concurrent: int = 2
    queue: int = 8
    queue_seconds: float = 60.0
    request_seconds: float = 300.0
    prefill_chunk: int = 512
    kept_caches: int | None = None

    @property
    def kept(self) -> int:
        """kept_caches as a number."""
        return self.concurrent if self.kept_caches is None else self.kept_caches
