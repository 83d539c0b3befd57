"""InternVL3 (Zhu et al. 2025), in transformers' own format: InternViT, pixel shuffle, norm and two linears, Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvlm_export.models.tiles import Tiles, tiles_family


def _side(config: Mapping[str, Any]) -> int:
    return round(1 / float(config["downsample_ratio"]))


def _last_state(config: Mapping[str, Any]) -> bool:
    """Only -1 asks for the tower's output; any other index, and a list, for states between layers."""
    return bool(config["vision_feature_layer"] == -1)


INTERNVL = tiles_family(
    Tiles(
        "internvl",
        ("internvl_vision",),
        ("qwen2",),
        {
            "image_token_index": 151667,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "downsample_ratio": 0.5,
        },
        norm="layer_norm",
        shuffle=_side,
        normed=_last_state,
    )
)
