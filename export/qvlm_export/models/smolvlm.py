"""SmolVLM (Marafioti et al. 2025) and Idefics3 (Laurençon et al. 2024): SigLIP tower, pixel shuffle, one linear, Llama
decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvlm.checkpoint import Checkpoint
from qvlm_export.models.tiles import Tiles, TilesConfig, tiles_family
from qvlm_export.processor import split_image
from qvlm_runtime.image_spec import SplitImage
from qvlm_runtime.manifest import MarkerSpec

# Written into transformers' processor: the tokens around each tile, its place, and the whole image behind them.
_AROUND, _WHOLE = "<fake_token_around_image>", "<global-img>"
_MARKER = MarkerSpec(
    whole=f"{_AROUND}{_WHOLE}{{image}}{_AROUND}",
    tile=f"{_AROUND}<row_{{line}}_col_{{column}}>{{image}}",
    line="\n",
    last=f"\n{_AROUND}{_WHOLE}{{image}}{_AROUND}",
)


def _side(config: Mapping[str, Any]) -> int:
    return int(config["scale_factor"])


def _pieces(checkpoint: Checkpoint, c: TilesConfig) -> SplitImage:
    return split_image(checkpoint, c.vision.image_size, c.rows_per_tile)


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
        _pieces,
        vision="model.vision_model",
        projector="model.connector.modality_projection",
        text="model.text_model",
        linears=("proj",),
        shuffle=_side,
        normed=lambda config: True,
        text_defaults={"rms_norm_eps": 1e-5},
        marker=lambda checkpoint: _MARKER,
    )


SMOLVLM = tiles_family(_idefics("smolvlm", "smolvlm_vision"))
IDEFICS3 = tiles_family(_idefics("idefics3", "idefics3_vision"))
