"""How many threads a process may keep busy here, where the machine's core count is not the answer.

ONNX Runtime starts a thread for each physical core of the machine and ties it there. It does not look at what this
process was given: a container with two of 64 processors' time gets 64 threads that wait for each other by spinning,
and `taskset` leaves most of them on forbidden cores. Then, and only then, a number is given.
"""

from __future__ import annotations

import os
from pathlib import Path


def thread_limit(root: Path = Path("/")) -> int | None:
    """Threads to ask for: cores this process may run on, or its control group's share if that is less.

    None if neither restricts it: the engine's own choice is right then. Two hardware threads of one core count once.
    root: where /sys is, for tests.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed, share = os.sched_getaffinity(0), _group_share(root)
    cores = _physical(root, allowed)
    machine = _physical(root, set(range(os.cpu_count() or 1)))
    limit = cores if share is None else min(cores, max(1, round(share)))
    return limit if limit < machine else None


def _physical(root: Path, processors: set[int]) -> int:
    """Distinct cores among logical processors."""
    cores = set()
    for number in processors:
        path = root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        cores.add(_line(path) or str(number))
    return len(cores)


def _group_share(root: Path) -> float | None:
    """Processors' worth of time the control group may use; None if it is not limited."""
    quota, _, period = _line(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if not period:
        quota = _line(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = _line(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None  # "max", "-1", or no control groups
    return int(quota) / int(period)


def _line(path: Path) -> str:
    """A file's text, "" where there is none."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
