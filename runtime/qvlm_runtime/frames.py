"""Camera frames as arrays of other libraries: taken without a copy where they are in host memory.

A device array is refused by name of its device. Its copy to the host costs time that an application
should see, so it is not made here. A CUDA backend takes CUDA arrays before they come here
(device_array.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime.errors import ImageError

# DLPack's DLDeviceType; the names are those of the specification.
_HOST = {1: "kDLCPU", 3: "kDLCUDAHost", 11: "kDLROCMHost"}
_DEVICES = {2: "CUDA", 4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 13: "CUDA managed"}


def host_array(source: Any, where: str) -> NDArray[Any] | None:
    """A NumPy view of an array in host memory; None if ``source`` is no array.

    ImageError if it is on a device, or if its library cannot lend it.
    """
    if isinstance(source, np.ndarray):
        return source
    if hasattr(source, "__cuda_array_interface__"):
        raise _on_device(where, "CUDA")
    if hasattr(source, "__dlpack_device__"):
        kind, index = source.__dlpack_device__()
        if int(kind) not in _HOST:
            raise _on_device(where, f"{_DEVICES.get(int(kind), f'DLPack type {kind}')} {index}")
        try:
            return np.from_dlpack(source)
        except (BufferError, RuntimeError, TypeError) as error:
            raise ImageError(f"{where}: its library does not lend the array ({error}).") from error
    if hasattr(source, "__array_interface__"):
        return np.asarray(source)
    return None


def _on_device(where: str, device: str) -> ImageError:
    return ImageError(
        f"{where}: the array is on a device ({device}), expected one in host memory. "
        "Copy it first, for example with .cpu() or .get()."
    )
