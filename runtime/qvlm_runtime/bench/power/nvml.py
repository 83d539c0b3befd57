"""NVIDIA GPUs through NVML, called with ctypes: energy, memory in use, clocks, throttling.

libnvidia-ml.so.1 comes with the driver of a desktop or server GPU. Jetson has none before JetPack 7;
there the INA3221 tells the power and memory is the host's.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from qvlm_runtime.bench.power.reader import Sampler, Unavailable

_NOT_SUPPORTED = 3
_INTERVAL = 0.05
_TEMPERATURE_GPU = 0
_CLOCKS = {"sm": 1, "memory": 2}
# nvmlClocksThrottleReason bits that mean less speed than asked for. Idle, application clocks, sync
# boost and display clocks are choices, not throttling.
_THROTTLE = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}


class _Memory(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


@dataclass(frozen=True)
class Gpu:
    """One GPU now. clocks in MHz; throttled: why it runs slower than asked; memory in bytes."""

    name: str
    temperature: int
    clocks: dict[str, int]
    throttled: tuple[str, ...]
    memory_used: int
    memory_total: int


class Nvml:
    """The library, initialised. Unavailable if there is no driver or no GPU."""

    def __init__(self, library: Any = None) -> None:
        if library is None:
            try:
                library = ctypes.CDLL("libnvidia-ml.so.1")
            except OSError as error:
                raise Unavailable("NVML: no libnvidia-ml.so.1 (no NVIDIA driver)") from error
        self._library = library
        self._call("nvmlInit_v2")
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        self.devices: list[ctypes.c_void_p] = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
            self.devices.append(handle)
        if not self.devices:
            raise Unavailable("NVML: no GPU")

    def _call(self, function: str, *arguments: Any) -> int:
        code: int = getattr(self._library, function)(*arguments)
        if code not in (0, _NOT_SUPPORTED):
            raise Unavailable(f"NVML: {function} failed with code {code}")
        return code

    def _number(self, function: str, device: ctypes.c_void_p, kind: Any, *between: Any) -> Any:
        """A number, or None where the GPU has no such sensor."""
        value = kind()
        code = self._call(function, device, *between, ctypes.byref(value))
        return None if code == _NOT_SUPPORTED else value.value

    def name(self, device: ctypes.c_void_p) -> str:
        """Product name."""
        text = ctypes.create_string_buffer(96)
        self._call("nvmlDeviceGetName", device, text, ctypes.c_uint(96))
        return text.value.decode()

    def millijoules(self, device: ctypes.c_void_p) -> int | None:
        """Energy since the driver was loaded; None before Volta."""
        found: int | None = self._number(
            "nvmlDeviceGetTotalEnergyConsumption", device, ctypes.c_ulonglong
        )
        return found

    def milliwatts(self, device: ctypes.c_void_p) -> int | None:
        """Board power; None where it is not measured."""
        found: int | None = self._number("nvmlDeviceGetPowerUsage", device, ctypes.c_uint)
        return found

    def state(self, device: ctypes.c_void_p) -> Gpu:
        """Clocks, temperature, throttling and memory now; 0 for what is not measured."""
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
        reasons = self._number(
            "nvmlDeviceGetCurrentClocksThrottleReasons", device, ctypes.c_ulonglong
        )
        kinds = {
            name: self._number(
                "nvmlDeviceGetClockInfo", device, ctypes.c_uint, ctypes.c_uint(number)
            )
            for name, number in _CLOCKS.items()
        }
        heat = self._number(
            "nvmlDeviceGetTemperature", device, ctypes.c_uint, ctypes.c_uint(_TEMPERATURE_GPU)
        )
        why = tuple(text for bit, text in _THROTTLE.items() if (reasons or 0) & bit)
        clocks = {name: value or 0 for name, value in kinds.items()}
        return Gpu(self.name(device), heat or 0, clocks, why, memory.used, memory.total)


class NvmlPower:
    """Energy of every GPU: its own counter, or its power integrated."""

    def __init__(self, library: Any = None) -> None:
        self._nvml = Nvml(library)
        self._sampler: Sampler | None = None
        devices = dict(enumerate(self._nvml.devices))
        labels = {i: f"GPU {i} {self._nvml.name(d)}" for i, d in devices.items()}
        counted = {i for i, d in devices.items() if self._nvml.millijoules(d) is not None}
        metered = {i: d for i, d in devices.items() if i not in counted}
        silent = [labels[i] for i, d in metered.items() if self._nvml.milliwatts(d) is None]
        if silent:
            raise Unavailable(f"NVML: {silent[0]} measures no power")
        self._counters = {labels[i]: devices[i] for i in counted}
        self._start = {label: self._energy(label) for label in self._counters}
        if metered:
            self._sampler = Sampler(
                lambda: {
                    labels[i]: (self._nvml.milliwatts(d) or 0) * 1e-3 for i, d in metered.items()
                },
                _INTERVAL,
            )
        self.source = "NVML"
        self.rails = tuple(labels.values())
        self.total = self.rails

    def _energy(self, label: str) -> float:
        return (self._nvml.millijoules(self._counters[label]) or 0) * 1e-3

    def joules(self) -> dict[str, float]:
        """Joules of every GPU since the start."""
        sampled = self._sampler.joules() if self._sampler is not None else {}
        counted = {label: self._energy(label) - start for label, start in self._start.items()}
        return counted | sampled

    def close(self) -> None:
        """Stop sampling."""
        if self._sampler is not None:
            self._sampler.close()
