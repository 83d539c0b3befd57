"""Graphs through the compiler of TensorRT for RTX, with the kernels it made. For tests and measurements; needs the
extra [rtx].
"""

from __future__ import annotations

from pathlib import Path

from qvlm.checkpoint import Checkpoint
from qvlm_export import rtx
from qvlm_export.build import image_spec, model_spec
from qvlm_export.builder import profiles
from qvlm_export.facts import graph_facts
from qvlm_export.kernels import Kernel, check_kernels
from qvlm_runtime.manifest import TargetSpec

# Of one graph, by optimization profile: the tower has one, a decoder prefill, decode, and a piece behind a past.
Kernels = list[list[Kernel]]


def compile_graphs(
    folder: Path, spec: TargetSpec, checkpoint: Checkpoint, sm: int
) -> dict[str, Kernels]:
    """Graph -> kernels of each profile; ExportError if integer weights are not used as integers."""
    model, image = model_spec(checkpoint), image_spec(checkpoint)
    found = {}
    for stem, path in spec.graphs.items():
        shapes = profiles(stem, model, image, spec.cache)
        _, kernels = rtx.compile_graph(folder / path, shapes, sm)
        check_kernels(kernels, graph_facts(folder / path), stem)
        ids = sorted({kernel.profile for kernel in kernels})
        found[stem] = [[k for k in kernels if k.profile == i] for i in ids]
    return found


def counts(found: dict[str, Kernels]) -> tuple[int, int, int]:
    """Kernels of an image, of a prompt and of a decode step."""
    prefill, decode = found["decoder"][:2]
    (vision,) = found["vision"]
    return len(vision), len(prefill), len(decode)
