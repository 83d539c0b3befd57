"""Peak memory of one step of work: what it adds to this process at its highest, from Linux's own counters.

The kernel keeps the high-water mark of resident memory (VmHWM) and resets it when "5" is written to
/proc/self/clear_refs, so short peaks are seen without sampling. Freed memory is given back before the step begins
(glibc), so that a step does not look cheap because an earlier one left room. No torch.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """megabytes (10^6 bytes) above the beginning, set when the step ends; None where the system does not tell."""

    megabytes: float | None = None


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the block: ``with peak_memory() as peak: ...; peak.megabytes``."""
    peak = Peak()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        _RESET.write_text("5", encoding="ascii")
        before = _kilobytes("VmRSS")
    except (OSError, KeyError):  # not Linux, or a container that hides it
        yield peak
        return
    yield peak
    peak.megabytes = max(0, _kilobytes("VmHWM") - before) * 1024 / 1e6


def _kilobytes(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)
