"""What every power reader gives: joules by rail since it started.

Some sensors count energy (RAPL, NVML of Volta and later); the others tell power, which is
integrated by the trapezoid rule over samples. Both end as cumulative joules, so a measurement is
two readings and a difference, whatever the board.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from qvlm_runtime.errors import RuntimeFault

Rails = Mapping[str, float]
# Rails that lie behind another rail of the same board, so a sum must not count them: on AGX Orin
# the memory rail is fed from VIN_SYS_5V0; NC is a channel that is not connected.
_BEHIND = ("VDDQ_VDD2_1V8AO", "NC")
# A module's or board's input, where it is measured: everything else on the board lies behind it.
_INPUTS = ("VDD_IN", "POM_5V_IN", "VIN", "5V_IN")


class Unavailable(RuntimeFault):
    """This machine has no such sensor, or it may not be read; the message says which."""


class PowerReader(Protocol):
    """source: the sensor. rails: what it measures. total: the rails whose sum is all of it."""

    source: str
    rails: tuple[str, ...]
    total: tuple[str, ...]

    def joules(self) -> dict[str, float]:
        """Joules of every rail since the reader was made."""

    def close(self) -> None:
        """Stop sampling."""


class Integrator:
    """Power samples to cumulative energy. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._joules: dict[str, float] = {}
        self._last: tuple[float, dict[str, float]] | None = None

    def add(self, when: float, watts: Rails) -> None:
        """One sample in watts, taken at ``when`` seconds; the line between two samples is kept."""
        with self._lock:
            if self._last is not None:
                then, before = self._last
                for rail, power in watts.items():
                    area = (when - then) * (power + before.get(rail, power)) / 2
                    self._joules[rail] = self._joules.get(rail, 0.0) + area
            self._last = (when, dict(watts))

    def until(self, when: float) -> dict[str, float]:
        """Joules up to ``when``, the last sample held since it was taken."""
        with self._lock:
            if self._last is None:
                return {}
            then, watts = self._last
            held = max(0.0, when - then)
            return {rail: self._joules.get(rail, 0.0) + held * watts[rail] for rail in watts}


class Sampler:
    """Reads power in a thread every ``interval`` seconds and integrates it.

    A sensor that fails on the way makes ``joules`` fail: energy with a hole in it is no energy.
    """

    def __init__(self, watts: Callable[[], Rails], interval: float) -> None:
        self._watts, self._interval = watts, interval
        self._integrator, self._stop = Integrator(), threading.Event()
        self._lock = threading.Lock()  # samples must arrive in the order of their times
        self._failure: Exception | None = None
        self._integrator.add(time.perf_counter(), watts())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._interval) and self._failure is None:
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            try:
                watts = self._watts()
            except (OSError, ValueError, Unavailable) as error:
                self._failure = error
                return
            self._integrator.add(time.perf_counter(), watts)

    def joules(self) -> dict[str, float]:
        """Joules since the start, with one more sample taken now. Unavailable if one failed."""
        self._sample()
        if self._failure is not None:
            raise Unavailable(f"power: a sensor failed ({self._failure}). Use --power none.")
        return self._integrator.until(time.perf_counter())

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()


def total_rails(rails: Sequence[str]) -> tuple[str, ...]:
    """The rails whose sum is the whole of a board's measured power."""
    for name in _INPUTS:
        if name in rails:
            return (name,)
    return tuple(rail for rail in rails if rail not in _BEHIND)
