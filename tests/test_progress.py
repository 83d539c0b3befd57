"""Proves that progress is plain lines off a terminal and a bar on one, and never more than one line in ten seconds.

Run: python -m pytest tests/test_progress.py
"""

from __future__ import annotations

import io

from qvlm.progress import reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_start_and_end_each_stage() -> None:
    out = io.StringIO()
    progress = reporter(out)
    for done in range(4):
        progress("quantize", done, 3)
    progress("build", 0, 1)
    assert out.getvalue() == "quantize: 0/3\nquantize: 3/3\nbuild: 0/1\n"


def test_a_terminal_gets_a_bar_per_stage() -> None:
    out = Terminal()
    progress = reporter(out)
    for stage in ("quantize", "build"):
        for done in range(3):
            progress(stage, done, 2)
    assert "quantize: 100%" in out.getvalue() and "build: 100%" in out.getvalue()
