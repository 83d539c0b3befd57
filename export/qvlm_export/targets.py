"""What each consumer of a graph has: a frozen row per target, looked up by name. Holds no
behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qvlm.errors import ExportError
from qvlm_runtime.manifest import CacheForm

FloatType = Literal["float16", "float32"]


@dataclass(frozen=True)
class Target:
    """One consumer. The reasons for each choice: graph forms measured by compiling, see README's
    design notes.

    dtype: float type of activations, float weights and scales.
    cache: "scatter" (TensorScatter into a buffer bound in place) or "append" (only the new rows are
        outputs).
    native_ops: RMSNormalization as an operator (opset 23) instead of primitives.
    int4_attention_output_2d: the INT4 projection behind attention runs on a 2-D tensor; in 3-D
        TensorRT expands the whole weight to float16 at every run, while ONNX Runtime fuses only
        3-D.
    int4_blocks: least number of INT4 blocks along K; TensorRT does not fuse a single one (rule
        W-05).
    image_batch: images in one run of the vision graph, None when free; a fixed 1 saves two kernels
        per layer.
    release: the TensorRT release whose rules the graph must keep, None outside TensorRT.
    """

    name: str
    opset: int
    dtype: FloatType
    cache: CacheForm
    native_ops: bool
    int4_attention_output_2d: bool
    int4_blocks: int
    image_batch: int | None
    release: str | None
    hardware: str

    @property
    def is_tensorrt(self) -> bool:
        """True for every TensorRT consumer."""
        return self.release is not None


def _tensorrt(name: str, release: str, hardware: str) -> Target:
    """The portable opset-21 graph: no operator that TensorRT 10.3 lacks."""
    return Target(name, 21, "float16", "append", False, True, 2, 1, release, hardware)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "ort", 24, "float32", "scatter", True, False, 1, None, None, "any CPU, ONNX Runtime"
        ),
        _tensorrt("rtx", "rtx-1.7", "GeForce/RTX sm86 and sm89, TensorRT for RTX"),
        _tensorrt("jetpack6", "10.3", "Jetson Orin sm87, TensorRT 10.3"),
    )
}


def named_target(name: str) -> Target:
    """The target of that name; ExportError listing the names otherwise."""
    if name not in TARGETS:
        raise ExportError(f"target {name!r} is unknown. Known: {', '.join(TARGETS)}.")
    return TARGETS[name]
