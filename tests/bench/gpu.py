"""What a GPU does with our graphs: accuracy, speed and memory against float16 in the same run.

    (a) ONNX Runtime CUDA: logits of the demo against its goldens; prefill, decode and memory of
        w4a16 and w8a8 against float16 for decoder shapes of 1B to 7B with random weights; Hugging
        Face's float16 `generate` of the same shape beside them.
    (b) TensorRT for RTX: whether it runs on this GPU, and what it says if it does not.
    (c) the token-normalised INT8 product at the largest accumulators, against float64.

The anchors of the paper, in ratio to float16: 2.78 times less memory, 1.44 times the speed.
A part that fails says why and the others run. Random weights say nothing about accuracy; (a)'s
goldens do. Never run on a GPU so far: there was none at hand.

Run: python tests/bench/gpu.py [--shapes 1b 3b 7b] [--parts a b c] [--backend ort-cuda] [--dry-run]
Needs a CUDA GPU, onnxruntime-gpu, the extras [tensorrt] and [rtx]; disk for one shape at a time (7b:
14 GB); no network. `--backend ort --shapes tiny --parts a c` runs the same code on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from decode import HEAD, NO_IMAGES, PREFIX, Shape
from engine_sizes import write_checkpoint

from qvlm.checkpoint import Checkpoint
from qvlm.errors import QvlmError
from qvlm.progress import reporter
from qvlm.quantize import quantize
from qvlm.recipe import RECIPES
from qvlm_export.build import build, model_spec
from qvlm_export.builder import profiles
from qvlm_export.graph import GraphBuilder
from qvlm_export.models.llama import decoder as build_decoder
from qvlm_export.rtx import compile_graph
from qvlm_export.targets import named_target
from qvlm_export.weights import Weights, write_model
from qvlm_runtime.backend import EXACT, FAST, open_session
from qvlm_runtime.cuda import device
from qvlm_runtime.decoder import Decoder
from qvlm_runtime.errors import RuntimeFault
from qvlm_runtime.manifest import TargetSpec

SHAPES = {
    "tiny": Shape(2, 256, 4, 2, 64, 512, 1000, 512),
    "1b": Shape(22),
    "3b": Shape(28, 3072, 24, 8, 128, 8192, 128256, 2304),
    "7b": Shape(32, 4096, 32, 32, 128, 11008, 32064, 2304),
}
FORMATS = ("float", "w4a16", "w8a8")
CAUGHT = (RuntimeFault, QvlmError, RuntimeError, OSError, ImportError, ValueError)


def memory_used() -> int | None:
    """Bytes of GPU memory taken by all processes, None without a GPU."""
    try:
        free, total = device().memory()
    except RuntimeFault:
        return None
    return total - free


def describe() -> dict[str, Any]:
    """The device, as CUDA and the driver tell it."""
    told: dict[str, Any] = {}
    try:
        gpu = device()
        told = {"sm": gpu.capability, "memory": gpu.memory()[1]}
        import torch

        if torch.cuda.is_available():
            told |= {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    except RuntimeFault as error:
        told["gpu"] = str(error)
    for module in ("onnxruntime", "tensorrt_rtx_bindings", "tensorrt"):
        try:
            told[module] = __import__(module).__version__
        except ImportError:
            told[module] = None
    return told


def goldens(work: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The demo's goldens through the backend: relative RMS error of the logits, greedy agreement."""
    rows = []
    for recipe in args.formats:
        options = RECIPES[recipe].with_options(method="rtn", samples=8)
        checkpoint = Checkpoint(
            quantize("demo", work / recipe, options, goldens=4, progress=reporter())
        )
        folder = work / f"{recipe}-graphs"
        spec = build(checkpoint, named_target(args.target), folder, None, reporter())
        session = open_session(
            folder / spec.graphs["decoder"], accuracy_level=EXACT, backend=args.backend
        )
        decoder, error, size, same, count = (
            Decoder(session, model_spec(checkpoint), spec),
            0.0,
            0.0,
            0,
            0,
        )
        for golden in checkpoint.goldens():
            wanted, tokens = golden.outputs["quant"]["logits"], golden.inputs["tokens"]
            ids = golden.inputs["input_ids"]
            state = decoder.start(len(ids) + len(tokens), golden.outputs["quant"]["image_features"])
            got = [state.step(ids, golden.inputs["image_index"])]
            got += [state.step((int(token),)) for token in tokens[:-1]]
            for one, other in zip(got, wanted, strict=True):
                error += float(np.square(one.astype(np.float64) - other).sum())
                size += float(np.square(other.astype(np.float64)).sum())
                same += int(one.argmax() == other.argmax())
                count += 1
        session.close()
        rows.append({"format": recipe, "rms": (error / size) ** 0.5, "same": same, "of": count})
    return rows


def timed(decoder: Decoder, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a prefill of args.prompt tokens and of a decode step behind it, medians."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, decoder.model.vocab_size - 8, args.prompt)
    prefills, steps = [], []
    for repeat in range(args.repeats + 1):  # the first warms up
        state = decoder.start(args.prompt + args.steps)
        start = time.perf_counter()
        state.step(ids)
        if repeat:
            prefills.append(time.perf_counter() - start)
        for _ in range(args.steps):
            start = time.perf_counter()
            state.step((7,))
            if repeat:
                steps.append(time.perf_counter() - start)
    return {
        "prefill_ms": 1e3 * statistics.median(prefills),
        "step_ms": 1e3 * statistics.median(steps),
    }


def graph_file(
    folder: Path, shape: Shape, recipe: str, target_name: str
) -> tuple[Path, TargetSpec]:
    """A decoder graph of random weights."""
    checkpoint, target = write_checkpoint(folder / recipe, shape, recipe), named_target(target_name)
    builder = GraphBuilder("decoder", target, Weights(checkpoint, target.dtype))
    build_decoder(builder, shape.config(), PREFIX, HEAD, shape.positions, "bench")
    path = folder / f"{recipe}.onnx"
    write_model(builder.model("bench"), path, reporter())
    return path, TargetSpec(target.dtype, target.opset, target.cache, {"decoder": path.name})


def speeds(work: Path, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every format of one shape, one after another, so each has the device's memory to itself."""
    rows: list[dict[str, Any]] = []
    for recipe in args.formats:
        path, spec = graph_file(work, SHAPES[name], recipe, args.target)
        before = memory_used()
        session = open_session(path, accuracy_level=FAST, backend=args.backend)
        row = {"format": recipe, **timed(Decoder(session, SHAPES[name].spec(), spec), args)}
        after = memory_used()
        row["memory"] = None if before is None or after is None else after - before
        session.close()
        gc.collect()
        rows.append(row)
    if args.huggingface:
        rows.append(huggingface(SHAPES[name], args))
    return rows


def huggingface(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """`generate` of transformers in float16 on the GPU, random weights of the same shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not torch.cuda.is_available():
        return {"format": "transformers", "error": "torch finds no CUDA device"}
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.positions,
    )
    before = memory_used()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    ids = torch.randint(3, shape.vocab - 8, (1, args.prompt), device="cuda")

    def seconds(new: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(2)
    one = statistics.median(seconds(1) for _ in range(args.repeats))
    many = statistics.median(seconds(1 + args.steps) for _ in range(args.repeats))
    after = memory_used()
    return {
        "format": "transformers",
        "prefill_ms": 1e3 * one,
        "step_ms": 1e3 * (many - one) / args.steps,
        "memory": None if before is None or after is None else after - before,
    }


def rtx(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Compile w4a16 of the first shape for this GPU with TensorRT for RTX, open it, time it."""
    shape, sm = SHAPES[args.shapes[0]], device().capability
    path, spec = graph_file(work, shape, "w4a16", "rtx")
    plan, _ = compile_graph(
        path, profiles("decoder", shape.spec(), NO_IMAGES), sm, progress=reporter()
    )
    path.with_suffix(".plan").write_bytes(plan)
    session = open_session(path.with_suffix(".plan"), backend="tensorrt-rtx")
    return {"shape": args.shapes[0], **timed(Decoder(session, shape.spec(), spec), args)}


_PRODUCT = """
<ir_version: 10, opset_import: ["" : 21]>
product (float16[1, S, {k}] x) => (float16[1, S, {n}] y) {{
    last = Constant <value = int64[1] {{-1}}> ()
    absolute = Abs (x)
    m = ReduceMax (absolute, last)
    unit = Div (x, m)
    q = QuantizeLinear (unit, step, zero)
    d = DequantizeLinear (q, step)
    w = DequantizeLinear (weight, scale)
    raw = MatMul (d, w)
    channels = Mul (raw, factor)
    y = Mul (channels, m)
}}
"""


def accumulators(work: Path, depth: int, args: argparse.Namespace) -> dict[str, Any]:
    """The product with every integer at its largest: the error of one output, in float16's units.

    Exact: 127 * 127 * depth in the accumulator, far beyond float16; the result itself fits. Four
    roundings to float16 (product, factor, m, and 1/127 once) bound it at 4 * 2^-11.
    """
    columns, tokens = 64, 8
    model = onnx.parser.parse_model(_PRODUCT.format(k=depth, n=columns))
    scale = np.float16(2.0**-12)
    tensors = {
        "step": np.float16(1 / 127),
        "zero": np.int8(0),
        "weight": np.full((depth, columns), 127, np.int8),
        "scale": scale,
        "factor": np.full(columns, 0.5, np.float16),
    }
    for name, value in tensors.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    path = work / f"product-{depth}.onnx"
    onnx.save(model, path)
    session = open_session(path, accuracy_level=EXACT, backend=args.backend)
    got = session.run({"x": np.ones((1, tokens, depth), np.float16)})["y"].astype(np.float64)
    exact = depth * 127 * float(np.float16(1 / 127)) * 127 * float(scale) * 0.5
    error = float(np.abs(got - exact).max() / exact)
    return {"depth": depth, "accumulator": 127 * 127 * depth, "error": error, "bound": 4 * 2**-11}


def attempt(what: str, result: dict[str, Any], part: Callable[[], Any]) -> None:
    """Run one part; its figures or its error go into the result, and to the terminal."""
    try:
        result[what] = part()
    except CAUGHT as error:
        result[what] = {"error": " ".join(str(error).split()) or type(error).__name__}
    print(f"{what}: {json.dumps(result[what])}", flush=True)


def plan(args: argparse.Namespace) -> list[str]:
    """What would run."""
    lines = []
    for name in args.shapes:
        weights = SHAPES[name].parameters()
        lines.append(
            f"{name}: {weights / 1e9:.2f}B weights, float16 {2 * weights / 1e9:.1f} GB, w4a16 about "
            f"{weights * 4.125 / 8e9:.1f} GB; formats {', '.join(args.formats)}; prompt {args.prompt}, "
            f"{args.steps} steps, {args.repeats} repeats"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "3b", "7b"])
    parser.add_argument("--parts", nargs="+", choices=("a", "b", "c"), default=["a", "b", "c"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--backend", choices=("ort-cuda", "ort"), default="ort-cuda")
    parser.add_argument("--target", default="ort-cuda", help="whose graphs ONNX Runtime gets")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-goldens", dest="goldens", action="store_false")
    parser.add_argument("--no-huggingface", dest="huggingface", action="store_false")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"device": describe(), "prompt": args.prompt}
    print(f"device: {json.dumps(result['device'])}")
    if args.dry_run:
        print("\n".join(plan(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if "a" in args.parts and args.goldens:
            attempt("goldens", result, lambda: goldens(work, args))
        for name in args.shapes if "a" in args.parts else ():
            with tempfile.TemporaryDirectory(dir=work) as one:
                attempt(f"speed {name}", result, lambda: speeds(Path(one), name, args))  # noqa: B023
        if "b" in args.parts:
            attempt("TensorRT for RTX", result, lambda: rtx(work, args))
        for depth in (1024, 4096, 11008) if "c" in args.parts else ():
            attempt(f"INT8 {depth}", result, lambda: accumulators(work, depth, args))  # noqa: B023
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
