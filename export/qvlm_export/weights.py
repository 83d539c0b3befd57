"""Constants of a graph: read from the checkpoint when they are serialised, written as external
data.

One tensor is in memory at a time: a graph holds ``ir.LazyTensor`` thunks until ``write_model`` asks
each for its bytes. Files get their names only when complete; the same checkpoint gives the same
bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm.progress import Progress

Array = npt.NDArray[Any]

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
FLOAT16_MAX = 65504.0
# Shape inference wants the small integer constants inside the graph; all that weighs goes outside.
INLINE_BYTES = 1024
# A page: both runtimes map the file and start each tensor on its own page.
ALIGNMENT = 4096


def to_float(array: Array, dtype: str, where: str) -> Array:
    """``array`` as the target's float type; ExportError naming ``where`` for NaN, infinity or
    overflow.
    """
    wide = array.astype(np.float32, copy=False)
    if not np.isfinite(wide).all():
        bad = tuple(int(i) for i in np.argwhere(~np.isfinite(wide))[0])
        raise ExportError(
            f"{where}: element {bad} is {wide[bad]}, expected finite numbers. "
            "The checkpoint is damaged: make it again."
        )
    largest = float(np.abs(wide).max(initial=0.0))
    if dtype == "float16" and largest > FLOAT16_MAX:
        raise ExportError(
            f"{where}: largest magnitude {largest:.6g} overflows float16 (65504). "
            "Use a target with another float type, or rescale this weight."
        )
    return wide.astype(DTYPES[dtype].numpy(), copy=False)


class Weights:
    """Lazy constants of one checkpoint in one float type."""

    def __init__(self, checkpoint: Checkpoint, dtype: str) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint

    def float_type(self) -> ir.DataType:
        """The graph's float element type."""
        return DTYPES[self.dtype]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, from the file's header."""
        return self.checkpoint.shape(name)

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """ExportError unless the stored tensor has this shape (the config and the file
        disagree).
        """
        if (found := self.shape(name)) != shape:
            raise ExportError(
                f"{name}: shape {list(found)}, expected {list(shape)} from config.json. "
                "Config and weights do not belong together."
            )

    def stored(
        self, name: str, shape: tuple[int, ...], transform: Callable[[Array], Array] | None = None
    ) -> ir.LazyTensor:
        """A float tensor of the checkpoint, ``transform``-ed to ``shape``."""

        def make() -> Array:
            array = self.checkpoint.float_tensor(name)
            return array if transform is None else transform(array)

        return self.lazy(name, shape, make)

    def lazy(self, where: str, shape: tuple[int, ...], make: Callable[[], Array]) -> ir.LazyTensor:
        """Any float constant; ``make`` gives float32 or wider and runs when the file is written."""

        def tensor() -> ir.TensorProtocol:
            array = np.ascontiguousarray(to_float(make(), self.dtype, where)).reshape(shape)
            return ir.Tensor(array, dtype=self.float_type())

        return ir.LazyTensor(tensor, self.float_type(), ir.Shape(shape))


def lazy_int8(shape: tuple[int, ...], make: Callable[[], Array]) -> ir.LazyTensor:
    """An INT8 constant; ``make`` gives int8 of ``shape``."""
    return ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(make()).reshape(shape), dtype=ir.DataType.INT8),
        ir.DataType.INT8,
        ir.Shape(shape),
    )


def lazy_int4(shape: tuple[int, ...], make: Callable[[], Array]) -> ir.LazyTensor:
    """An INT4 constant; ``make`` gives int8 values of ``shape`` in [-8, 7]. First element in the
    low nibble.
    """

    def tensor() -> ir.TensorProtocol:
        nibbles = make().reshape(-1).view(np.uint8) & np.uint8(15)
        packed = nibbles[0::2] | (nibbles[1::2] << np.uint8(4))
        return ir.PackedTensor(packed, ir.DataType.INT4, shape=shape)

    return ir.LazyTensor(tensor, ir.DataType.INT4, ir.Shape(shape))


def write_model(model: ir.Model, path: Path, progress: Progress) -> None:
    """Write ``path`` and ``path.data``, each under its name only when complete.

    Constants of ``INLINE_BYTES`` and more go to the data file, in graph order, each on a page of
    its own; the location in the graph is relative. ExportError if the disk refuses. Nothing is left
    behind on any failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(path.name + ".data")
    partials = [p.with_name(p.name + ".partial") for p in (data, path)]
    try:
        with partials[0].open("wb") as file:
            _write_constants(model, data.name, file, progress)
        partials[1].write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        os.replace(partials[0], data)
        os.replace(partials[1], path)
    except OSError as error:
        raise ExportError(
            f"{path}: not written ({error}). Free disk space or choose another folder."
        ) from error
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def _write_constants(model: ir.Model, location: str, file: Any, progress: Progress) -> None:
    values = list(model.graph.initializers.values())
    offset = 0
    for done, value in enumerate(values, 1):
        tensor = value.const_value
        if tensor is None:
            raise ExportError(f"{value.name}: constant without a value")
        raw = tensor.tobytes()
        if len(raw) < INLINE_BYTES:
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
            continue
        start = -(-offset // ALIGNMENT) * ALIGNMENT
        file.write(bytes(start - offset))
        file.write(raw)
        offset = start + len(raw)
        value.const_value = ir.ExternalTensor(
            location,
            start,
            len(raw),
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=str(value.name),
        )
        progress(location, done, len(values))
