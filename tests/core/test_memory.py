"""Proves that the peak of a step is what it holds at once, not what is left, and not what was there before.

Run: python -m pytest tests/core/test_memory.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from qvlm.trials import memory
from qvlm.trials.memory import peak_memory

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MEGABYTES = 80
# The interpreter's own allocations and page-table slack in a step that allocates nothing else.
SLACK = 8


def hold(megabytes: int) -> int:
    array = np.ones(megabytes * 1_000_000, np.uint8)
    return int(array[-1])


@LINUX
def test_a_freed_allocation_counts_while_it_was_held() -> None:
    before = np.ones(50 * 1_000_000, np.uint8)
    with peak_memory() as peak:
        hold(MEGABYTES)
        hold(MEGABYTES // 2)
    if peak.megabytes is None:
        pytest.skip("this container hides its counters")
    assert MEGABYTES - 1 <= peak.megabytes <= MEGABYTES + SLACK
    with peak_memory() as after:
        hold(1)
    assert after.megabytes is not None and after.megabytes <= 1 + SLACK
    assert before[0] == 1


def test_without_the_counters_there_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_RESET", Path("/nowhere/clear_refs"))
    with peak_memory() as peak:
        pass
    assert peak.megabytes is None
