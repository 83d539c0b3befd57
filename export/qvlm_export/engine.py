"""Engines with TensorRT, on the device that will run them.

The calls hold for TensorRT 10.3 to 11.4. A plan belongs to the release and the GPU it was built on;
both stand in the manifest. What the builder timed is kept in ``engines/timing.sm<NN>.cache``, so
building again is quick; a cache of another release or GPU, or a damaged one, is set aside and replaced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qvlm.errors import ExportError
from qvlm.progress import Progress
from qvlm_export.builder import (
    EngineRow,
    Options,
    Profile,
    compile_network,
    engine_spec,
    profiles,
    store_engine,
    write_file,
)
from qvlm_export.kernels import Kernel, kernels_of_engine
from qvlm_export.targets import Target
from qvlm_runtime.cuda import device
from qvlm_runtime.image_spec import ImageSpec
from qvlm_runtime.manifest import ModelSpec, TargetSpec
from qvlm_runtime.trt_library import message_log, tensorrt_module

BACKEND = "tensorrt"


def check_release(target: Target, version: str) -> None:
    """ExportError if TensorRT ``version`` is older than the release the graphs were made for."""
    wanted, found = (
        tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (str(target.release), version)
    )
    if found < wanted:
        raise ExportError(
            f"target {target.name}: TensorRT {version} is installed, its graphs are for "
            f"{target.release} and later. Export for a target of this release."
        )


def compile_graph(
    path: Path,
    shapes: Mapping[str, Profile],
    timing: Path,
    options: Options,
    progress: Progress,
) -> tuple[bytes, list[Kernel]]:
    """Parse and compile one graph for this device: the plan and its kernels, from the inspector.

    ``timing`` is read if it exists and written after. ExportError with the parser's node name, or
    the builder's message.
    """
    trt = tensorrt_module(BACKEND, str(path))

    def configure(config: Any) -> None:
        kept = timing.read_bytes() if timing.is_file() else b""
        cache = config.create_timing_cache(kept)  # None for bytes that are no cache
        if cache is None or not config.set_timing_cache(cache, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    plan, _, config = compile_network(trt, path, shapes, options, progress, configure)
    write_file(timing, bytes(config.get_timing_cache().serialize()))
    log = message_log(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ExportError(f"{path}: the plan does not open on this device ({log.errors()})")
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return plan, kernels_of_engine(text, str(path))


def compile_target(
    folder: Path,
    target: Target,
    spec: TargetSpec,
    model: ModelSpec,
    image: ImageSpec,
    progress: Progress,
    options: Options,
) -> tuple[TargetSpec, list[EngineRow]]:
    """Build every graph's engine for this device into ``<target>/engines/<graph>.sm<NN>.plan``.

    Returns the spec with the engines, and a row per engine. Each plan gets its name when complete,
    and only after its kernels were checked. ExportError; SessionError (qvlm_runtime) without a GPU
    or TensorRT.
    """
    version = str(tensorrt_module(BACKEND, str(folder)).__version__)
    check_release(target, version)
    sm = device().capability
    engines, rows = dict(spec.engines), []
    for stem, path in spec.graphs.items():
        shapes = profiles(stem, model, image, spec.cache)
        key = f"sm{sm}/{stem}"
        engines[key] = entry = engine_spec(spec, stem, BACKEND, version, sm, shapes)
        timing = (folder / entry.path).with_name(f"timing.sm{sm}.cache")
        plan, kernels = compile_graph(folder / path, shapes, timing, options, progress)
        rows.append(store_engine(folder, path, key, plan, kernels, entry))
    return replace(spec, engines=engines), rows
