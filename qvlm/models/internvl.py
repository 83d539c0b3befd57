"""InternVL3 in transformers' own format: InternViT, pixel shuffle, norm and two linears, a Qwen2 or Qwen3 decoder."""

from __future__ import annotations

from typing import Any

from qvlm.models import parts
from qvlm.models.adapter import Adapter, Residual, ScalePair

_TEXT = "model.language_model"
_PROJECTOR = "model.multi_modal_projector"


def _image_tokens(config: Any) -> int:
    """A picture of two by three pieces and its thumbnail."""
    return round(7 * parts.patches(config.vision_config) * float(config.downsample_ratio) ** 2)


ADAPTER = Adapter(
    model_type="internvl",
    vision_layers="model.vision_tower.encoder.layer",
    projector=_PROJECTOR,
    text_layers=f"{_TEXT}.layers",
    head="lm_head",
    pixels="model.vision_tower.embeddings.patch_embeddings.projection",
    image_token_id=parts.image_token_id,
    image_tokens=_image_tokens,
    live_vision_layers=parts.live_layers,
    head_dim=parts.head_dim,
    scale_pairs=(
        *parts.vision_pairs(
            ("layernorm_before", "layernorm_after"), "attention", "projection_layer"
        ),
        ScalePair("projector", "layer_norm", ("linear_1",), "linear_1"),
        *parts.llama_pairs(_TEXT),
    ),
    unfolded={
        "model.vision_tower.*.mlp.fc2": parts.BEHIND_ACTIVATION,
        f"{_PROJECTOR}.linear_2": parts.BEHIND_ACTIVATION,
    },
    residual=Residual(
        embedding=f"{_TEXT}.embed_tokens",
        entries=(f"{_PROJECTOR}.linear_2",),
        writers=("self_attn.o_proj", "mlp.down_proj"),
    ),
    embeddings=(f"{_TEXT}.embed_tokens",),
)
