"""Real widths: the configurations of Qwen2.5-VL-3B and Qwen3-VL-2B with random weights and two layers a
side, quantized (w4a16, rtn), built, verified against their goldens and compiled with TensorRT for RTX:
no dimension of a published model is met for the first time by a user.

    PYTHONPATH=.:export:runtime:calib_data:tests python tests/bench/qwen_widths.py qwen2.5-vl-3b --work /tmp/widths

Needs about 4 GB of memory, 4 GB of disk and a few minutes a model; prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from tiny_qwen import SPECIALS, TEMPLATE, picture, tiny_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2VLImageProcessorPil

from qvlm.checkpoint import Checkpoint
from qvlm.data import Question
from qvlm.progress import silent
from qvlm.quantize import quantize
from qvlm.recipe import RECIPES
from qvlm_export.build import build, image_spec, model_spec
from qvlm_export.rtx import compile_target
from qvlm_export.targets import named_target
from qvlm_export.verify import verify_target

CONTEXT = 4096
TEXT = {
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "vocab_size": 151936,
}
# name -> (model_type, text_config, vision_config) of the published config.json, but for the numbers of layers.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2.5-vl-3b": (
        "qwen2_5_vl",
        {
            **TEXT,
            "intermediate_size": 11008,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        {
            "depth": 2,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "patch_size": 14,
        },
    ),
    "qwen3-vl-2b": (
        "qwen3_vl",
        {
            **TEXT,
            "intermediate_size": 6144,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
            },
        },
        {
            "depth": 2,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [0, 1],
            "patch_size": 16,
        },
    ),
}


def write_source(directory: Path, name: str) -> Path:
    """The random model in bfloat16, tied as published, with a tokenizer of bytes."""
    family, text, vision = MODELS[name]
    ids = {f"{k}_token_id": SPECIALS.index(f"<|{k}_pad|>") for k in ("image", "video")}
    text = {**text, "eos_token_id": 2, "bos_token_id": None}
    config = AutoConfig.for_model(
        family, text_config=text, vision_config=vision, tie_word_embeddings=True, **ids
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="500MB")
    tiny_tokenizer().save_pretrained(directory)
    Qwen2VLImageProcessorPil(patch_size=vision["patch_size"], merge_size=2).save_pretrained(
        directory
    )
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return directory


def run(name: str, work: Path) -> dict[str, Any]:
    """Quantize, build, verify, compile; what came out."""
    shutil.rmtree(work, ignore_errors=True)
    source = write_source(work / "source", name)
    question = Question((picture(0, (300, 200)),), "What is it?", "a cat")
    out = quantize(
        str(source), work / "checkpoint", RECIPES["w4a16"], questions=[question], goldens=1
    )
    checkpoint, rows = Checkpoint(out), []
    result: dict[str, Any] = {"model": name, "context": CONTEXT, "layers": 2}
    for target in ("ort", "rtx"):
        spec = build(checkpoint, named_target(target), work / "graphs", CONTEXT, silent)
        verified = verify_target(work / "graphs", spec, checkpoint, silent, CONTEXT)
        result[target] = {"agreement": verified.agreement, "rows": len(verified.rows)}
        if target == "rtx":
            model, image = model_spec(checkpoint, CONTEXT), image_spec(checkpoint)
            _, rows = compile_target(work / "graphs", spec, model, image, silent, [86])
    result["engines"] = [vars(row) for row in rows]
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder, emptied first")
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.model, arguments.work), indent=2))


if __name__ == "__main__":
    main()
