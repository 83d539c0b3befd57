"""Real widths of the families: built, checked against the rules and compiled with random weights, no checkpoint needed.

Each row of ``SHAPES`` is a published configuration, its layers cut to two unless they are all wanted. The weights are
random integers in the formats that a recipe gives them: what is tested is that no width, head count, vocabulary or
patch size surprises the graphs, the rules of JetPack 6 or the compiler of TensorRT for RTX.

Run: PYTHONPATH=.:export:runtime:calib_data:tests python tests/bench/family_widths.py [NAME ...] [--results FILE]
Needs the extra [rtx] and 6 GB of memory; no GPU, no network.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvlm.checkpoint import Checkpoint, CheckpointWriter, QuantizedLinear
from qvlm.models import ADAPTERS
from qvlm.progress import silent
from qvlm.recipe import COMPONENTS, RECIPES
from qvlm.source import skeleton
from qvlm_export.build import build, model_spec
from qvlm_export.builder import profiles
from qvlm_export.conform import check
from qvlm_export.facts import graph_facts
from qvlm_export.kernels import check_kernels
from qvlm_export.rtx import compile_graph
from qvlm_export.targets import named_target
from qvlm_runtime.image_spec import (
    CanvasImage,
    ImageSpec,
    PatchImage,
    PixelSpec,
    SplitImage,
    WholeImage,
)

SM = 86
_LAYERS = "num_hidden_layers"
_PIXELS = PixelSpec(3, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Shape:
    """config: config.json. recipe: its formats are those of the linears. image: what the runtime would cut. context:
    tokens of the graphs.
    """

    config: dict[str, Any]
    recipe: str
    image: ImageSpec
    context: int = 4096


def _smolvlm(
    vision: tuple[int, int, int, int, int, int],
    text: tuple[int, int, int, int, int],
    rest: tuple[int, float, int, str],
) -> Shape:
    """vision: width, MLP, layers, heads, tile, patch. text: width, MLP, layers, heads, key/value heads."""
    scale, theta, rows, recipe = rest
    config = {
        "model_type": "smolvlm",
        "image_token_id": 49190,
        "scale_factor": scale,
        "vision_config": {"model_type": "smolvlm_vision", **_vision(vision)},
        "text_config": {
            "model_type": "llama",
            "vocab_size": 49280,
            "max_position_embeddings": 8192,
            "rope_theta": theta,
            "pad_token_id": 2,
            **_text(text),
        },
    }
    return Shape(config, recipe, SplitImage(_PIXELS, rows, vision[4], 4 * vision[4]))


def _internvl(text: tuple[int, int, int, int, int]) -> Shape:
    config = {
        "model_type": "internvl",
        "image_token_id": 151667,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "internvl_vision",
            "attention_bias": True,
            **_vision((1024, 4096, 2, 16, 448, 14)),
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 151674,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            **_text(text),
        },
    }
    return Shape(config, "w4a16", CanvasImage(_PIXELS, 256, (448, 448), 1, 12))


def _qwen(
    model_type: str,
    text: dict[str, Any],
    vision: dict[str, Any],
    patches: PatchImage,
) -> Shape:
    """text and vision: what the two published models do not share."""
    config = {
        "model_type": model_type,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": 151936,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            **text,
        },
        "vision_config": {
            "depth": 2,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "patch_size": patches.patch,
            **vision,
        },
    }
    return Shape(config, "w4a16", patches)


def _vision(sizes: tuple[int, int, int, int, int, int]) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", _LAYERS, "num_attention_heads")
    return dict(zip((*names, "image_size", "patch_size"), sizes, strict=True))


def _text(sizes: tuple[int, int, int, int, int]) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", _LAYERS, "num_attention_heads")
    return {**dict(zip((*names, "num_key_value_heads"), sizes, strict=True)), "eos_token_id": 2}


# 64 does not divide by 128: groups of 64 where the width asks for them.
SHAPES: dict[str, Shape] = {
    "SmolVLM-256M, whole": _smolvlm(
        (768, 3072, 12, 12, 512, 16), (576, 1536, 30, 9, 3), (4, 1e5, 64, "w4a16-g64")
    ),
    "SmolVLM2-500M": _smolvlm(
        (768, 3072, 2, 12, 512, 16), (960, 2560, 2, 15, 5), (4, 1e5, 64, "w4a16-g64")
    ),
    "SmolVLM2-2.2B": _smolvlm(
        (1152, 4304, 2, 16, 384, 14), (2048, 8192, 2, 32, 32), (3, 130000.0, 81, "w4a16")
    ),
    "InternVL3-1B": _internvl((896, 4864, 2, 14, 2)),
    "InternVL3-2B": _internvl((1536, 8960, 2, 12, 2)),
    "LLaVA-1.5-7B": Shape(
        {
            "model_type": "llava",
            "image_token_index": 32000,
            "vision_feature_layer": -2,
            "vision_config": {
                "model_type": "clip_vision_model",
                **_vision((1024, 4096, 3, 16, 336, 14)),
            },
            "text_config": {
                "model_type": "llama",
                "vocab_size": 32064,
                "max_position_embeddings": 4096,
                **_text((4096, 11008, 2, 32, 32)),
            },
        },
        "w4a16",
        WholeImage(_PIXELS, 576, ("shortest_edge", 336), (336, 336)),
    ),
    "BLIP-2-OPT-2.7B": Shape(
        {
            "model_type": "blip-2",
            "image_token_index": 50265,
            "num_query_tokens": 32,
            "vision_config": {
                "model_type": "blip_2_vision_model",
                **_vision((1408, 6144, 2, 16, 224, 14)),
            },
            "qformer_config": {
                "model_type": "blip_2_qformer",
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_attention_heads": 12,
                _LAYERS: 2,
            },
            "text_config": {
                "model_type": "opt",
                "vocab_size": 50304,
                "max_position_embeddings": 2048,
                "hidden_size": 2560,
                "word_embed_proj_dim": 2560,
                "ffn_dim": 10240,
                "num_attention_heads": 32,
                _LAYERS: 2,
                "eos_token_id": 50118,
            },
        },
        "w4a16",
        WholeImage(_PIXELS, 32, ("exact", 224, 224), None),
        2048,
    ),
    "Qwen2.5-VL-3B": _qwen(
        "qwen2_5_vl",
        {
            "max_position_embeddings": 128000,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
            **_text((2048, 11008, 2, 16, 2)),
        },
        {
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        PatchImage(_PIXELS, 14, 2, 2, 56 * 56, 28 * 28 * 16384, window=112),
    ),
    "Qwen3-VL-2B": _qwen(
        "qwen3_vl",
        {
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
            },
            **_text((2048, 6144, 2, 16, 8)),
        },
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [0, 1],
        },
        PatchImage(_PIXELS, 16, 2, 2, 256 * 256, 4096 * 4096, position_side=48),
    ),
}


def write_checkpoint(folder: Path, shape: Shape) -> Checkpoint:
    """A quantized checkpoint of that configuration: what ``qvlm quantize`` stores, with random numbers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config))
    model = skeleton(folder)
    adapter, recipe = ADAPTERS[shape.config["model_type"]], RECIPES[shape.recipe]
    rng = np.random.default_rng(0)
    writer = CheckpointWriter(folder / "checkpoint")
    done = set()
    for component in COMPONENTS:
        for name, linear in adapter.linears(model, component).items():
            format_ = recipe.format_of(component, name)
            if format_.weights is None:
                continue
            out, columns = linear.weight.shape
            limit = 1 << (format_.weights.bits - 1)
            integers = rng.integers(1 - limit, limit, (out, columns), np.int8)
            groups = format_.weights.groups(columns, name)
            scale = np.full((out, groups), 2.0**-9, np.float32)
            writer.add_linear(component, name, QuantizedLinear(integers, scale, format_))
            done.add(f"{name}.weight")
    tied = adapter.tied(model)
    for name, tensor in model.state_dict().items():
        if name not in done and not (tied and name == f"{adapter.head}.weight"):
            numbers = rng.standard_normal(tuple(tensor.shape), np.float32)
            writer.add(name, (numbers * np.float32(0.02)).astype(np.float16))
    writer.close(shape.config, recipe, {}, {})
    token = model.config.image_token_id
    added = {"added_tokens": [{"id": token, "content": "<image>", "special": True}]}
    (folder / "checkpoint" / "tokenizer.json").write_text(json.dumps(added))
    return Checkpoint(folder / "checkpoint")


def measure(name: str, work: Path) -> dict[str, Any]:
    """Build for JetPack 6 and RTX, check the first, compile the second with its kernels checked."""
    shape, start = SHAPES[name], time.monotonic()
    checkpoint = write_checkpoint(work / "source", shape)
    findings = [
        finding.line()
        for target in [named_target("jetpack6")]
        if build(checkpoint, target, work, shape.context, silent)
        for finding in check(work, target)
        if finding.level != "info"
    ]
    spec = build(checkpoint, named_target("rtx"), work, shape.context, silent)
    model = model_spec(checkpoint, shape.context)
    engines = {}
    for stem, path in spec.graphs.items():
        shapes = profiles(stem, model, shape.image, spec.cache)
        plan, kernels = compile_graph(work / path, shapes, SM)
        check_kernels(kernels, graph_facts(work / path), str(path))
        engines[stem] = len(plan)
    seconds = round(time.monotonic() - start)
    return {"name": name, "findings": findings, "engine_bytes": engines, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*SHAPES, []], metavar="NAME")
    parser.add_argument("--results", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    rows = []
    for name in args.names or SHAPES:
        with tempfile.TemporaryDirectory() as work:
            rows.append(measure(name, Path(work)))
        print(json.dumps(rows[-1]), flush=True)
        if args.results:
            args.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
