"""Ahead-of-time engines with TensorRT for RTX, and what its compiler made of a graph, kernel by
kernel.

The only file that imports ``tensorrt_rtx_bindings``. Parsing and compiling need no GPU; running the
engines does. The compiler lists its kernels in the log at detailed profiling verbosity;
``check_kernels`` reads from that list that integer weights stay integers inside the products that
use them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from qvlm.errors import ExportError
from qvlm.progress import Progress
from qvlm_export.facts import GraphFacts, graph_facts
from qvlm_runtime.manifest import CacheForm, ModelSpec, TargetSpec

COMPUTE_CAPABILITIES = (86, 89)
# name -> (least, optimal, largest) shape
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class KernelTensor:
    """A tensor of a kernel: dimensions (-1 where dynamic) and the compiler's type name (Half, Int4
    ...).
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements of a constant."""
        return prod(self.shape)


@dataclass(frozen=True)
class Kernel:
    """One entry of the compiler's layer list. ``profile`` is the optimization profile it was made
    for.
    """

    name: str
    kind: str
    profile: int
    inputs: tuple[KernelTensor, ...]
    constants: tuple[KernelTensor, ...]
    outputs: tuple[KernelTensor, ...]

    def constant_elements(self, dtype: str) -> int:
        """Elements of its constants of one type."""
        return sum(t.elements for t in self.constants if t.dtype == dtype)


@dataclass(frozen=True)
class EngineRow:
    """One engine for the report: products fused with INT4 weights and run as INT8, in each
    profile.
    """

    engine: str
    file: str
    bytes: int
    kernels: str
    int4_products: int
    int8_products: int
    checked: bool


_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>.*?), Inputs: (?P<inputs>.*?), "
    r"(?:Constants: (?P<constants>.*?), )?Outputs: (?P<outputs>.*?), TacticName"
)
_TENSOR = re.compile(r"Dimensions: \[(?P<shape>.*?)\].*?Datatype: (?P<dtype>\w+)")
_PROFILE = re.compile(r"_myl(\d+)_\d+$")
# Entries of the list that launch nothing on the data.
_NO_KERNEL = ("shape_call", "signal", "wait")


def parse_kernels(log: Sequence[str]) -> list[Kernel]:
    """Kernels from the compiler's log, without shape computations and stream synchronisation."""
    kernels = []
    for message in log:
        if not message.startswith("Layers:"):
            continue
        for match in filter(None, map(_LINE.match, message.splitlines())):
            if match["kind"] in _NO_KERNEL:
                continue
            profile = _PROFILE.search(match["name"])
            kernels.append(
                Kernel(
                    match["name"],
                    match["kind"],
                    int(profile[1]) if profile else 0,
                    _tensors(match["inputs"]),
                    _tensors(match["constants"]),
                    _tensors(match["outputs"]),
                )
            )
    return kernels


def _tensors(text: str | None) -> tuple[KernelTensor, ...]:
    found = _TENSOR.finditer(text or "")
    return tuple(
        KernelTensor(tuple(int(n) for n in m["shape"].split(",") if n.strip()), m["dtype"])
        for m in found
    )


def check_kernels(kernels: Sequence[Kernel], facts: GraphFacts, where: str) -> None:
    """Assert from the kernel list, for every profile, that integer weights are used as integers.

    INT4: all weight elements are constants of kernels that multiply: ``runtime_fusion`` kernels, or
    in decode a kernel that dequantizes and sums in one go for small K. No kernel turns an INT4
    constant into a [K, N] float matrix (the compiler does that silently when a pattern is missed,
    at every run): such a kernel's output has as many elements as the constant.
    INT8: all weight elements are constants of kernels whose input is INT8 too. ExportError
    otherwise.
    """
    if not kernels:
        raise ExportError(
            f"{where}: no kernel list in the compiler's log. Use the pinned TensorRT for RTX 1.7.1"
        )
    for profile in sorted({k.profile for k in kernels}):
        here = [k for k in kernels if k.profile == profile]
        for k in here:
            if _expands(k):
                raise ExportError(
                    f"{where}, profile {profile}: kernel {k.name} expands an INT4 weight to {k.outputs[0].shape} "
                    "floats at every run, expected a fused product"
                )
        fused = sum(k.constant_elements("Int4") for k in here)
        _expect_elements(
            fused, facts.elements("INT4"), f"{where}, profile {profile}: INT4 weights fused"
        )
        integer = [k for k in here if any(t.dtype == "Int8" for t in k.inputs)]
        found = sum(k.constant_elements("Int8") for k in integer)
        _expect_elements(
            found, facts.elements("INT8"), f"{where}, profile {profile}: INT8 x INT8 weights"
        )


def _expands(kernel: Kernel) -> bool:
    """True if the kernel writes an INT4 constant out as floats instead of multiplying with it."""
    weight = kernel.constant_elements("Int4")
    wide = ("Half", "Float", "BFloat16")
    if not weight or kernel.kind == "runtime_fusion":
        return False
    return any(o.dtype in wide and o.elements >= weight for o in kernel.outputs)


def _expect_elements(found: int, expected: int, what: str) -> None:
    if found != expected:
        raise ExportError(
            f"{what}: {found} elements, expected {expected}. See the kernel list in the log."
        )


def integer_products(kernels: Sequence[Kernel], profile: int = 0) -> tuple[int, int]:
    """(kernels that multiply with INT4 weights, kernels that multiply INT8 by INT8) of one profile.

    A kernel that only writes its INT4 constant out as floats is no product.
    """
    here = [k for k in kernels if k.profile == profile]
    int4 = sum(1 for k in here if k.constant_elements("Int4") and not _expands(k))
    int8 = sum(
        1 for k in here if k.constant_elements("Int8") and any(t.dtype == "Int8" for t in k.inputs)
    )
    return int4, int8


def profiles(graph: str, model: ModelSpec, cache: CacheForm = "append") -> list[Profile]:
    """Optimization profiles of a graph: none for vision (fixed shapes), prefill and decode for the
    decoder.

    Prefill: S 1..max_context behind an empty cache (P = 0 exactly, which saves the past's copies).
    Decode: S = 1, P 1..max_context - 1. A "scatter" cache has fixed shapes.
    image_features: from one row to as many images as the context holds.
    """
    if graph == "vision":
        return []
    rows, context = model.tokens_per_image, model.max_context
    images = ((1, model.hidden_size), (rows, model.hidden_size))
    most = (max(1, context // rows) * rows, model.hidden_size)

    def profile(tokens: Sequence[int], past: Sequence[int]) -> Profile:
        shapes: dict[str, Any] = {
            name: tuple((1, n) for n in tokens)
            for name in ("input_ids", "image_index", "position_ids")
        }
        shapes["image_features"] = (*images, most)
        for i in range(model.layers if cache == "append" else 0):
            for kind in ("key", "value"):
                shapes[f"past_{kind}_{i}"] = tuple(
                    (1, n, model.kv_heads, model.head_dim) for n in past
                )
        return shapes

    middle = max(1, context // 2)
    return [
        profile((1, min(context, max(1, rows * 2)), context), (0, 0, 0)),
        profile((1, 1, 1), (1, middle, max(1, context - 1))),
    ]


def _bindings() -> Any:
    try:
        import tensorrt_rtx_bindings
    except ImportError as error:
        raise ExportError(
            f"TensorRT for RTX is not installed ({error}): pip install 'qvlm[rtx]'"
        ) from error
    return tensorrt_rtx_bindings


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps every message: the kernel list is one of them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append((severity, message))

        def errors(self) -> str:
            bad = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
            return "; ".join(" ".join(m.split()) for s, m in self.messages if s in bad)

    return Log()


def compile_graph(path: Path, shapes: Sequence[Profile], sm: int) -> tuple[bytes, list[Kernel]]:
    """Parse and compile one graph for compute capability ``sm`` (86 is 8.6): the plan and its
    kernels.

    Strongly typed; needs no GPU. ExportError with the parser's node name, or with the compiler's
    message.
    """
    trt = _bindings()
    capability = getattr(trt.ComputeCapability, f"SM{sm}", None)
    if capability is None:
        known = ", ".join(n for n in trt.ComputeCapability.__members__ if n.startswith("SM"))
        raise ExportError(f"{path}: no compute capability SM{sm}. Known: {known}.")
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        first = parser.get_error(0)
        raise ExportError(f"{path}: node {first.node_name()!r} is not accepted: {first.desc()}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)
    for one in shapes:
        profile = builder.create_optimization_profile()
        for name, (least, optimal, largest) in one.items():
            profile.set_shape(name, least, optimal, largest)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"{path}: profile {dict(one)} refused: {log.errors()}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(
            f"{path}: does not compile for SM{sm}: {log.errors() or 'no reason given'}"
        )
    return bytes(plan), _by_profile(parse_kernels([message for _, message in log.messages]))


def _by_profile(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The kernels with ``profile`` counted from 0.

    The compiler numbers segments, not profiles: where a cache is updated in place, each profile has
    a segment without kernels in front.
    """
    rank = {segment: i for i, segment in enumerate(sorted({k.profile for k in kernels}))}
    return [replace(kernel, profile=rank[kernel.profile]) for kernel in kernels]


def compile_target(
    folder: Path,
    spec: TargetSpec,
    model: ModelSpec,
    progress: Progress,
    capabilities: Sequence[int] = COMPUTE_CAPABILITIES,
) -> tuple[TargetSpec, list[EngineRow]]:
    """Compile every graph for every capability into ``<target>/engines/<graph>.sm<NN>.plan``.

    Returns the spec with the engines, and a row per engine. Each plan gets its name when complete,
    and only after ``check_kernels`` passed.
    """
    engines, rows = dict(spec.engines), []
    work = [(sm, stem, path) for sm in capabilities for stem, path in spec.graphs.items()]
    for done, (sm, stem, path) in enumerate(work):
        progress("engines", done, len(work))
        plan, kernels = compile_graph(folder / path, profiles(stem, model, spec.cache), sm)
        facts = graph_facts(folder / path)
        check_kernels(kernels, facts, f"{path} for SM{sm}")
        relative = str(Path(path).parent / "engines" / f"{stem}.sm{sm}.plan")
        _write(folder / relative, plan)
        engines[f"sm{sm}/{stem}"] = relative
        counts = [
            sum(k.profile == p for k in kernels) for p in sorted({k.profile for k in kernels})
        ]
        int4, int8 = integer_products(kernels)
        rows.append(
            EngineRow(
                f"sm{sm}/{stem}",
                relative,
                len(plan),
                " / ".join(map(str, counts)),
                int4,
                int8,
                True,
            )
        )
    progress("engines", len(work), len(work))
    return replace(spec, engines=engines), rows


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise ExportError(f"{path}: not written ({error}). Free disk space.") from error
    finally:
        partial.unlink(missing_ok=True)
