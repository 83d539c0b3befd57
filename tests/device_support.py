"""What the tests of engines share: a machine made of fakes, and toy folders with engines in them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import onnx
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT
from PIL import Image
from runtime_support import (
    IMAGE_ROWS,
    TEMPLATE,
    image_spec,
    model_spec,
    target_spec,
    toy_decoder,
    toy_vision,
    write_byte_tokenizer,
)

from qvlm_export.builder import profiles
from qvlm_runtime.manifest import EngineSpec, Manifest, digest

# One of each generation of the API: JetPack 6, JetPack 7.0, JetPack 7.2, the latest, and RTX's.
DRIVEN = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106", "rtx-1.7.1.116")


_GENERATOR = np.random.default_rng(0)


@dataclasses.dataclass
class Machine:
    """A fake GPU and the TensorRT on it."""

    gpu: FakeCuda
    trt: FakeTensorRT

    @property
    def backend(self) -> str:
        return "tensorrt-rtx" if self.trt.release.startswith("rtx") else "tensorrt"


def machine(
    monkeypatch: pytest.MonkeyPatch,
    release: str,
    cuda_release: str = fake_cuda.CUDA_RELEASES[-1],
    **options: Any,
) -> Machine:
    """Fakes in place of this machine's libraries; ``options`` go to the GPU."""
    gpu = fake_cuda.install(monkeypatch, cuda_release, **options)
    return Machine(gpu, fake_tensorrt.install(monkeypatch, release, gpu))


def plan_bytes(machine: Machine, path: Path, shapes: Mapping[str, Any]) -> bytes:
    """A plan as the fake builder writes it."""
    plan = {
        "release": machine.trt.release,
        "capability": machine.gpu.capability,
        "path": str(path),
        "profiles": list(shapes.values()),
        "detailed": True,
    }
    return json.dumps(plan).encode()


def toy_engines(
    folder: Path,
    machine: Machine,
    cache: str = "append",
    dtype: str = "float32",
    both: bool = False,
    **changes: Any,
) -> Manifest:
    """A toy folder with one target, "device", its graphs and its engines for this machine; ``both``
    adds target "ort" with the same graphs.
    """
    spec, target = model_spec(**changes), target_spec(cache, dtype, "device")
    (folder / "device/engines").mkdir(parents=True)
    write_byte_tokenizer(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    engines = {}
    for graph, path in target.graphs.items():
        model = toy_vision(spec, target) if graph == "vision" else toy_decoder(spec, target)
        _fix(model, {"N": 1, "R": IMAGE_ROWS, "C": spec.max_context})
        onnx.save(model, folder / path)
        plan = f"device/engines/{graph}.sm87.plan"
        shapes = profiles(graph, spec, image_spec(), target.cache)
        (folder / plan).write_bytes(plan_bytes(machine, folder / path, shapes))
        engines[f"sm87/{graph}"] = EngineSpec(plan, machine.backend, machine.trt.__version__, 87)
    files = {
        str(path.relative_to(folder)): digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    targets = {"device": dataclasses.replace(target, engines=engines)}
    if both:
        targets["ort"] = target
    manifest = Manifest("0.0.1", spec, image_spec(), targets, files, {"method": "float"})
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def pictures(count: int) -> list[Image.Image]:
    """Noise of different sizes."""
    shapes = _GENERATOR.integers(4, 30, (count, 2))
    return [Image.fromarray(_GENERATOR.integers(0, 256, (h, w, 3), np.uint8)) for h, w in shapes]


def _fix(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Give dimensions a size, as an exported graph for TensorRT has them."""
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
