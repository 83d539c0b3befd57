"""Proves that memory which was freed below memory in use goes back to the system:
python -m pytest tests/runtime/test_freed_memory.py
"""

import os
import platform
import subprocess
import sys

import pytest

# 128 MB in pieces too small to be mapped one by one; the last piece keeps the heap from shrinking.
PROGRAM = """
import ctypes
from pathlib import Path
from qvlm_runtime.freed_memory import give_back

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [libc.malloc(ctypes.c_size_t(64 << 10)) for _ in range(2048)]
for piece in pieces:
    ctypes.memset(ctypes.c_void_p(piece), 1, 64 << 10)
full = resident()
for piece in pieces[:-1]:
    libc.free(piece)
freed = resident()
give_back()
print(full - freed, freed - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps freed pages")
def test_freed_pages_go_back() -> None:
    run = [sys.executable, "-c", PROGRAM]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    kept, returned = map(int, subprocess.check_output(run, text=True, env=env).split())
    assert kept < 8 << 20, "glibc kept them"
    assert returned > 120 << 20
