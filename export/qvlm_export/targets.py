"""What each consumer of a graph has: a frozen row per target, looked up by name, and its variants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from qvlm.errors import ExportError
from qvlm_runtime.manifest import CacheForm

FloatType = Literal["float16", "bfloat16", "float32"]
OnOverflow = Literal["refuse", "float32"]


@dataclass(frozen=True)
class Target:
    """One consumer. The reasons for each choice: graph forms measured by compiling, see README's
    design notes.

    dtype: float type of activations, float weights and scales; one of ``dtypes``.
    cache: "scatter" (TensorScatter into a buffer bound in place), "grown" (the same into a view of it
        that grows with what is valid) or "append" (only the new rows are outputs); one of ``caches``.
    native_ops: RMSNormalization and RotaryEmbedding as operators (opset 23) instead of primitives.
    int4_attention_output_2d: the INT4 projection behind attention runs on a 2-D tensor; in 3-D
        TensorRT expands the whole weight to float16 at every run, while ONNX Runtime fuses only
        3-D.
    int4_blocks: least number of INT4 blocks along K; TensorRT does not fuse a single one (rule
        W-05).
    int4_sizes: rows of an INT4 block that the consumer multiplies with (rule W-04).
    int4_joined: INT4 linears that read one tensor become one product and a Split. ONNX Runtime then
        starts fewer of them in a decode step; TensorRT's kernels for it were not measured.
    image_batch: images in one run of the vision graph, None when free; a fixed 1 saves two kernels
        per layer.
    release: the TensorRT release whose rules the graph must keep, None outside TensorRT.
    hardware: what it runs on, for people; sm: the GPU generations in it. Turing (sm75) is left out:
        it has neither INT4 nor bfloat16 (rule T-12).
    overflow: what to do with an activation that float16 does not hold: refuse the export, or compute
        its layer in float32 (wide.py).
    max_constant: bytes above which a weight is stored in pieces; None: no limit. A board
        of 8 GB refuses one allocation of hundreds of megabytes long before its memory is full.
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
    sm: tuple[int, ...] = ()
    dtypes: tuple[FloatType, ...] = ("float32",)
    caches: tuple[CacheForm, ...] = ()
    int4_sizes: tuple[int, ...] = (64, 128)
    int4_joined: bool = False
    max_constant: int | None = None
    overflow: OnOverflow = "refuse"

    @property
    def is_tensorrt(self) -> bool:
        """True for every TensorRT consumer."""
        return self.release is not None

    @property
    def attention_operator(self) -> bool:
        """Attention-23 instead of primitives: TensorRT reads a cache in place only through it.

        Primitives behind TensorScatter would repeat the whole cache at every step (rule C-05).
        """
        return self.is_tensorrt and self.cache == "scatter"


def _tensorrt(name: str, release: str, hardware: str, *sm: int, scatter: bool = False) -> Target:
    """The portable opset-21 graph: no operator that TensorRT 10.3 lacks.

    ``scatter``: the release has TensorScatter too (10.15 and later). "append" stays its default: it
    compiles to fewer kernels.
    """
    caches: tuple[CacheForm, ...] = ("append", "scatter") if scatter else ("append",)
    return Target(
        name,
        21,
        "float16",
        "append",
        native_ops=False,
        int4_attention_output_2d=True,
        int4_blocks=2,
        image_batch=1,
        release=release,
        hardware=hardware,
        sm=sm,
        dtypes=("float16", "bfloat16"),
        caches=caches,
    )


def _onnxruntime(name: str, dtype: FloatType, cache: CacheForm, hardware: str) -> Target:
    """The opset-24 graph with the cache in place, for ONNX Runtime 1.24 and later."""
    return Target(
        name,
        24,
        dtype,
        cache,
        native_ops=True,
        int4_attention_output_2d=False,
        int4_blocks=1,
        image_batch=None,
        release=None,
        hardware=hardware,
        dtypes=(dtype,),
        caches=(cache,),
        int4_sizes=(16, 32, 64, 128, 256),
        int4_joined=True,
    )


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _onnxruntime("ort", "float32", "grown", "any CPU, ONNX Runtime"),
        _onnxruntime("ort-cuda", "float16", "scatter", "NVIDIA GPUs, ONNX Runtime's CUDA provider"),
        _tensorrt(
            "rtx",
            "rtx-1.7",
            "GeForce and RTX, TensorRT for RTX",
            *(80, 86, 89, 120),
            scatter=True,
        ),
        _tensorrt("jetpack6", "10.3", "Jetson Orin, TensorRT 10.3", 87),
        _tensorrt("jetpack7.0", "10.13", "Jetson Thor, TensorRT 10.13", 110),
        _tensorrt(
            "jetpack7.2", "10.16", "Jetson Orin and Thor, TensorRT 10.16", 87, 110, scatter=True
        ),
        _tensorrt(
            "trt10",
            "10.16",
            "desktop and server GPUs, TensorRT 10.15 and 10.16",
            *(80, 86, 89, 90, 100, 120),
            scatter=True,
        ),
        _tensorrt(
            "trt11",
            "11.4",
            "desktop and server GPUs, TensorRT 11",
            *(80, 86, 89, 90, 100, 120),
            scatter=True,
        ),
    )
}


@dataclass(frozen=True)
class Variant:
    """What a request asks of its targets beyond their defaults; None leaves the default."""

    dtype: FloatType | None = None
    cache: CacheForm | None = None
    max_constant: int | None = None
    overflow: OnOverflow = "refuse"


DEFAULT = Variant()


def named_target(name: str, variant: Variant = DEFAULT) -> Target:
    """The target of that name in that variant; ExportError listing what there is otherwise."""
    if name not in TARGETS:
        raise ExportError(f"target {name!r} is unknown. Known: {', '.join(TARGETS)}.")
    target = TARGETS[name]
    dtype, cache = variant.dtype or target.dtype, variant.cache or target.cache
    for what, found, known in (
        ("dtype", dtype, target.dtypes),
        ("cache", cache, target.caches),
    ):
        if found not in known:
            raise ExportError(f"target {name}: {what} {found}, expected {' or '.join(known)}.")
    target = replace(
        target,
        dtype=dtype,
        cache=cache,
        max_constant=variant.max_constant,
        overflow=variant.overflow,
    )
    if target.attention_operator:  # TensorScatter came with opset 24
        target = replace(target, opset=24, native_ops=True)
    return target
