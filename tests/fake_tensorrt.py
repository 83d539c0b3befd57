"""TensorRT's Python API of one release, made of its names only: any other attribute is an error.

The builder writes plans that name an ONNX file and hold the profiles; the execution context runs
that file through ONNX Runtime on the addresses it was given, when the fake GPU gets to it. What a
release refuses is refused: plans of another release or GPU, shapes outside a profile, addresses
that are not aligned or not set, one address for a past and a present that it does not alias, and
capture before a plain run. ``calls`` records every method, for tests that ask what was called.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fake_cuda import API, FakeCuda
from fake_trt_api import RELEASES, Named, names
from fake_trt_builder import (
    FakeBuilder,
    FakeConfig,
    FakeNetwork,
    FakeParser,
    FakeParserError,
    FakeProfile,
    FakeTimingCache,
)

SUBCLASSED = ("ILogger", "IProgressMonitor")
_NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64"}
_ONNX = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF",
         onnx.TensorProto.INT64: "INT64"}  # fmt: skip


class FakeTensorRT(types.ModuleType):
    """The module of one release. ``refuse`` is an operator the parser does not take, ``fails`` what
    the builder says in place of a plan; ``on_host`` the tensors read on the host; ``layers`` None
    or a function that alters the inspector's layers.
    """

    def __init__(self, release: str, gpu: FakeCuda) -> None:
        super().__init__("tensorrt")
        self.__version__ = release
        self.release, self.gpu = release, gpu
        self.calls: list[str] = []
        self.refuse: str | None = None
        self.fails: str | None = None
        self.on_host: set[str] = set()
        self.layers: Any = None
        self.written: list[dict[str, Any]] = []
        self._sessions: dict[str, Any] = {}
        for kind in API["tensorrt"]:
            members = names(release, kind)
            if not members:
                continue
            if kind in SUBCLASSED:
                setattr(self, kind, _subclassed(kind, members))
            elif kind in _FAKES:
                setattr(self, kind, type(kind, (_FAKES[kind],), {"_api": self}))
            else:
                setattr(self, kind, _enum(kind, members, release))

    def session(self, path: str) -> Any:
        if path not in self._sessions:
            self._sessions[path] = onnxruntime.InferenceSession(path)
        return self._sessions[path]


def _enum(kind: str, members: set[str], release: str) -> Any:
    first = ["EXPLICIT_BATCH"] if release.startswith("10.") else []
    if kind == "NetworkDefinitionCreationFlag":  # the number of STRONGLY_TYPED moved in 11
        order = [*first, "STRONGLY_TYPED"]
        return enum.IntEnum(kind, {name: i for i, name in enumerate(order) if name in members})
    return enum.IntEnum(kind, sorted(members - {"name", "value"}))


def _subclassed(kind: str, members: set[str]) -> Any:
    body: dict[str, Any] = {}
    if kind == "ILogger":
        order = ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"]
        severity = enum.IntEnum("Severity", {name: i for i, name in enumerate(order)})
        body = {name: severity[name] for name in order if name in members}
    return type(kind, (), body)


class _Runtime(Named):
    def __init__(self, log: Any) -> None:
        self._log = log

    def deserialize_cuda_engine(self, data: Any) -> Any:
        try:
            plan = json.loads(bytes(memoryview(data)))
        except ValueError:
            self._log.log(self._api.ILogger.ERROR, "magic tag does not match")
            return None
        wanted = {"release": self._api.release, "capability": self._api.gpu.capability}
        for key, value in wanted.items():
            if plan[key] != value:
                self._log.log(self._api.ILogger.ERROR, f"{key} {plan[key]}\nis not {value}")
                return None
        engine = self._api.ICudaEngine()
        engine._load(plan)
        return engine


class _Engine(Named):
    def _load(self, plan: Mapping[str, Any]) -> None:
        self._plan = plan
        self._graph = onnx.load(plan["path"], load_external_data=False).graph
        self._inputs = {v.name: v for v in self._graph.input}
        self._outputs = {v.name: v for v in self._graph.output}
        self._tensors = {**self._inputs, **self._outputs}
        self._taken: set[int] = set()

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return max(1, len(self._plan["profiles"]))

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return (
            self._api.TensorIOMode.INPUT if name in self._inputs else self._api.TensorIOMode.OUTPUT
        )

    def get_tensor_dtype(self, name: str) -> Any:
        return self._api.DataType[_ONNX[self._tensors[name].type.tensor_type.elem_type]]

    def get_tensor_location(self, name: str) -> Any:
        place = self._api.TensorLocation
        return place.HOST if name in self._api.on_host else place.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        dims = self._tensors[name].type.tensor_type.shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[Any]:
        return [tuple(shape) for shape in self._plan["profiles"][index][name]]

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return 4096 * (index + 1)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        for node in self._graph.node:
            if node.op_type == "TensorScatter" and node.output[0] == name:
                return str(node.input[0])
        return None

    def create_execution_context(self, strategy: Any) -> Any:
        assert strategy == self._api.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._api.IExecutionContext()
        context._begin(self)
        return context

    def create_engine_inspector(self) -> Any:
        inspector = self._api.EngineInspector()
        inspector._engine = self
        return inspector


class _Context(Named):
    def _begin(self, engine: Any) -> None:
        self._engine, self._index, self._memory = engine, -1, 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._ran = False

    def set_device_memory(self, address: int, size: int) -> None:
        self._api.gpu.check(address, size)
        self._memory = size

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if index in self._engine._taken:
            return False
        self._engine._taken.add(index)
        self._index = index
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        fixed, ranges = self._engine.get_tensor_shape(name), self._engine._plan["profiles"]
        least, _, most = ranges[self._index][name] if -1 in fixed else (fixed, fixed, fixed)
        if not all(a <= n <= b for n, a, b in zip(shape, least, most, strict=True)):
            return False
        self._shapes[name], self._ran = tuple(shape), False
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        known: dict[str, int] = {}
        for other, shape in self._shapes.items():
            dims = self._engine._tensors[other].type.tensor_type.shape.dim
            known |= {d.dim_param: n for d, n in zip(dims, shape, strict=True) if d.dim_param}
        dims = self._engine._tensors[name].type.tensor_type.shape.dim
        return tuple(
            d.dim_value if d.HasField("dim_value") else known.get(d.dim_param, -1) for d in dims
        )

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name], self._ran = address, False
        return address != 0

    def execute_async_v3(self, stream: int) -> bool:
        engine, gpu = self._engine, self._api.gpu
        assert self._memory >= engine.get_device_memory_size_for_profile_v2(self._index)
        if gpu.capturing is not None:
            assert self._ran, "a change of shape or address needs one plain run before capture"
        self._ran = True
        frozen = {}
        for name in engine._tensors:
            dtype = np.dtype(_NUMPY[engine.get_tensor_dtype(name).name])
            shape, address = self._output_shape(name), self._addresses[name]
            if name not in self._api.on_host:
                assert address % 256 == 0, f"{name} is not aligned"
                gpu.check(address, math.prod(shape) * dtype.itemsize)
            frozen[name] = address, shape, dtype
        self._no_undefined_sharing(frozen)
        session = self._api.session(engine._plan["path"])
        values = {
            name: _view(*frozen[name]).copy()
            for name in engine._inputs
            if name in self._api.on_host
        }
        gpu.submit(lambda: _compute(session, frozen, values, list(engine._outputs)))
        return True

    def _output_shape(self, name: str) -> tuple[int, ...]:
        return self.get_tensor_shape(name)

    def _no_undefined_sharing(self, frozen: Mapping[str, Any]) -> None:
        find = getattr(self._engine, "get_aliased_input_tensor", None)
        for out in self._engine._outputs:
            start, shape, dtype = frozen[out]
            end = start + math.prod(shape) * dtype.itemsize
            for name in self._engine._inputs:
                low, other, kind = frozen[name]
                high = low + math.prod(other) * kind.itemsize
                if max(start, low) < min(end, high):
                    assert find is not None and find(out) == name, f"{out} overlaps {name}"


def _view(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    count = math.prod(shape)
    raw = (ctypes.c_byte * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(raw, dtype, count).reshape(shape)


def _compute(
    session: Any, frozen: Mapping[str, Any], values: Mapping[str, Any], outputs: list[str]
) -> None:
    feed = {n: _view(*piece).copy() for n, piece in frozen.items() if n not in outputs}
    results = session.run(outputs, {**feed, **values})
    for name, result in zip(outputs, results, strict=True):
        _view(*frozen[name])[...] = result


class _Inspector(Named):
    """Layers in either form that lists of engines were seen in, with constants and types under
    "Datatype", or without and in words. Which release gives which is not known; here releases from
    10.15 on give the first.
    """

    def get_engine_information(self, form: Any) -> str:
        assert form == self._api.LayerInformationFormat.JSON
        if not self._engine._plan["detailed"]:
            return json.dumps({"Layers": ["a", "b"]})
        layers = [
            layer
            for index in range(self._engine.num_optimization_profiles)
            for layer in self._layers(index)
        ]
        if self._api.layers is not None:
            layers = self._api.layers(layers)
        return json.dumps({"Layers": layers, "Bindings": list(self._engine._tensors)})

    def _layers(self, index: int) -> list[dict[str, Any]]:
        from qvlm_export.facts import graph_facts

        modern = RELEASES.index(self._api.release) >= RELEASES.index("10.15.1.29")

        def tensor(shape: Sequence[int], dtype: str) -> dict[str, Any]:
            if modern:
                return {"Name": "t", "Dimensions": list(shape), "Datatype": dtype}
            words = {"Half": "Row major linear FP16 format"}.get(dtype, dtype)
            return {"Name": "t", "Dimensions": list(shape), "Format/Datatype": words}

        layers = [{"Name": f"__myl_x_myl{index}_0", "LayerType": "signal", "Inputs": []}]
        for i, product in enumerate(graph_facts(Path(self._engine._plan["path"])).products):
            sizes = [product.depth, product.elements // product.depth]
            kind = {"INT4": "Int4", "INT8": "Int8"}[product.dtype]
            layer = {
                "Name": f"p_myl{index}_{i + 1}",
                "LayerType": "gemm" if kind == "Int8" else "runtime_fusion",
                "Inputs": [tensor([1, -1, sizes[0]], "Int8" if kind == "Int8" else "Half")],
                "Outputs": [tensor([1, -1, sizes[1]], "Half")],
                "Metadata": f"[ONNX Layer: {product.node}][ONNX Layer: more]",
            }
            if modern:
                layer["Constants"] = [tensor(sizes, kind)]
            layers.append(layer)
        return layers


_FAKES: dict[str, type] = {
    "Builder": FakeBuilder,
    "EngineInspector": _Inspector,
    "IBuilderConfig": FakeConfig,
    "ICudaEngine": _Engine,
    "IExecutionContext": _Context,
    "INetworkDefinition": FakeNetwork,
    "IOptimizationProfile": FakeProfile,
    "ITimingCache": FakeTimingCache,
    "OnnxParser": FakeParser,
    "ParserError": FakeParserError,
    "Runtime": _Runtime,
}


def install(monkeypatch: pytest.MonkeyPatch, release: str, gpu: FakeCuda) -> FakeTensorRT:
    """Put the fake in place of the release's module ("rtx-..." stands for TensorRT for RTX)."""
    fake = FakeTensorRT(release, gpu)
    name = "tensorrt_rtx_bindings" if release.startswith("rtx") else "tensorrt"
    monkeypatch.setitem(sys.modules, name, fake)
    return fake
