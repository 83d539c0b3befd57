"""SmolVLM and Idefics3: a SigLIP tower, pixel shuffle and one linear, a Llama decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qvlm.models import parts
from qvlm.models.adapter import Adapter, Residual

_TEXT = "model.text_model"
_CONNECTOR = "model.connector"
_PROJECTION = f"{_CONNECTOR}.modality_projection.proj"


def _image_tokens(config: Any) -> int:
    """A picture of four by three pieces and the whole of it."""
    return 13 * parts.patches(config.vision_config) // int(config.scale_factor) ** 2


def _all_layers(config: Any) -> int:
    return int(config.vision_config.num_hidden_layers)


ADAPTER = Adapter(
    model_type="smolvlm",
    vision_layers="model.vision_model.encoder.layers",
    projector=_CONNECTOR,
    text_layers=f"{_TEXT}.layers",
    head="lm_head",
    pixels="model.vision_model.embeddings.patch_embedding",
    image_token_id=parts.image_token_id,
    image_tokens=_image_tokens,
    live_vision_layers=_all_layers,
    head_dim=parts.head_dim,
    scale_pairs=(*parts.vision_pairs(), *parts.llama_pairs(_TEXT)),
    unfolded={
        "model.vision_model.*.mlp.fc2": parts.BEHIND_ACTIVATION,
        _PROJECTION: parts.BEHIND_SHUFFLE,
    },
    residual=Residual(
        embedding=f"{_TEXT}.embed_tokens",
        entries=(_PROJECTION,),
        writers=("self_attn.o_proj", "mlp.down_proj"),
    ),
    embeddings=(f"{_TEXT}.embed_tokens",),
)
IDEFICS3 = replace(ADAPTER, model_type="idefics3")
