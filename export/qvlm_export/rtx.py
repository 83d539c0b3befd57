"""Ahead-of-time engines with TensorRT for RTX, for any GPU generation on any machine.

Parsing and compiling need no GPU; running the engines does. The compiler lists its kernels in the
log at detailed profiling verbosity, and they are checked before a plan is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qvlm.errors import ExportError
from qvlm.progress import Progress, silent
from qvlm_export.builder import (
    EngineRow,
    Options,
    Profile,
    compile_network,
    engine_spec,
    profiles,
    store_engine,
)
from qvlm_export.kernels import Kernel, parse_kernels
from qvlm_runtime.image_spec import ImageSpec
from qvlm_runtime.manifest import ModelSpec, TargetSpec
from qvlm_runtime.trt_library import tensorrt_module

BACKEND = "tensorrt-rtx"
COMPUTE_CAPABILITIES = (86, 89)


def compile_graph(
    path: Path,
    shapes: Mapping[str, Profile],
    sm: int,
    options: Options | None = None,
    progress: Progress = silent,
) -> tuple[bytes, list[Kernel]]:
    """Parse and compile one graph for compute capability ``sm`` (86 is 8.6): the plan and its
    kernels.

    ExportError with the parser's node name, or with the compiler's message; SessionError
    (qvlm_runtime) if the wheels are absent.
    """
    trt = tensorrt_module(BACKEND, str(path))
    capability = getattr(trt.ComputeCapability, f"SM{sm}", None)
    if capability is None:
        known = ", ".join(n for n in trt.ComputeCapability.__members__ if n.startswith("SM"))
        raise ExportError(f"{path}: no compute capability SM{sm}. Known: {known}.")

    def configure(config: Any) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)

    try:
        plan, log, _ = compile_network(trt, path, shapes, options or Options(), progress, configure)
    except ExportError as error:
        raise ExportError(f"SM{sm}: {error}") from error
    kernels = parse_kernels(log)
    if not kernels:
        raise ExportError(
            f"{path}: no kernel list in the compiler's log. Use the pinned TensorRT for RTX 1.7.1"
        )
    return plan, kernels


def compile_target(
    folder: Path,
    spec: TargetSpec,
    model: ModelSpec,
    image: ImageSpec,
    progress: Progress,
    capabilities: Sequence[int] = COMPUTE_CAPABILITIES,
    options: Options | None = None,
) -> tuple[TargetSpec, list[EngineRow]]:
    """Compile every graph for every capability into ``<target>/engines/<graph>.sm<NN>.plan``.

    Returns the spec with the engines, and a row per engine. Each plan gets its name when complete,
    and only after its kernels were checked.
    """
    version = str(tensorrt_module(BACKEND, str(folder)).__version__)
    engines, rows = dict(spec.engines), []
    work = [(sm, stem, path) for sm in capabilities for stem, path in spec.graphs.items()]
    for done, (sm, stem, path) in enumerate(work):
        progress("engines", done, len(work))
        shapes = profiles(stem, model, image, spec.cache)
        plan, kernels = compile_graph(folder / path, shapes, sm, options, progress)
        key = f"sm{sm}/{stem}"
        engines[key] = engine_spec(spec, stem, BACKEND, version, sm, shapes)
        rows.append(store_engine(folder, path, key, plan, kernels, engines[key]))
    progress("engines", len(work), len(work))
    return replace(spec, engines=engines), rows
