"""Which of a folder's engines or graphs this machine runs.

A plan runs on the TensorRT release and the compute capability it was built for, so both are
compared before it is opened. Asked for nothing in particular, ``choose`` takes engines where this
machine can run some, and graphs with ONNX Runtime where it has no GPU or no TensorRT. Where it has
both and the engines are another's, it takes the folder's "ort" graphs; a folder without them says
whose the engines are, as the graphs of a device target would run on the CPU, slowly and unasked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvlm_runtime.backend import BACKENDS, GRAPH_BACKENDS, PLAN_BACKENDS
from qvlm_runtime.cuda import device
from qvlm_runtime.errors import FolderError, SessionError
from qvlm_runtime.manifest import EngineSpec, Manifest, TargetSpec
from qvlm_runtime.trt_library import tensorrt_module

GRAPHS = ("vision", "decoder")


@dataclass(frozen=True)
class Choice:
    """What to open: ``paths`` maps "vision" and "decoder" to a path in the folder."""

    target: str
    backend: str
    paths: Mapping[str, str]


def choose(root: Path, manifest: Manifest, target: str | None, backend: str | None) -> Choice:
    """Target and backend, those given or the best that runs here.

    target None: one with engines for this GPU, else "ort", else the only one. FolderError for a
    target or backend that the folder does not have; SessionError if its engines are for another
    release or GPU, or ``backend`` cannot run here.
    """
    if backend is not None and backend not in BACKENDS:
        raise SessionError(f"{root}: no backend {backend!r}, expected one of {', '.join(BACKENDS)}")
    names = sorted(manifest.targets)
    if target is not None and target not in names:
        raise _no_target(root, names, target)
    if backend not in GRAPH_BACKENDS:
        try:
            choice = _engines(root, manifest, names if target is None else [target], backend)
        except SessionError:
            if target is not None or backend is not None or "ort" not in names:
                raise
            choice = None
        if choice is not None:
            return choice
    if target is None:
        preferred = [name for name in (backend, "ort") if name in names]
        target = preferred[0] if preferred else names[0] if len(names) == 1 else None
    if target is None:
        raise _no_target(root, names, target)
    graphs = manifest.targets[target].graphs
    absent = [graph for graph in GRAPHS if graph not in graphs]
    if absent:
        raise FolderError(f"{root / 'manifest.json'}: target {target} has no graph {absent[0]}.")
    return Choice(target, backend or "ort", {graph: graphs[graph] for graph in GRAPHS})


def _no_target(root: Path, names: Sequence[str], target: str | None) -> FolderError:
    return FolderError(
        f"{root}: target {target!r} is not one of the folder's: {', '.join(names) or 'none'}. "
        "Name one of these."
    )


def _engines(
    root: Path, manifest: Manifest, targets: Sequence[str], backend: str | None
) -> Choice | None:
    """The first target with engines for this machine; None if it has none and none was asked for."""
    refused: SessionError | None = None
    for name in targets:
        for kind in PLAN_BACKENDS if backend is None else (backend,):
            found = {k: e for k, e in manifest.targets[name].engines.items() if e.backend == kind}
            if not found or (backend is None and not _runs(kind)):
                continue
            try:
                return Choice(name, kind, _fitting(root, manifest.targets[name], kind))
            except SessionError as error:
                refused = refused or error
    if refused is not None:
        raise refused
    if backend is not None:
        raise FolderError(
            f"{root}: no engines for backend {backend} in target {', '.join(targets)}. "
            "Run qvlm-export build first."
        )
    return None


def _runs(kind: str) -> bool:
    """Whether this machine has the backend's module and a GPU."""
    try:
        tensorrt_module(kind, "engines")
        device()
    except SessionError:
        return False
    return True


def _fitting(root: Path, spec: TargetSpec, kind: str) -> dict[str, str]:
    """Paths of both engines for this release and GPU; SessionError naming what differs."""
    version = str(tensorrt_module(kind, str(root)).__version__)
    capability = device().capability
    paths = {}
    for graph in GRAPHS:
        built = [
            engine
            for key, engine in spec.engines.items()
            if engine.backend == kind and key.rpartition("/")[2] == graph
        ]
        here = [engine for engine in built if engine.capability == capability]
        if not here:
            raise SessionError(
                f"{root}: the {graph} engine is for {_list(built)}, this GPU is sm{capability}. "
                "Run qvlm-export build on this device, or load with backend='ort'."
            )
        if here[0].version != version:
            raise SessionError(
                f"{root}: the {graph} engine was built with {kind} {here[0].version}, here is "
                f"{version}. Run qvlm-export build again, or load with backend='ort'."
            )
        paths[graph] = here[0].path
    return paths


def _list(engines: Sequence[EngineSpec]) -> str:
    return ", ".join(sorted({f"sm{engine.capability}" for engine in engines})) or "no GPU"
