"""LLaVA 1.5, NeXT and OneVision: a CLIP or SigLIP tower, a two-linear projector, a Llama-like decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qvlm.models import parts
from qvlm.models.adapter import Adapter, Residual

_TEXT = "model.language_model"
_PROJECTOR = "model.multi_modal_projector"
_EMBEDDING = f"{_TEXT}.embed_tokens"
_PATCHES = "model.vision_tower.embeddings.patch_embedding"
_RESIDUAL = Residual(
    embedding=_EMBEDDING,
    entries=(f"{_PROJECTOR}.linear_2",),
    writers=("self_attn.o_proj", "mlp.down_proj"),
)
# The row that ends an image's line.
_LINES = replace(_RESIDUAL, vectors=("model.image_newline",))


def _image_tokens(config: Any) -> int:
    return parts.patches(config.vision_config)


def _pieces(config: Any) -> int:
    """A picture in the middle of the pinpoints: itself and four pieces."""
    return 5 * parts.patches(config.vision_config)


def _llava(model_type: str, image_tokens: Any, **rest: Any) -> Adapter:
    return Adapter(
        model_type=model_type,
        vision_layers="model.vision_tower.encoder.layers",
        projector=_PROJECTOR,
        text_layers=f"{_TEXT}.layers",
        head="lm_head",
        pixels=_PATCHES,
        image_token_id=parts.image_token_id,
        image_tokens=image_tokens,
        live_vision_layers=parts.live_layers,
        head_dim=parts.head_dim,
        scale_pairs=(*parts.vision_pairs(), *parts.llama_pairs(_TEXT)),
        unfolded={
            "model.vision_tower.*.mlp.fc2": parts.BEHIND_ACTIVATION,
            f"{_PROJECTOR}.linear_1": parts.BEHIND_STREAM,
            f"{_PROJECTOR}.linear_2": parts.BEHIND_ACTIVATION,
        },
        **rest,
    )


# CLIP's patch projection has no bias and may be quantized; SigLIP's has one and stays float.
ADAPTER = _llava("llava", _image_tokens, residual=_RESIDUAL, embeddings=(_EMBEDDING, _PATCHES))
NEXT = _llava("llava_next", _pieces, residual=_LINES, embeddings=(_EMBEDDING, _PATCHES))
ONEVISION = _llava("llava_onevision", _pieces, residual=_LINES, embeddings=(_EMBEDDING,))
