"""SmolVLM (Marafioti et al. 2025) and Idefics3 (Laurençon et al. 2024): SigLIP tower, pixel shuffle, one linear, Llama
decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvlm_export.models.tiles import Tiles, tiles_family


def _side(config: Mapping[str, Any]) -> int:
    return int(config["scale_factor"])


def _idefics(model_type: str, tower: str) -> Tiles:
    return Tiles(
        model_type,
        (tower,),
        ("llama",),
        {
            "image_token_index": 128257,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "projector_hidden_act": "none",
            "scale_factor": 2,
        },
        vision="model.vision_model",
        projector="model.connector.modality_projection",
        text="model.text_model",
        linears=("proj",),
        shuffle=_side,
        normed=lambda config: True,
        text_defaults={"rms_norm_eps": 1e-5},
    )


SMOLVLM = tiles_family(_idefics("smolvlm", "smolvlm_vision"))
IDEFICS3 = tiles_family(_idefics("idefics3", "idefics3_vision"))
