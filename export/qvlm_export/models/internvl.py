"""InternVL3 (Zhu et al. 2025), in transformers' own format: InternViT, pixel shuffle, norm and two linears, a Qwen2 or
Qwen3 decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvlm.checkpoint import Checkpoint
from qvlm_export.models.tiles import Tiles, TilesConfig, tiles_family
from qvlm_export.processor import canvas_image, template_tokens
from qvlm_runtime.image_spec import CanvasImage, WholeImage
from qvlm_runtime.manifest import MarkerSpec


def _side(config: Mapping[str, Any]) -> int:
    return round(1 / float(config["downsample_ratio"]))


def _last_state(config: Mapping[str, Any]) -> bool:
    """Only -1 asks for the tower's output; another index for a state between layers."""
    return bool(config["vision_feature_layer"] == -1)


def _pieces(checkpoint: Checkpoint, c: TilesConfig) -> CanvasImage | WholeImage:
    size = c.vision.image_size
    return canvas_image(checkpoint, (size, size), c.rows_per_tile)


def _marker(checkpoint: Checkpoint) -> MarkerSpec:
    """An image's tokens stand between two that the tokenizer names."""
    tokens = template_tokens(checkpoint)
    start, end = tokens.get("start_image_token", "<img>"), tokens.get("end_image_token", "</img>")
    return MarkerSpec(whole=f"{start}{{image}}{end}")


INTERNVL = tiles_family(
    Tiles(
        "internvl",
        ("internvl_vision",),
        ("qwen2", "qwen3"),
        {
            "image_token_index": 151667,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "downsample_ratio": 0.5,
        },
        _pieces,
        norm="layer_norm",
        shuffle=_side,
        normed=_last_state,
        marker=_marker,
    )
)
