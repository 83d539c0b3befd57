"""Processor energy from RAPL through Linux' powercap, Intel and AMD.

class/powercap/intel-rapl:N is a package, intel-rapl:N:M a part of it (core, uncore, and dram, which
is counted apart from the package). energy_uj counts microjoules and wraps at max_energy_range_uj,
some minutes under load, so a reading is taken at least every minute.
"""

from __future__ import annotations

import threading
from pathlib import Path

from qvlm_runtime.bench.power.reader import Unavailable

_REREAD = 60.0  # seconds; the smallest counters wrap after a few minutes at full power


class Rapl:
    """Every domain; the total is packages and their memory."""

    def __init__(self, root: Path = Path("/")) -> None:
        folders = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
        if not folders:
            raise Unavailable(f"{root / 'sys/class/powercap'}: no RAPL domain")
        self._domains: dict[str, tuple[Path, int]] = {}
        for folder in folders:
            own = (folder / "name").read_text().strip()
            package = folder.name.split(":")[1]
            name = own if folder.name.count(":") == 1 else f"{own}-{package}"
            wrap = int((folder / "max_energy_range_uj").read_text())
            self._domains[name] = (folder / "energy_uj", wrap)
        self.source = "RAPL (powercap)"
        self.rails = tuple(self._domains)
        # psys is the whole platform where firmware fills it in, and zero or stale where not.
        self.total = tuple(r for r in self.rails if r.startswith(("package", "dram")))
        self._lock = threading.Lock()
        self._sum = dict.fromkeys(self.rails, 0)
        try:
            self._last = {name: int(path.read_text()) for name, (path, _) in self._domains.items()}
        except OSError as error:
            raise Unavailable(
                f"RAPL: {error}. Counters are readable by root only since Linux 5.10"
            ) from error
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_REREAD):
            self.joules()

    def joules(self) -> dict[str, float]:
        """Joules of every domain since the start; correct over one wrap between two readings."""
        with self._lock:
            for name, (path, wrap) in self._domains.items():
                now = int(path.read_text())
                step = now - self._last[name]
                self._sum[name] += step if step >= 0 else step + wrap
                self._last[name] = now
            return {name: microjoules * 1e-6 for name, microjoules in self._sum.items()}

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()
