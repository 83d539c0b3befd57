"""A CLIP-L/336 tower (577 tokens, 1024 wide) with random weights on ONNX Runtime CPU: w8a8 against float32, and where
the time of each goes by operator.

Both graphs come from the exporter and run through the runtime's session, in turn, one image at a time, so the ratio
holds when the machine's speed drifts. The operator table is ONNX Runtime's own profile of five runs. Random weights:
this says nothing about accuracy.

Run: python tests/bench/vision.py [--layers 24] [--threads 2] [--rounds 9] [--json FILE]
Needs about 3 GB of memory at 24 layers; no network.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qvlm.checkpoint import Checkpoint, CheckpointWriter, QuantizedLinear
from qvlm.progress import silent
from qvlm.recipe import FORMATS, RECIPES
from qvlm_export.graph import GraphBuilder
from qvlm_export.models.vit import VitConfig, hidden_states
from qvlm_export.targets import named_target
from qvlm_export.weights import Weights, write_model
from qvlm_runtime.backend import FAST
from qvlm_runtime.bench.figure import figure, ratio
from qvlm_runtime.bench.machine import Machine
from qvlm_runtime.ort import OrtSession

PREFIX = "model.vision_tower.vision_model"
PROJECTOR = "model.multi_modal_projector"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
KINDS = ("float", "w8a8")
PROFILED = 5


def config(layers: int) -> VitConfig:
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    return VitConfig.from_json(sizes, "clip_vision_model", "bench")


def write_checkpoint(
    folder: Path, c: VitConfig, kind: str, projected: int | None = None
) -> Checkpoint:
    """Random weights: N(0, 0.02) in float16, or random integers with scales of that size.

    projected: the width of a projector's output; None writes no projector.
    """
    rng = np.random.default_rng(0)
    writer = CheckpointWriter(folder)

    def add(name: str, *shape: int) -> None:
        writer.add(name, (rng.standard_normal(shape, np.float32) * 0.02).astype(np.float16))

    def norm(name: str) -> None:
        writer.add(f"{name}.weight", np.ones(c.hidden_size, np.float16))
        add(f"{name}.bias", c.hidden_size)

    embeddings = f"{PREFIX}.embeddings"
    add(f"{embeddings}.class_embedding", c.hidden_size)
    add(f"{embeddings}.patch_embedding.weight", c.hidden_size, 3, c.patch_size, c.patch_size)
    add(f"{embeddings}.position_embedding.weight", c.patches + 1, c.hidden_size)
    norm(f"{PREFIX}.pre_layrnorm")
    attention = [(f"self_attn.{p}", c.hidden_size, c.hidden_size) for p in PROJECTIONS]
    mlp = [("mlp.fc1", c.intermediate_size, c.hidden_size)]
    mlp += [("mlp.fc2", c.hidden_size, c.intermediate_size)]
    linears = []
    for i in range(c.num_hidden_layers):
        layer = f"{PREFIX}.encoder.layers.{i}"
        norm(f"{layer}.layer_norm1")
        norm(f"{layer}.layer_norm2")
        linears += [(f"{layer}.{name}", out, columns) for name, out, columns in attention + mlp]
    if projected is not None:
        linears.append((f"{PROJECTOR}.linear_1", projected, c.hidden_size))
        linears.append((f"{PROJECTOR}.linear_2", projected, projected))
    for name, out, columns in linears:
        add(f"{name}.bias", out)
        if kind == "float":
            add(f"{name}.weight", out, columns)
            continue
        integers = rng.integers(-127, 128, (out, columns), np.int8)
        scale = np.full((out, 1), np.float16(0.02 / 73), np.float32)
        writer.add_linear("vision", name, QuantizedLinear(integers, scale, FORMATS[kind]))
    writer.close({"model_type": "llava"}, RECIPES["w8a8"], {})
    return Checkpoint(folder)


def write_tower(work: Path, c: VitConfig, kind: str) -> Path:
    """The tower's graph for target ort."""
    checkpoint, target = write_checkpoint(work / f"{kind}-checkpoint", c, kind), named_target("ort")
    b = GraphBuilder("vision", target, Weights(checkpoint, target.dtype))
    pixels = b.input("pixel_values", ir.DataType.FLOAT, (1, 3, c.image_size, c.image_size))
    (x,) = hidden_states(b, c, PREFIX, pixels, [c.num_hidden_layers])
    b.output(x, "image_features", ir.DataType.FLOAT, (1, c.patches + 1, c.hidden_size))
    path = work / kind / "vision.onnx"
    write_model(b.model("bench"), path, silent)
    return path


def operator_milliseconds(path: Path, threads: int, feed: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of one run by operator, the largest first, from ONNX Runtime's profile."""
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        session = OrtSession(path, threads=threads, accuracy_level=FAST, profile=profile)
        for _ in range(PROFILED):
            session.run(feed)
        events = json.loads(Path(session.native().end_profiling()).read_text(encoding="utf-8"))
        session.close()
    total: Counter[str] = Counter()
    for event in events:
        if event["name"].endswith("_kernel_time"):
            total[event["args"]["op_name"]] += event["dur"]
    return {name: us / 1e3 / PROFILED for name, us in total.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    c = config(args.layers)
    feed = {
        "pixel_values": np.random.default_rng(0).standard_normal((1, 3, 336, 336), np.float32),
    }
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as work:
        paths = {kind: write_tower(Path(work), c, kind) for kind in KINDS}
        sessions = {
            kind: OrtSession(path, threads=args.threads, accuracy_level=FAST)
            for kind, path in paths.items()
        }
        for i in range(args.rounds + 1):
            for kind in KINDS if i % 2 else KINDS[::-1]:
                start = time.perf_counter()
                sessions[kind].run(feed)
                if i:  # the first round warms up
                    times[kind].append(time.perf_counter() - start)
        operators = {k: operator_milliseconds(p, args.threads, feed) for k, p in paths.items()}
    speed = ratio(times["float"], times["w8a8"])
    print(f"{args.layers} layers, {args.threads} threads, {args.rounds} rounds")
    for kind in KINDS:
        one = figure(times[kind])
        print(
            f"{kind:6s} {1e3 * one.median:8.1f} ms [{1e3 * one.low:.1f}, {1e3 * one.high:.1f}]: "
            + ", ".join(f"{name} {ms:.1f}" for name, ms in list(operators[kind].items())[:8])
        )
    print(f"w8a8 is {speed.median:.2f} x as fast [{speed.low:.2f}, {speed.high:.2f}]")
    if args.json:
        settings = {"layers": args.layers, "threads": args.threads, "rounds": args.rounds}
        result = {"settings": settings, "machine": Machine().describe(), "seconds": times}
        result |= {"speed": asdict(speed), "operators_ms": operators}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
