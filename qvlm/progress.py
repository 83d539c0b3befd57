"""Progress of long work: a bar on a terminal, plain lines elsewhere. No torch.

Work reports through a ``Progress``: a callable taking (stage, done, total). Libraries take one as an argument and
never print; a command line passes ``reporter()``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

Progress = Callable[[str, int, int], None]

# Plain lines come at most this often (seconds), so that a log stays readable.
_INTERVAL = 10.0


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def reporter(stream: TextIO | None = None) -> Progress:
    """A Progress that draws a tqdm bar if ``stream`` (stderr by default) is a terminal and writes lines otherwise."""
    out = stream if stream is not None else sys.stderr
    return _Bar(out) if out.isatty() else _Lines(out)


class _Lines:
    """One line when a stage starts, at most one each ten seconds, one when it ends."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._stage = ""
        self._shown = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage == self._stage and done < total and now - self._shown < _INTERVAL:
            return
        self._stage, self._shown = stage, now
        self._out.write(f"{stage}: {done}/{total}\n")
        self._out.flush()


class _Bar:
    """One tqdm bar per stage."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._stage = ""
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            from tqdm import tqdm

            if self._bar is not None:
                self._bar.close()
            self._stage = stage
            self._bar = tqdm(total=total, desc=stage, file=self._out)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
            self._bar, self._stage = None, ""
