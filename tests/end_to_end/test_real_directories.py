"""Proves that directories as the hub has them, written by transformers 4.5x, say the same as those of transformers 5:
older keys in config.json (for Qwen-VL the decoder's at the top), image settings and chat template in files of their
own, no generation settings, settings for videos, bfloat16 in several shards, a head that shares the embedding's weight.

Run: python -m pytest tests/end_to_end/test_real_directories.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, questions, write_source

from qvlm.checkpoint import Checkpoint
from qvlm.progress import silent
from qvlm.quantize import quantize
from qvlm.recipe import RECIPES
from qvlm_export.build import build, image_spec, model_spec
from qvlm_export.package import add_runtime_files
from qvlm_export.targets import named_target
from qvlm_export.verify import verify_target

FLAT = ("qwen2_vl", "qwen2_5_vl")  # the decoder's keys stand at the top
TEMPLATES = ("chat_template.json", "tokenizer_config.json")


def edit(path: Path, **changes: Any) -> None:
    stored = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**stored, **changes}))


def older_keys(part: dict[str, Any]) -> dict[str, Any]:
    """The keys that transformers 4.5x wrote for what 5 calls dtype and rope_parameters."""
    rope = dict(part.pop("rope_parameters", None) or {})
    part.pop("dtype", None)
    found = {**part, "torch_dtype": "bfloat16"}
    if rope:
        found["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        section = {"type": "mrope", "rope_type": kind, **rope} if rope else None
        found["rope_scaling"] = section
    return found


def older_config(family: str, config: dict[str, Any]) -> dict[str, Any]:
    parts = {key: older_keys(config.pop(key)) for key in ("text_config", "vision_config")}
    if family in FLAT:
        text = parts.pop("text_config")
        return {**older_keys(config), **text, **parts, "model_type": family}
    if family.startswith("llava") and "image_token_id" in config:
        config["image_token_index"] = config.pop("image_token_id")
    return {**older_keys(config), **parts}


def make_older(family: str, source: Path) -> None:
    """Change a directory of transformers 5 to what the hub has."""
    config = source / "config.json"
    config.write_text(json.dumps(older_config(family, json.loads(config.read_text()))))
    settings = source / "processor_config.json"
    if settings.is_file():
        stored = json.loads(settings.read_text())
        images = stored.pop("image_processor", None)
        if images is not None:
            (source / "preprocessor_config.json").write_text(json.dumps(images))
        settings.write_text(json.dumps(stored))
    template = source / "chat_template.jinja"
    if template.is_file():  # BLIP-2 has none
        place = TEMPLATES[FAMILIES.index(family) % 2]
        edit(source / place, chat_template=template.read_text())
        template.unlink()
    (source / "generation_config.json").unlink(missing_ok=True)
    edit(source / "video_preprocessor_config.json", video_processor_type="Qwen2VLVideoProcessor")


def make_shards(source: Path) -> None:
    """The weights in bfloat16 in three files with an index."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name].to(torch.bfloat16) for name in names[i::3]}
        save_file(part, source / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def checkpoint(family: str, source: Path, out: Path) -> Checkpoint:
    asked = questions(family)[:1]
    return Checkpoint(quantize(str(source), out, RECIPES["float"], questions=asked, goldens=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_older_directory_is_read_as_the_newer_one(family: str, tmp_path: Path) -> None:
    source = write_source(family, tmp_path / "source")
    make_shards(source)
    newer = checkpoint(family, source, tmp_path / "newer")
    make_older(family, source)
    older = checkpoint(family, source, tmp_path / "older")
    assert model_spec(older) == model_spec(newer)
    assert image_spec(older) == image_spec(newer)
    for made, expected in zip(older.goldens(), newer.goldens(), strict=True):
        for key in ("logits", "image_features"):
            found = made.outputs["float"][key], expected.outputs["float"][key]
            np.testing.assert_array_equal(*found)
    spec = build(older, named_target("ort"), tmp_path / "out", None, silent)
    assert all(row.passed for row in verify_target(tmp_path / "out", spec, older, silent))
    add_runtime_files(older, tmp_path / "out")
