"""LLaVA 1.5, NeXT and OneVision (Liu et al. 2023, 2024; Li et al. 2024): a tower and a two-linear projector.

1.5 sees one tile. NeXT and OneVision see the whole picture in one tile and its pieces in more, drop the padding of the
pieces and end every image line with a learned row.
"""

from __future__ import annotations

from qvlm_export.models.tiles import Tiles, tiles_family

_DEFAULTS = {
    "image_token_index": 32000,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
}

LLAVA = tiles_family(Tiles("llava", ("clip_vision_model",), ("llama",), _DEFAULTS))
LLAVA_NEXT = tiles_family(
    Tiles(
        "llava_next",
        ("clip_vision_model",),
        ("llama", "mistral"),
        _DEFAULTS,
        newline="model.image_newline",
    )
)
LLAVA_ONEVISION = tiles_family(
    Tiles(
        "llava_onevision",
        ("siglip_vision_model",),
        ("qwen2",),
        {
            **_DEFAULTS,
            "image_token_index": 151646,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        newline="model.image_newline",
    )
)
