"""Bytes of TensorRT for RTX engines: w4a16 and w8a8 against float16 engines of the same model.

Compiled ahead of time, no GPU needed, kernels checked as in an export. Two models: the embedded demo
(vision and decoder, rounded to nearest: sizes do not depend on the method), and the decoder of
tests/bench/decode.py's 1.1B shape with random weights. Of the second, engines of two depths are
compiled and a layer's bytes taken from their difference; ``--exact`` compiles the full depth too.

Run: python tests/bench/engine_sizes.py [--sm 86] [--layers 22] [--depths 1 3] [--exact] [--json FILE]
Needs the extra [rtx], 4 GB of memory (12 GB with --exact) and of disk; no network.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import HEAD, NO_IMAGES, PREFIX, Shape

from qvlm.affine import quantize_weight
from qvlm.checkpoint import Checkpoint, CheckpointWriter, QuantizedLinear
from qvlm.progress import reporter
from qvlm.quantize import quantize
from qvlm.recipe import RECIPES
from qvlm_export.build import build, image_spec, model_spec
from qvlm_export.builder import profiles
from qvlm_export.facts import graph_facts
from qvlm_export.graph import GraphBuilder
from qvlm_export.kernels import check_kernels
from qvlm_export.models.llama import decoder
from qvlm_export.rtx import compile_graph, compile_target
from qvlm_export.targets import named_target
from qvlm_export.weights import Weights, write_model

FORMATS = ("float", "w4a16", "w8a8")


def demo_bytes(work: Path, recipe: str, sm: int) -> dict[str, int]:
    """Bytes of the demo's engines, by graph."""
    options = RECIPES[recipe].with_options(method="rtn", samples=8)
    checkpoint = Checkpoint(
        quantize("demo", work / recipe, options, goldens=2, progress=reporter())
    )
    spec = build(checkpoint, named_target("rtx"), work / f"{recipe}-graphs", None, reporter())
    model = model_spec(checkpoint)
    _, rows = compile_target(
        work / f"{recipe}-graphs", spec, model, image_spec(checkpoint), reporter(), (sm,)
    )
    return {row.engine.rpartition("/")[2]: row.bytes for row in rows}


def write_checkpoint(folder: Path, shape: Shape, recipe: str) -> Checkpoint:
    """Random weights N(0, 0.02), rounded to nearest in the recipe's formats."""
    generator = torch.Generator().manual_seed(0)
    writer = CheckpointWriter(folder)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * 0.02

    linears = [("text", *one) for one in shape.linears()]
    for component, name, out, columns in [*linears, ("head", HEAD, shape.vocab, shape.hidden)]:
        format_ = RECIPES[recipe].format_of(component, name)
        weight = normal(out, columns)
        if format_.weights is None:
            writer.add(f"{name}.weight", weight.numpy().astype(np.float16))
        else:
            q = quantize_weight(weight, format_.weights)
            linear = QuantizedLinear(q.integers.numpy(), q.scale.numpy(), format_)
            writer.add_linear(component, name, linear)
    ones = np.ones(shape.hidden, np.float16)
    for i in range(shape.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            writer.add(f"{PREFIX}.layers.{i}.{norm}.weight", ones)
    writer.add(f"{PREFIX}.norm.weight", ones)
    embedding = normal(shape.vocab, shape.hidden).numpy().astype(np.float16)
    writer.add(f"{PREFIX}.embed_tokens.weight", embedding)
    writer.close({"model_type": "llava"}, RECIPES[recipe], {})
    return Checkpoint(folder)


def decoder_bytes(work: Path, shape: Shape, recipe: str, sm: int) -> int:
    """Bytes of the decoder's engine."""
    folder = work / f"{recipe}-{shape.layers}"
    checkpoint, target = write_checkpoint(folder, shape, recipe), named_target("rtx")
    builder = GraphBuilder("decoder", target, Weights(checkpoint, target.dtype))
    decoder(builder, shape.config(), PREFIX, HEAD, shape.positions, "bench")
    path = folder / "decoder.onnx"
    write_model(builder.model("bench"), path, reporter())
    plan, kernels = compile_graph(
        path, profiles("decoder", shape.spec(), NO_IMAGES), sm, progress=reporter()
    )
    check_kernels(kernels, graph_facts(path), f"{recipe}, {shape.layers} layers")
    return len(plan)


def shape_row(recipe: str, args: argparse.Namespace) -> dict[str, Any]:
    """One format of the 1.1B shape: bytes at each compiled depth, and at the full one."""
    measured = {}
    for depth in sorted({*args.depths, *([args.layers] if args.exact else [])}):
        with tempfile.TemporaryDirectory() as folder:
            shape = replace(Shape(depth), layers=depth)
            measured[depth] = decoder_bytes(Path(folder), shape, recipe, args.sm)
    low, high = min(args.depths), max(args.depths)
    layer = (measured[high] - measured[low]) / (high - low)
    full = measured.get(args.layers, round(measured[low] + layer * (args.layers - low)))
    return {"format": recipe, "measured": measured, "bytes": full, "layer": layer}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sm", type=int, default=86)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--depths", type=int, nargs=2, default=(1, 3))
    parser.add_argument("--exact", action="store_true", help="compile the full depth too")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--model", choices=("demo", "1b", "both"), default="both")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.depths[0] == args.depths[1]:
        parser.error("--depths: two different numbers of layers")
    result: dict[str, Any] = {"sm": args.sm}
    if args.model != "1b":
        rows = {}
        for recipe in args.formats:
            with tempfile.TemporaryDirectory() as folder:
                rows[recipe] = demo_bytes(Path(folder), recipe, args.sm)
        result["demo"] = rows
        for recipe, row in rows.items():
            whole = sum(row.values())
            ratio = whole / sum(rows.get("float", row).values())
            parts = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in row.items())
            print(f"demo   {recipe:<6} {whole / 1e6:9.2f} MB  {ratio:.3f}x float16  ({parts})")
    if args.model != "demo":
        start = time.perf_counter()
        shapes = [shape_row(recipe, args) for recipe in args.formats]
        result["1.1B"] = shapes
        base = next((row["bytes"] for row in shapes if row["format"] == "float"), None)
        how = "compiled" if args.exact else f"from depths {list(args.depths)}"
        for row in shapes:
            ratio = row["bytes"] / (base or row["bytes"])
            print(
                f"1.1B   {row['format']:<6} {row['bytes'] / 1e6:9.2f} MB  {ratio:.3f}x float16  ({how})"
            )
        print(f"{time.perf_counter() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
