"""Power rails of a Jetson from the output of NVIDIA's tegrastats, where sysfs is not readable.

A line holds `RAIL nowmW/averagemW` for each rail (without the unit up to JetPack 4). The first
number is used: the second is an average since tegrastats started, which a difference cannot undo.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time

from qvlm_runtime.bench.power.reader import Integrator, Unavailable, total_rails

_INTERVAL_MS = 100
_PATIENCE = 5.0  # seconds to the first line; tegrastats prints one an interval
# The unit or a blank must follow the second number, which keeps `RAM 5173/7620MB` out.
_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?(?=\s|$)")


class Tegrastats:
    """tegrastats as a child process, its lines integrated as they come."""

    def __init__(self, command: tuple[str, ...] = ("tegrastats",)) -> None:
        if shutil.which(command[0]) is None:
            raise Unavailable(f"{command[0]}: not installed (it comes with JetPack)")
        self._process = subprocess.Popen(
            [*command, "--interval", str(_INTERVAL_MS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._integrator, self._first = Integrator(), threading.Event()
        self.source = "tegrastats"
        self.rails: tuple[str, ...] = ()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        if not self._first.wait(_PATIENCE) or not self.rails:
            self.close()
            raise Unavailable("tegrastats: no power rail in its output")
        self.total = total_rails(self.rails)

    def _run(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            watts = parse(line)
            if watts:
                self._integrator.add(time.perf_counter(), watts)
                self.rails = tuple(watts)
            self._first.set()

    def joules(self) -> dict[str, float]:
        """Joules of every rail since the first line. Unavailable if tegrastats has ended."""
        if self._process.poll() is not None:
            raise Unavailable("power: tegrastats ended. Use --power none.")
        return self._integrator.until(time.perf_counter())

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        if self._process.stdout is not None:
            self._process.stdout.close()


def parse(line: str) -> dict[str, float]:
    """Watts of each rail in one line of output; empty if it names none."""
    return {rail: int(now) * 1e-3 for rail, now in _RAIL.findall(line)}
