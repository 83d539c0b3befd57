"""LLaVA 1.5 and its relatives: a CLIP-like vision tower, a two-linear projector, a Llama-like decoder."""

from __future__ import annotations

from typing import Any

from qvlm.models.adapter import Adapter


def _live_vision_layers(config: Any) -> int:
    """hidden_states[k] is the output of the first k layers; ``vision_feature_layer`` is one index or several."""
    total = int(config.vision_config.num_hidden_layers)
    chosen = config.vision_feature_layer
    indices = [chosen] if isinstance(chosen, int) else list(chosen)
    return max(index if index >= 0 else total + 1 + index for index in indices)


def _image_token_id(config: Any) -> int:
    return int(config.image_token_id)


def _image_tokens(config: Any) -> int:
    return int((config.vision_config.image_size // config.vision_config.patch_size) ** 2)


ADAPTER = Adapter(
    model_type="llava",
    vision_layers="model.vision_tower.encoder.layers",
    projector="model.multi_modal_projector",
    text_layers="model.language_model.layers",
    head="lm_head",
    image_token_id=_image_token_id,
    image_tokens=_image_tokens,
    live_vision_layers=_live_vision_layers,
    embeddings=(
        "model.language_model.embed_tokens",
        "model.vision_tower.embeddings.patch_embedding",
    ),
)
