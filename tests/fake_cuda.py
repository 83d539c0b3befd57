"""A GPU made of host memory, behind the names of ``cuda.bindings.runtime`` only.

Work put on a stream is done when the host waits for it, as late as a GPU may be, so code that reads
too early reads garbage here. Memory is not zeroed. Copies are checked to begin and end inside what
was allocated. Every address counts as host memory for the process, so a fake engine can compute.
"""

from __future__ import annotations

import ctypes
import enum
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

API = json.loads((Path(__file__).parent / "data/device_api.json").read_text())
CUDA_RELEASES = list(API["cuda.bindings.runtime"])
GARBAGE = 0xA5
Work = Callable[[], None]


class Graph:
    """A captured list of work."""

    def __init__(self, work: list[Work]) -> None:
        self.work = work


class FakeCuda:
    """State and functions; ``module`` shows the functions under one release's names."""

    def __init__(self, capability: int = 87, memory: int = 1 << 30) -> None:
        self.capability, self.total, self.free = capability, memory, memory
        self.blocks: dict[int, Any] = {}
        self.queue: list[Work] = []
        self.capturing: list[Work] | None = None
        self.waits = self.captures = self.launches = 0
        self.no_driver = False
        self.calls: list[str] = []
        self.copied = {"HostToDevice": 0, "DeviceToHost": 0, "DeviceToDevice": 0}

    # what the fake TensorRT uses
    def submit(self, work: Work) -> None:
        (self.queue if self.capturing is None else self.capturing).append(work)

    def flush(self) -> None:
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def check(self, address: int, nbytes: int) -> None:
        inside = any(
            start <= address and address + nbytes <= start + size
            for start, (size, _) in self.blocks.items()
        )
        assert inside, f"{nbytes} bytes at {address:#x} are not inside an allocation"

    # the runtime's functions
    def cudaGetDevice(self) -> tuple[Any, ...]:
        return self.ok, 0

    def cudaSetDevice(self, ordinal: int) -> tuple[Any, ...]:
        return (self.ok,)

    def cudaDeviceGetAttribute(self, kind: Any, ordinal: int) -> tuple[Any, ...]:
        major, minor = divmod(self.capability, 10)
        return self.ok, major if kind.name.endswith("Major") else minor

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return self.ok, 17

    def cudaGetErrorString(self, error: Any) -> tuple[Any, ...]:
        return self.ok, error.name.encode()

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return self.ok, self.free, self.total

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        assert self.capturing is None, "memory is not allocated during capture"
        if size > self.free:
            return self.errors.cudaErrorMemoryAllocation, None
        storage = np.full(size + 256, GARBAGE, np.uint8)
        address = -(-storage.ctypes.data // 256) * 256
        self.blocks[address] = size, storage
        self.free -= size
        return self.ok, address

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self.flush()
        self.free += self.blocks.pop(address)[0]
        return (self.ok,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Any) -> tuple[Any, ...]:
        self.check(address, size)
        self.submit(lambda: ctypes.memset(address, value, size) and None)
        return (self.ok,)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: Any, stream: Any
    ) -> tuple[Any, ...]:
        assert self.capturing is None, "a copy of pageable memory is not captured"
        way = kind.name.removeprefix("cudaMemcpy")
        self.copied[way] += size
        if way != "DeviceToHost":
            self.check(target, size)
        if way != "HostToDevice":
            self.check(source, size)
            self.submit(lambda: ctypes.memmove(target, source, size) and None)
        else:  # the driver has taken the bytes when the call returns
            data = ctypes.string_at(source, size)
            self.submit(lambda: ctypes.memmove(target, data, size) and None)
        return (self.ok,)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        assert self.capturing is None, "the host does not wait during capture"
        self.waits += 1
        self.flush()
        return (self.ok,)

    def cudaDeviceSynchronize(self) -> tuple[Any, ...]:
        return self.cudaStreamSynchronize(None)

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any, ...]:
        assert self.capturing is None and mode.name.endswith("ThreadLocal")
        self.capturing = []
        return (self.ok,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        assert self.capturing is not None
        graph, self.capturing = Graph(self.capturing), None
        self.captures += 1
        return self.ok, graph

    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> tuple[Any, ...]:
        return self.ok, graph

    def cudaGraphDestroy(self, graph: Graph) -> tuple[Any, ...]:
        return (self.ok,)

    def cudaGraphExecDestroy(self, graph: Graph) -> tuple[Any, ...]:
        return (self.ok,)

    def cudaGraphLaunch(self, graph: Graph, stream: Any) -> tuple[Any, ...]:
        self.launches += 1
        self.queue += graph.work
        return (self.ok,)

    def module(self, release: str) -> types.ModuleType:
        """``cuda.bindings.runtime`` of one release: the names it has and no other."""
        names = API["cuda.bindings.runtime"][release]
        module = types.ModuleType("cuda.bindings.runtime")
        for name in names["functions"]:
            function = getattr(self, name, None)
            if function is not None:
                setattr(module, name, self._recorded(name, function))
        module.cudaStreamNonBlocking = 1  # type: ignore[attr-defined]
        for name in ("cudaStreamCaptureMode", "cudaMemcpyKind", "cudaDeviceAttr", "cudaError_t"):
            setattr(module, name, enum.Enum(name, names[name]))
        self.errors = module.cudaError_t
        self.ok = self.errors.cudaSuccess
        assert "cudaStreamNonBlocking" in names["functions"]
        return module

    def _recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls.append(name)
            if self.no_driver:  # what cuda-python raises where there is none
                raise RuntimeError("Failed to dlopen libcuda.so.1")
            return function(*args)

        return call


def install(monkeypatch: pytest.MonkeyPatch, release: str, **options: Any) -> FakeCuda:
    """Put a fresh fake GPU in place of the machine's."""
    from qvlm_runtime import cuda

    fake = FakeCuda(**options)
    package, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    bindings.runtime = fake.module(release)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", bindings.runtime)
    cuda.forget_device()
    return fake
