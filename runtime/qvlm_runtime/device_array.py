"""Images that are already in CUDA memory: what another library's array says of itself.

Two protocols, both read without importing that library: ``__cuda_array_interface__`` (CuPy, Numba,
PyTorch) and DLPack (``__dlpack__`` with device type CUDA). The array must be dense and C-ordered.
Nothing is copied; the producer's array is kept alive as long as the description.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from qvlm_runtime.backend import DeviceArray
from qvlm_runtime.errors import ImageError

_CUDA = 2  # DLDeviceType.kDLCUDA
# DLDataTypeCode and bits
_DTYPES = {(2, 16): "float16", (2, 32): "float32", (1, 8): "uint8"}
# DLPack's number of the default stream. Whoever reads the memory waits for all streams anyway.
_DEFAULT_STREAM = 1


class _Tensor(ctypes.Structure):
    """DLPack's DLTensor, the first member of a DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def device_array(value: Any, where: str) -> DeviceArray | None:
    """The CUDA array that ``value`` is, None if it is something else.

    ImageError if it is one, but not dense or of a type that no image has.
    """
    try:
        interface = getattr(value, "__cuda_array_interface__", None)
    except RuntimeError as error:  # PyTorch, of a tensor that records gradients
        raise ImageError(f"{where}: {error}. Detach it first.") from error
    if interface is not None:
        shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
        strides = interface.get("strides")
        if strides is not None and tuple(strides) != _dense(shape, dtype.itemsize):
            raise _not_dense(where, tuple(strides))
        return DeviceArray(int(interface["data"][0]), shape, dtype.name, value)
    if hasattr(value, "__dlpack_device__") and int(value.__dlpack_device__()[0]) == _CUDA:
        return _from_dlpack(value, where)
    return None


def _from_dlpack(value: Any, where: str) -> DeviceArray:
    capsule = value.__dlpack__(stream=_DEFAULT_STREAM)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _Tensor.from_address(pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    dtype = _DTYPES.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        raise ImageError(
            f"{where}: DLPack type code {tensor.code} with {tensor.bits} bits, expected float16, "
            "float32 or uint8."
        )
    if tensor.strides:
        strides = tuple(tensor.strides[i] for i in range(tensor.ndim))
        if strides != _dense(shape, 1):
            raise _not_dense(where, strides)
    # An unconsumed capsule releases the tensor when it is collected, so keeping it keeps the memory.
    return DeviceArray(tensor.data + tensor.byte_offset, shape, dtype, capsule)


def _dense(shape: tuple[int, ...], step: int) -> tuple[int, ...]:
    return tuple(step * math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _not_dense(where: str, strides: tuple[int, ...]) -> ImageError:
    return ImageError(f"{where}: strides {strides}, expected a dense C-ordered array. Copy it.")
