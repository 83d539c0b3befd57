"""Memory that was freed, given back to the system.

Opening a graph, ONNX Runtime fuses and packs weights piece by piece, and frees what it packed. glibc keeps such pieces
for the process, which asks for no more of that size: a third of the resident memory of a loaded INT4 model.
"""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return freed pages; takes some hundredths of a second a gigabyte. Does nothing without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none, and keeps no freed pages of that size
        trim(ctypes.c_size_t(0))
