"""Proves that an image in another library's CUDA memory (``__cuda_array_interface__``, DLPack) is read
where it is, that features stay on the device, and that what is no image there is refused.

Run: python -m pytest tests/runtime/test_trt_images.py
"""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_support import machine, pictures, toy_engines
from runtime_support import image_spec

from qvlm_runtime import FeatureCache, ImageError, device_array, load
from qvlm_runtime.image_spec import CanvasImage


class OnDevice:
    """Another library's CUDA array."""

    def __init__(self, gpu: Any, array: np.ndarray, strides: tuple[int, ...] | None = None) -> None:
        _, self.address = gpu.cudaMalloc(array.nbytes)
        ctypes.memmove(self.address, array.ctypes.data, array.nbytes)
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (self.address, False),
            "strides": strides,
            "version": 3,
        }


class Recording:
    """As PyTorch answers of a tensor that records gradients."""

    @property
    def __cuda_array_interface__(self) -> Any:
        raise RuntimeError("Can't get the interface on Variable that requires grad")


class Managed(ctypes.Structure):
    """DLPack's DLManagedTensor as far as a consumer reads it; the deleter is none."""

    _fields_ = (("tensor", device_array._Tensor), ("context", ctypes.c_void_p),
                ("deleter", ctypes.c_void_p))  # fmt: skip


class ByDlpack:
    """The same through DLPack."""

    def __init__(self, array: OnDevice, code: int = 2) -> None:
        shape = array.__cuda_array_interface__["shape"]
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        tensor = device_array._Tensor(
            array.address, 2, 0, len(shape), code, 32, 1, self._shape, None, 0
        )
        self._managed = Managed(tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, stream: int) -> Any:
        make = ctypes.pythonapi.PyCapsule_New
        make.restype = ctypes.py_object
        make.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(ctypes.addressof(self._managed), b"dltensor", None)


@pytest.mark.parametrize("protocol", [lambda array: array, ByDlpack])
def test_an_image_in_cuda_memory_is_read_where_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, protocol: Any
) -> None:
    device = machine(monkeypatch, "10.3.0")
    toy_engines(tmp_path, device)
    with load(tmp_path, feature_cache=FeatureCache(0)) as model:
        (image, other) = pictures(2)
        (picture,) = model.pictures([image])
        there = protocol(OnDevice(device.gpu, picture.inputs["pixel_values"][0]))
        expected = model.generate("What?", [image, other], max_new_tokens=12)
        sent = device.gpu.copied["HostToDevice"]
        got = model.generate("What?", [there, other], max_new_tokens=12)
        assert got.token_ids == expected.token_ids
        again = device.gpu.copied["HostToDevice"] - sent
        model.generate("What?", [image, other], max_new_tokens=12)
        whole = device.gpu.copied["HostToDevice"] - sent - again
        assert whole - again == 3 * 6 * 6 * 4  # one image's pixels were not sent
        spec = image_spec()
        tiles = CanvasImage(spec.pixels, spec.rows, (6, 6), 1, 4)
        model.manifest = dataclasses.replace(model.manifest, image=tiles)
        with pytest.raises(ImageError, match="image 1: an array in CUDA memory, expected an image"):
            model.generate("What?", [there])


def test_features_are_kept_on_the_device_but_those_of_a_cuda_array_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A camera may fill the same array again; within a conversation it is one picture."""
    device = machine(monkeypatch, "10.3.0")
    toy_engines(tmp_path, device)
    with load(tmp_path) as model:
        image = pictures(1)
        (picture,) = model.pictures(image)
        there = OnDevice(device.gpu, picture.inputs["pixel_values"][0])
        first, again = (model.generate("What?", image, max_new_tokens=12) for _ in range(2))
        assert (first.timings.cached_images, again.timings.cached_images) == (0, 1)
        for _ in range(2):
            lent = model.generate("What?", [there], max_new_tokens=12)
            assert lent.token_ids == again.token_ids == first.token_ids
            assert lent.timings.cached_images == 0
        assert len(model.feature_cache) == 1
        with model.conversation() as talk:
            talk.ask("What?", [there], max_new_tokens=4)
            second = talk.ask("And?", max_new_tokens=4)
            assert second.timings.cached_images == 1 and second.timings.cached_tokens > 3


def test_an_image_in_cuda_memory_that_is_not_pixel_values_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = machine(monkeypatch, "10.3.0")
    toy_engines(tmp_path, device)
    frame = np.zeros((3, 6, 6), np.float32)
    with load(tmp_path) as model:
        for image, match in (
            (OnDevice(device.gpu, frame[:, :4]), r"float32 \[3, 4, 6\] in CUDA memory, expected"),
            (OnDevice(device.gpu, frame.astype(np.uint8)), "uint8 .* expected preprocessed"),
            (OnDevice(device.gpu, frame, (4, 4, 4)), "dense C-ordered"),
            (ByDlpack(OnDevice(device.gpu, frame), code=0), "DLPack type code 0"),
        ):
            with pytest.raises(ImageError, match=match):
                model.generate("What?", [image])
        with pytest.raises(ImageError, match=r"image 1: .* requires grad\. Detach it first"):
            model.generate("What?", [Recording()])
    good = OnDevice(device.gpu, frame)
    told = pytest.raises(ImageError, match=r"image 1: the array is on a device \(CUDA\)")
    with load(tmp_path, backend="ort", threads=1) as model, told:
        model.generate("What?", [good])
