"""Proves the ONNX Runtime CUDA backend as far as a machine without a GPU can: on a fake provider that
keeps ONNX Runtime's rules (device addresses are its own allocations, a host input is taken when it is
bound) and computes with the CPU provider, answers equal the CPU backend's, and the cache and the
image features stay on the device. Never run on a GPU.

Run: python -m pytest tests/runtime/test_ort_cuda.py
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import onnxruntime
import pytest
from PIL import Image
from runtime_support import write_folder

from qvlm_runtime import SessionError, load
from qvlm_runtime.backend import DeviceArray
from qvlm_runtime.features import Picture
from qvlm_runtime.kept import KeptCaches

CUDA = "CUDAExecutionProvider"


class Value:
    """An OrtValue in device memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def numpy(self) -> np.ndarray:
        return self.array.copy()


class Binding:
    """An IOBinding of the CUDA provider over host memory."""

    def __init__(self, native: Any, fake: FakeModule) -> None:
        self.native, self.fake, self.taken = native, fake, {}

    def _inside(self, device: str, address: int) -> None:
        if device == "cuda":
            starts = [(v.data_ptr(), v.array.nbytes) for v in self.fake.values]
            assert any(at <= address <= at + size for at, size in starts), "not device memory"

    def bind_input(
        self, name: str, device: str, ordinal: int, dtype: Any, shape: Any, address: int
    ) -> None:
        self._inside(device, address)
        self.fake.bound.append((name, device))
        if device == "cpu":  # copied to the device now
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            raw = (np.ctypeslib.ctypes.c_byte * size).from_address(address)
            self.taken[name] = array = np.frombuffer(raw, dtype).reshape(shape).copy()
            address = array.ctypes.data
        self.native.bind_input(name, "cpu", 0, dtype, shape, address)

    def bind_output(
        self, name: str, device: str, ordinal: int, dtype: Any, shape: Any, address: int
    ) -> None:
        self._inside(device, address)
        self.fake.bound.append((name, device))
        self.native.bind_output(name, "cpu", 0, dtype, shape, address)

    def synchronize_inputs(self) -> None:
        self.fake.waits += 1

    def synchronize_outputs(self) -> None:
        self.fake.waits += 1


class Session:
    def __init__(self, fake: FakeModule, path: str, options: Any, providers: list[str]) -> None:
        self._native = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self._fake, self._started = fake, [*providers] if fake.starts else ["CPUExecutionProvider"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def get_providers(self) -> list[str]:
        return self._started

    def io_binding(self) -> Any:
        native = self._native.io_binding()
        return Binding(native, self._fake) if CUDA in self._started else native

    def run_with_iobinding(self, binding: Any) -> None:
        self._native.run_with_iobinding(getattr(binding, "native", binding))


class FakeModule(types.ModuleType):
    """onnxruntime with a CUDA provider. ``starts``: whether it finds its GPU."""

    def __init__(self) -> None:
        super().__init__("onnxruntime")
        self.__version__, self.starts, self.waits = "1.31.1", True, 0
        self.values: list[Value] = []
        self.bound: list[tuple[str, str]] = []
        self.SessionOptions = onnxruntime.SessionOptions
        self.OrtValue = types.SimpleNamespace(ortvalue_from_numpy=self._allocate)

    def _allocate(self, array: np.ndarray, device: str, ordinal: int) -> Value:
        assert device == "cuda"
        if array.nbytes > 1 << 20:
            raise RuntimeError("CUDA failure 2:\nout of memory")
        self.values.append(Value(array.copy()))
        return self.values[-1]

    def get_available_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"]

    def InferenceSession(self, path: str, options: Any, providers: list[str]) -> Session:
        return Session(self, path, options, providers)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeModule:
    module = FakeModule()
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_folder(path)
    return path


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(count)
    return [Image.fromarray(generator.integers(0, 256, (20, 9, 3), np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("target", ["ort", "rtx"])
def test_answers_equal_the_cpu_backends(folder: Path, fake: FakeModule, target: str) -> None:
    """Target ort has the cache in the first form this ONNX Runtime runs, rtx in the append form."""
    answers = []
    for backend in ("ort", "ort-cuda"):
        with load(folder, target, backend=backend, threads=1) as model:
            assert model.backend == backend
            answers.append(
                [model.generate("Hm", pictures(n), max_new_tokens=12).token_ids for n in (0, 1, 2)]
            )
    assert answers[0] == answers[1]
    on_device = {"image_features", "past_key_0", "past_value_0", "present_key_0", "present_value_0"}
    assert {name for name, device in fake.bound if device == "cuda"} == on_device
    assert not on_device & {name for name, device in fake.bound if device == "cpu"}


@pytest.mark.parametrize("target", ["ort", "rtx"])
def test_a_kept_cache_gets_another_size_in_device_memory(
    folder: Path, fake: FakeModule, target: str
) -> None:
    with (
        load(folder, target, backend="ort-cuda", threads=1) as model,
        KeptCaches(model, 1) as kept,
    ):
        for text, new in (("a" * 9, 5), ("a" * 20, 20), ("a" * 22, 3)):
            expected = model.generate(text, max_new_tokens=new).token_ids
            done = kept.stream(text, max_new_tokens=new).read()
            assert done.token_ids == expected
            assert model.budget.used == model.cache_bytes(len(text) + 2 + new)
        assert done.timings.cached_tokens == 1 + 20
    assert not [name for name, device in fake.bound if device == "cpu" and "past" in name]


@pytest.mark.parametrize("target", ["ort", "rtx"])
def test_a_host_input_is_bound_anew_at_every_run(
    folder: Path, fake: FakeModule, target: str
) -> None:
    with load(folder, target, backend="ort-cuda", threads=1) as model:
        state = model.decoder.start(20)
        state.step([5, 6, 7])
        for expected in (1, 2):
            state.step([8])
            fake.bound.clear()
            state.step([9])
            assert fake.bound.count(("input_ids", "cpu")) == 1, expected


def test_a_missing_or_silent_provider_is_one_line(
    folder: Path, fake: FakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.starts = False
    with pytest.raises(SessionError, match="cannot start CUDAExecutionProvider, expected a GPU"):
        load(folder, backend="ort-cuda")
    monkeypatch.setattr(fake, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(SessionError, match="no CUDAExecutionProvider"):
        load(folder, backend="ort-cuda")


def test_full_device_memory_is_one_line(folder: Path, fake: FakeModule) -> None:
    with load(folder, "rtx", backend="ort-cuda", threads=1) as model:
        told = pytest.raises(SessionError, match=r"cannot allocate 1\.2 MB for this graph .*memory")
        with told as caught:
            model.decoder.session.buffer(300_000, "float32")
    assert "\n" not in str(caught.value)


def test_an_array_in_cuda_memory_is_bound_where_it_is(
    folder: Path, fake: FakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = fake_cuda.install(monkeypatch, fake_cuda.CUDA_RELEASES[-1])
    image = pictures(1)
    with load(folder, "rtx", backend="ort-cuda", threads=1) as model:
        (picture,) = model.pictures(image)
        pixels = picture.inputs["pixel_values"]
        value = fake._allocate(pixels, "cuda", 0)
        borrowed = DeviceArray(value.data_ptr(), pixels.shape[1:], "float32", value)
        lent = Picture.on_device(borrowed, picture.layout)
        expected, got = (model.image_features([one]).buffer for one in (picture, lent))
        np.testing.assert_array_equal(got.read(0, (3, 12)), expected.read(0, (3, 12)))
    assert ("pixel_values", "cuda") in fake.bound
    assert gpu.calls.count("cudaDeviceSynchronize") == 1  # the producer's work is waited for
