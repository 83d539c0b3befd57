"""The machine a measurement ran on: what it is, and how it was at a moment (clocks, heat, throttling).

Everything comes from files below /proc and /sys, from `nvpmodel -q` on a Jetson and from NVML where
there is a driver. What a machine does not tell is left out, never guessed. A stretch of time is
throttled if, between two snapshots, a throttle counter rose, a passive trip point of a thermal
zone was reached, or NVML named a reason.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from qvlm_runtime.bench.power.nvml import Nvml
from qvlm_runtime.bench.power.reader import Unavailable

_LIBRARIES = ("onnxruntime", "tokenizers", "pillow")
# Throttle counters that only grow: over-current events of Jetson's soctherm (under-voltage, average
# and instantaneous over-current), thermal events of Intel cores and packages.
_COUNTERS = (
    "sys/class/hwmon/hwmon*/oc*_event_cnt",
    "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count",
)
_MILLI = 1e-3


@dataclass(frozen=True)
class Snapshot:
    """The machine at ``time`` (seconds since the epoch).

    cpu_mhz: slowest and fastest core now. temperatures: degrees Celsius by zone. hot: zones at or
    over a passive trip point. counters: throttle events so far. gpus: NVML's state of each GPU.
    """

    time: float
    load: float
    cpu_mhz: tuple[float, float] | None
    temperatures: dict[str, float]
    hot: tuple[str, ...]
    counters: dict[str, int]
    gpus: tuple[dict[str, Any], ...]


class Machine:
    """Reads one machine; ``root`` is where its /proc and /sys are."""

    def __init__(self, root: Path = Path("/"), nvml: Callable[[], Nvml] = Nvml) -> None:
        self._root = root
        try:
            self._nvml: Nvml | None = nvml()
        except Unavailable:
            self._nvml = None

    def describe(self) -> dict[str, Any]:
        """Names, sizes, versions and modes, as JSON values."""
        governors = {
            _text(p).strip()
            for p in self._glob("sys/devices/system/cpu/cpu*/cpufreq/scaling_governor")
        }
        limits = [
            _number(p) for p in self._glob("sys/devices/system/cpu/cpu*/cpufreq/cpuinfo_max_freq")
        ]
        found: dict[str, Any] = {
            "board": self._board(),
            "processor": self._processor(),
            "cores": _cores(),
            "memory_bytes": self.memory_limit(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "libraries": {"numpy": np.__version__, **_versions()},
            "cpu_max_mhz": max((f * _MILLI for f in limits if f is not None), default=None),
            "governor": ", ".join(sorted(g for g in governors if g)) or None,
            "power_mode": power_mode(),
        }
        if self._nvml is not None:
            found["gpus"] = [self._nvml.name(device) for device in self._nvml.devices]
        return {key: value for key, value in found.items() if value is not None}

    def memory_limit(self) -> int:
        """Bytes of memory a process can have: the board's, or its control group's if that is less."""
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
        total = re.search(r"MemTotal:\s+(\d+) kB", _text(self._root / "proc/meminfo"))
        if total:
            limits = [1024 * int(total[1])]
        for name in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
            limit = _number(self._root / name)
            if limit is not None:
                limits.append(limit)
        return min(limits)

    def snapshot(self) -> Snapshot:
        """The machine now."""
        paths = self._glob("sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq")
        clocks = [f * _MILLI for f in map(_number, paths) if f is not None]
        temperatures: dict[str, float] = {}
        hot = []
        for zone in self._glob("sys/class/thermal/thermal_zone*"):
            heat, name = _number(zone / "temp"), _text(zone / "type").strip() or zone.name
            if heat is None:
                continue
            temperatures[name] = heat * _MILLI
            if any(heat >= trip for trip in _passive_trips(zone)):
                hot.append(name)
        counters = {}
        for pattern in _COUNTERS:
            for path in self._glob(pattern):
                count = _number(path)
                if count is not None:
                    counters[str(path.relative_to(self._root))] = count
        nvml = self._nvml
        gpus = () if nvml is None else tuple(asdict(nvml.state(d)) for d in nvml.devices)
        return Snapshot(
            time.time(),
            os.getloadavg()[0],
            (min(clocks), max(clocks)) if clocks else None,
            temperatures,
            tuple(hot),
            counters,
            gpus,
        )

    def _glob(self, pattern: str) -> list[Path]:
        return sorted(self._root.glob(pattern))

    def _board(self) -> str | None:
        """The device tree's model on a board, the DMI product name on a PC."""
        for name in ("proc/device-tree/model", "sys/class/dmi/id/product_name"):
            if text := _text(self._root / name).strip("\0\n "):
                return text
        return None

    def _processor(self) -> str:
        text = _text(self._root / "proc/cpuinfo")
        found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
        return found[1] if found else platform.machine()


def throttled(before: Snapshot, after: Snapshot) -> list[str]:
    """Why the time between two snapshots counts as throttled; empty if nothing says so."""
    reasons = [
        f"{name} rose by {count - before.counters.get(name, count)}"
        for name, count in after.counters.items()
        if count > before.counters.get(name, count)
    ]
    reasons += [f"{zone} is at its passive trip point" for zone in after.hot]
    reasons += [f"{gpu['name']}: {why}" for gpu in after.gpus for why in gpu["throttled"]]
    return reasons


def power_mode() -> str | None:
    """Jetson's power mode as nvpmodel names it; None on another machine."""
    if shutil.which("nvpmodel") is None:
        return None
    run = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, check=False)
    return parse_power_mode(run.stdout)


def parse_power_mode(text: str) -> str | None:
    """`NV Power Mode: MAXN` and the mode's number on the next line."""
    found = re.search(r"NV Power Mode:\s*(\S+)\s*\n\s*(\d+)", text)
    return f"{found[1]} ({found[2]})" if found else None


def _passive_trips(zone: Path) -> list[int]:
    """Temperatures at which Linux starts to throttle a zone; 0 and below mean not set."""
    trips = []
    for kind in sorted(zone.glob("trip_point_*_type")):
        if _text(kind).strip() == "passive":
            heat = _number(kind.with_name(kind.name.replace("_type", "_temp")))
            if heat is not None and heat > 0:
                trips.append(heat)
    return trips


def _cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _text(path: Path) -> str:
    """Contents, or "" where there is no such file or it may not be read: sensors come and go."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """An integer, or None if the file is absent, unreadable or holds a word ("max")."""
    text = _text(path).strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None
