"""What each method costs: processor seconds and peak memory on the demo and on a 1B-shaped decoder, as multiples of
GPTQ's in the same run.

The 1B shape is TinyLlama's (22 layers, hidden 2048, feed-forward 5632, 32 heads of 64, 4 key-value heads) behind a
small vision tower, random weights, random pictures: costs do not depend on values, accuracy is not looked at. Only
--layers of the 22 are built and quantized. Every method here works block by block, so its seconds are scaled by
22 / layers; its memory is the layers' copy (which grows with them) and the working set of one block (which does not),
so the peak is given as measured and not scaled. The methods take turns --repeats times; the fastest turn counts, as
noise only adds. Seconds are the processor's (all threads), which other work on the machine does not lengthen much; the
clock's are in the JSON.

Run: python tests/bench/methods_cost.py [--methods gptq ...] [--shapes demo 1b] [--layers 2] [--samples 16] [--json F]
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.capture import Sample
from qvlm.checkpoint import dump_json
from qvlm.data import calibration
from qvlm.methods import METHODS, Context
from qvlm.models import ADAPTERS
from qvlm.plan import resolve
from qvlm.quantize import build_samples
from qvlm.recipe import component_recipe
from qvlm.source import load, open_source
from qvlm.trials.compare import with_method
from qvlm.trials.job import quantized
from qvlm.trials.memory import peak_memory

Json = dict[str, Any]
BASE = "gptq"
LAYERS_1B = 22
IMAGE_TOKEN = 31999
IMAGE_SIZE, PATCH = 336, 14


def demo(samples: int) -> tuple[nn.Module, list[Sample]]:
    source = open_source("demo")
    loaded = load(source)
    return loaded.model, build_samples(loaded, source.adapter, calibration(None, samples, 0))


def one_billion(layers: int, samples: int) -> tuple[nn.Module, list[Sample]]:
    """LLaVA's token count: 576 image tokens and 64 of text."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=PATCH, projection_dim=256,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Llava._from_config(config, attn_implementation="eager")
    return model.eval().requires_grad_(False), [random_sample(config) for _ in range(samples)]


def random_sample(config: Any) -> Sample:
    images = torch.full((config.image_seq_length,), IMAGE_TOKEN)
    ids: Tensor = torch.cat([torch.tensor([1]), images, torch.randint(3, 31000, (63,))])
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    return Sample(ids[None], pixels, ids == IMAGE_TOKEN, torch.arange(len(ids)) >= len(ids) - 16)


def cost(model: nn.Module, samples: list[Sample], method: str, format_: str) -> Json:
    """One run on the decoder."""
    adapter = ADAPTERS["llava"]
    recipe = with_method(component_recipe(format_, "float", "float"), method)
    context = Context(model, adapter, samples, recipe, resolve(model, adapter, recipe))
    with peak_memory() as peak:
        started, worked = time.perf_counter(), time.process_time()
        quantized(context)
        seconds = time.process_time() - worked
        clock = time.perf_counter() - started
    return {"seconds": seconds, "clock_seconds": clock, "peak_mb": peak.megabytes}


Runs = dict[tuple[str, str], list[Json]]


def measure(runs: Runs, shape: str, args: argparse.Namespace) -> None:
    """Adds the runs on one shape; what is known so far is written after each."""
    build = demo(args.samples) if shape == "demo" else one_billion(args.layers, args.samples)
    model, samples = build
    for _ in range(args.repeats):
        for method in dict.fromkeys((BASE, *args.methods)):
            found = cost(model, samples, method, args.format)
            runs.setdefault((shape, method), []).append(found)
            print(f"{shape} {method}: {found['seconds']:.1f} s", flush=True)
            if args.json:
                write(runs, args)


def rows_of(runs: Runs, layers: int) -> list[Json]:
    """A row per shape and method, the fastest of its runs."""
    rows: list[Json] = []
    for (shape, method), found in runs.items():
        scale = LAYERS_1B / layers if shape == "1b" else 1.0
        peaks = [run["peak_mb"] for run in found if run["peak_mb"] is not None]
        row: Json = {
            "shape": shape,
            "method": method,
            "seconds": scale * min(run["seconds"] for run in found),
            "measured_seconds": [run["seconds"] for run in found],
            "clock_seconds": [run["clock_seconds"] for run in found],
            "peak_mb": min(peaks) if peaks else None,
        }
        base = row if method == BASE else next(r for r in rows if r["shape"] == shape)
        row["times_gptq"] = row["seconds"] / base["seconds"]
        known = row["peak_mb"] and base["peak_mb"]
        row["memory_times_gptq"] = row["peak_mb"] / base["peak_mb"] if known else None
        rows.append(row)
    return rows


def write(runs: Runs, args: argparse.Namespace) -> None:
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    machine: Json = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    machine["threads"] = torch.get_num_threads()
    result = {"settings": settings, "machine": machine, "rows": rows_of(runs, args.layers)}
    dump_json(args.json, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="as in qvlm compare")
    parser.add_argument("--shapes", nargs="+", choices=("demo", "1b"), default=["demo", "1b"])
    parser.add_argument("--format", default="w4a16", help="of the decoder; the rest stays float")
    parser.add_argument("--layers", type=int, default=2, help="of the 1B shape's 22 that are run")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="written after every run")
    args = parser.parse_args()
    runs: Runs = {}
    for shape in args.shapes:
        measure(runs, shape, args)
    print(f"{'shape':6} {'method':24} {'seconds':>9} {'x gptq':>7} {'peak MB':>8} {'x gptq':>7}")
    for row in rows_of(runs, args.layers):
        peak, ratio = row["peak_mb"], row["memory_times_gptq"]
        memory = f"{peak:8.0f} {ratio:7.2f}" if ratio is not None else f"{'-':>8} {'-':>7}"
        print(
            f"{row['shape']:6} {row['method']:24} {row['seconds']:9.1f} {row['times_gptq']:7.2f} {memory}"
        )


if __name__ == "__main__":
    main()
