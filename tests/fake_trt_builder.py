"""The half of the fake TensorRT that makes plans: parser, network, config, builder."""

from __future__ import annotations

import json
from typing import Any

import onnx
from fake_trt_api import Named, Plan


class FakeParser(Named):
    def __init__(self, network: Any, log: Any) -> None:
        self._network, self._errors = network, []

    def parse_from_file(self, path: str) -> bool:
        model = onnx.load(path, load_external_data=False)
        self._network._path, self._network._model = path, model
        for node in model.graph.node:
            if node.op_type == self._api.refuse:
                error = self._api.ParserError()
                error._node = node
                self._errors.append(error)
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]


class FakeParserError(Named):
    def desc(self) -> str:
        return f"{self._node.op_type} is not\nsupported"

    def node_name(self) -> str:
        return str(self._node.name)


class FakeNetwork(Named):
    _model: Any = None

    @property
    def num_layers(self) -> int:
        return len(self._model.graph.node)


class FakeProfile(Named):
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, name: str, least: Any, optimal: Any, most: Any) -> None:
        self._shapes[name] = [list(least), list(optimal), list(most)]


class FakeTimingCache(Named):
    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> Plan:
        return Plan(f"timed with {self._api.release}".encode())


class FakeConfig(Named):
    def __init__(self) -> None:
        self._profiles: list[FakeProfile] = []
        self._limits: dict[str, int] = {}
        self._cache: Any = None

    profiling_verbosity: Any = None
    builder_optimization_level: Any = 3
    progress_monitor: Any = None
    num_compute_capabilities: Any = 0

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self._limits[pool.name] = size

    def create_timing_cache(self, data: bytes) -> Any:
        if data and not data.startswith(b"timed with"):
            return None
        return self._api.ITimingCache(data)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        own = cache._data in (b"", f"timed with {self._api.release}".encode())
        if own:
            self._cache = cache
        return own

    def get_timing_cache(self) -> Any:
        return self._cache

    def set_compute_capability(self, capability: Any, index: int) -> bool:
        self._capability = capability.name
        return True

    def add_optimization_profile(self, profile: FakeProfile) -> int:
        for least, optimal, most in profile._shapes.values():
            if not all(a <= b <= c for a, b, c in zip(least, optimal, most, strict=True)):
                return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1


class FakeBuilder(Named):
    def __init__(self, log: Any) -> None:
        self._log = log

    def create_network(self, flags: int) -> Any:
        assert flags == 1 << int(self._api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return self._api.INetworkDefinition()

    def create_builder_config(self) -> Any:
        return self._api.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self._api.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Plan | None:
        if not self._report(config.progress_monitor) or self._api.fails:
            self._log.log(self._api.ILogger.ERROR, self._api.fails or "cancelled")
            return None
        for value in network._model.graph.input:
            fixed = all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim)
            for profile in config._profiles or [None]:
                assert fixed or (profile and value.name in profile._shapes), value.name
        self._api.written.append(
            {"limits": dict(config._limits), "level": config.builder_optimization_level}
        )
        plan = {
            "release": self._api.release,
            "capability": self._api.gpu.capability,
            "path": str(network._path),
            "profiles": [p._shapes for p in config._profiles],
            "detailed": config.profiling_verbosity == self._api.ProfilingVerbosity.DETAILED,
        }
        return Plan(json.dumps(plan).encode())

    @staticmethod
    def _report(monitor: Any) -> bool:
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Tactics", "Building", 1)
        going = monitor.step_complete("Tactics", 0)
        monitor.phase_finish("Tactics")
        going = monitor.step_complete("Building", 0) and going
        monitor.phase_finish("Building")
        return bool(going)
