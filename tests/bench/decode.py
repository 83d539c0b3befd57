"""Decode speed of a 1.1B Llama-shaped decoder with random weights on ONNX Runtime CPU: INT4 (w4a16) against float32.

Both graphs come from the exporter and run through the runtime, interleaved context by context in one process, so the
ratio holds when the machine's speed drifts. Printed beside the figures: the floor (bytes that one step must read over
the read bandwidth measured here) and the share of it reached; and what the cache costs from context 256 to 2,048
against attention's own reads. Random weights: this says nothing about accuracy.

Run: python tests/bench/decode.py [--layers 22] [--threads 2] [--repeats 3] [--json FILE]
Needs about 12 GB of memory and of disk at 22 layers; no network.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qvlm.checkpoint import Array, Checkpoint, CheckpointWriter, QuantizedLinear
from qvlm.progress import silent
from qvlm.recipe import FORMATS, RECIPES
from qvlm_export.graph import GraphBuilder
from qvlm_export.models.llama import LlamaConfig, decoder
from qvlm_export.targets import named_target
from qvlm_export.weights import Weights, write_model
from qvlm_runtime.backend import FAST, open_session
from qvlm_runtime.decoder import Decoder, DecoderState
from qvlm_runtime.image_spec import PixelSpec, WholeImage
from qvlm_runtime.manifest import ModelSpec, TargetSpec

CONTEXTS = (256, 512, 1024, 2048)
STEPS = 12
PREFIX, HEAD = "model.language_model", "lm_head"


@dataclass(frozen=True)
class Shape:
    """TinyLlama 1.1B's sizes, the number of layers free."""

    layers: int
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 64
    mlp: int = 5632
    vocab: int = 32000
    positions: int = 2304

    @staticmethod
    def scaled(layers: int, hidden: int) -> Shape:
        """The same proportions at another width, a multiple of 256: heads of 64, eight to a KV head."""
        heads = hidden // 64
        return Shape(layers, hidden, heads, max(1, heads // 8), mlp=hidden * 11 // 4)

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            self.hidden,
            self.mlp,
            self.layers,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.vocab,
            self.positions,
            rope={"rope_theta": 10000.0},
        )

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Name, outputs and inputs of every decoder linear."""
        kv, wide = self.kv_heads * self.head_dim, self.heads * self.head_dim
        for i in range(self.layers):
            at = f"{PREFIX}.layers.{i}"
            for name, out, columns in (
                ("self_attn.q_proj", wide, self.hidden),
                ("self_attn.k_proj", kv, self.hidden),
                ("self_attn.v_proj", kv, self.hidden),
                ("self_attn.o_proj", self.hidden, wide),
                ("mlp.gate_proj", self.mlp, self.hidden),
                ("mlp.up_proj", self.mlp, self.hidden),
                ("mlp.down_proj", self.hidden, self.mlp),
            ):
                yield f"{at}.{name}", out, columns

    def parameters(self) -> int:
        return sum(out * columns for _, out, columns in self.linears()) + self.hidden * self.vocab

    def spec(self) -> ModelSpec:
        return ModelSpec(
            family="llama",
            hidden_size=self.hidden,
            vocab_size=self.vocab,
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_context=self.positions,
            eos_token_ids=(2,),
            image_token="<image>",
            image_token_id=self.vocab - 1,
            feature_size=self.hidden,
        )


# Shapes of these benches are those of a decoder alone; profiles ask for an image of one row.
NO_IMAGES = WholeImage(PixelSpec(3, None, None, None), 1, ("exact", 1, 1), None)


def write_checkpoint(folder: Path, shape: Shape, quantized: bool) -> Checkpoint:
    """Random weights, N(0, 0.02) in float16 or random integers with a scale of that size."""
    rng = np.random.default_rng(0)
    writer = CheckpointWriter(folder)

    def normal(*size: int) -> Array:
        return (rng.standard_normal(size, np.float32) * np.float32(0.02)).astype(np.float16)

    for name, out, columns in shape.linears():
        if quantized:
            integers = rng.integers(-8, 8, (out, columns), np.int8)
            scale = np.full((out, columns // 128), np.float16(0.02 / 4.6), np.float32)
            writer.add_linear("text", name, QuantizedLinear(integers, scale, FORMATS["w4a16"]))
        else:
            writer.add(f"{name}.weight", normal(out, columns))
    for i in range(shape.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            writer.add(f"{PREFIX}.layers.{i}.{norm}.weight", np.ones(shape.hidden, np.float16))
    writer.add(f"{PREFIX}.norm.weight", np.ones(shape.hidden, np.float16))
    writer.add(f"{PREFIX}.embed_tokens.weight", normal(shape.vocab, shape.hidden))
    if quantized:
        integers = rng.integers(-8, 8, (shape.vocab, shape.hidden), np.int8)
        scale = np.full((shape.vocab, shape.hidden // 128), np.float16(0.02 / 4.6), np.float32)
        writer.add_linear("head", HEAD, QuantizedLinear(integers, scale, FORMATS["w4a16"]))
    else:
        writer.add(f"{HEAD}.weight", normal(shape.vocab, shape.hidden))
    writer.close({"model_type": "llava"}, RECIPES["w4a16"], {})
    return Checkpoint(folder)


def open_decoder(work: Path, shape: Shape, quantized: bool, threads: int) -> Decoder:
    """Export the decoder graph for target ort and open it as ``load`` would."""
    kind = "int4" if quantized else "float32"
    checkpoint = write_checkpoint(work / f"{kind}-checkpoint", shape, quantized)
    target = named_target("ort")
    builder = GraphBuilder("decoder", target, Weights(checkpoint, target.dtype))
    decoder(builder, shape.config(), PREFIX, HEAD, shape.positions, "bench")
    path = work / kind / "decoder.onnx"
    write_model(builder.model("bench"), path, silent)
    spec = TargetSpec(target.dtype, target.opset, target.cache, {"decoder": str(path)})
    session = open_session(path, threads=threads, accuracy_level=FAST)
    return Decoder(session, shape.spec(), spec, kind)


def read_bandwidth(threads: int) -> float:
    """Bytes per second read by ``threads`` threads summing 1 GiB; best of five."""
    data = np.ones(1 << 28, np.float32)
    parts = np.array_split(data, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.add.reduce, parts))
            best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def fill(decoder: Decoder, context: int) -> DecoderState:
    """A sequence of ``context`` tokens, prefilled 256 at a time."""
    rng = np.random.default_rng(context)
    state = decoder.start(context + STEPS * 8)
    for start in range(0, context, 256):
        state.step(rng.integers(3, 30000, min(256, context - start)))
    return state


def step_seconds(state: DecoderState) -> list[float]:
    """Seconds of each of STEPS decode steps."""
    times = []
    for token in range(100, 100 + STEPS):
        start = time.perf_counter()
        state.step((token,))
        times.append(time.perf_counter() - start)
    return times


def measure(
    decoders: dict[str, Decoder], context: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Median and fastest step of each decoder at one context, the decoders in turn."""
    states = {name: fill(d, context) for name, d in decoders.items()}
    for state in states.values():
        state.step((99,))
    times: dict[str, list[float]] = {name: [] for name in states}
    for _ in range(repeats):
        for name, state in states.items():
            times[name] += step_seconds(state)
    return {
        name: {"median_ms": 1e3 * statistics.median(t), "min_ms": 1e3 * min(t)}
        for name, t in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shape = Shape(args.layers)
    bandwidth = read_bandwidth(args.threads)
    weights = shape.parameters()
    read = {"int4": weights * (4 + 16 * 2 / 128) / 8, "float32": weights * 4.0}
    print(
        f"{platform.processor() or platform.machine()}, {args.threads} threads; {weights / 1e9:.2f}B weights read a "
        f"step; read bandwidth {bandwidth / 1e9:.1f} GB/s"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        decoders = {
            kind: open_decoder(Path(folder), shape, kind == "int4", args.threads)
            for kind in ("float32", "int4")
        }
        print("context  float32 ms  int4 ms  ratio  share of floor: float32, int4")
        for context in CONTEXTS:
            figures = measure(decoders, context, args.repeats)
            cache = 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim * context
            row = {"context": context, "cache_bytes": cache, **figures}
            f, q = (figures[k]["median_ms"] for k in ("float32", "int4"))
            shares = [
                1e3 * (read[k] + cache) / bandwidth / figures[k]["median_ms"]
                for k in ("float32", "int4")
            ]
            rows.append({**row, "ratio": f / q, "share_of_floor": shares})
            print(
                f"{context:7d}  {f:10.1f}  {q:7.1f}  {f / q:5.2f}  {shares[0]:.2f}, {shares[1]:.2f}"
            )
    first, last = rows[0], rows[-1]
    reads = last["cache_bytes"] - first["cache_bytes"]
    grown = last["int4"]["median_ms"] - first["int4"]["median_ms"]
    print(
        f"int4, context {first['context']} to {last['context']}: {grown:+.2f} ms a step; attention reads "
        f"{reads / 1e6:.1f} MB more, {1e3 * reads / bandwidth:.2f} ms at the measured bandwidth"
    )
    if args.json:
        result = {"bandwidth": bandwidth, "threads": args.threads, "weights": weights, "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
