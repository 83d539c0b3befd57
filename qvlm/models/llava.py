"""LLaVA 1.5 and its relatives: a CLIP-like vision tower, a two-linear projector, a Llama-like decoder."""

from __future__ import annotations

from typing import Any

from qvlm.models.adapter import Adapter, Residual, ScalePair


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


def _head_dim(config: Any, component: str) -> int:
    part = config.vision_config if component == "vision" else config.text_config
    return int(getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_SCALE_PAIRS = (
    ScalePair("vision", "layer_norm1", _QKV, "self_attn"),
    ScalePair(
        "vision", "self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj", values=True
    ),
    ScalePair("vision", "layer_norm2", ("mlp.fc1",), "mlp"),
    ScalePair("text", "input_layernorm", _QKV, "self_attn"),
    ScalePair("text", "self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj", values=True),
    ScalePair("text", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    ScalePair("text", "mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
    ScalePair("head", "/model.language_model.norm", ("",), ""),
)
_BEHIND_ACTIVATION = "reads the output of an activation function, which no channel scale passes"

ADAPTER = Adapter(
    model_type="llava",
    vision_layers="model.vision_tower.encoder.layers",
    projector="model.multi_modal_projector",
    text_layers="model.language_model.layers",
    head="lm_head",
    pixels="model.vision_tower",
    image_token_id=_image_token_id,
    image_tokens=_image_tokens,
    live_vision_layers=_live_vision_layers,
    head_dim=_head_dim,
    scale_pairs=_SCALE_PAIRS,
    unfolded={
        "model.vision_tower.*.mlp.fc2": _BEHIND_ACTIVATION,
        "model.multi_modal_projector.linear_1": (
            "reads the vision tower's residual stream: no norm and no linear before it can take its scale"
        ),
        "model.multi_modal_projector.linear_2": _BEHIND_ACTIVATION,
    },
    residual=Residual(
        embedding="model.language_model.embed_tokens",
        entries=("model.multi_modal_projector.linear_2",),
        writers=("self_attn.o_proj", "mlp.down_proj"),
    ),
    embeddings=(
        "model.language_model.embed_tokens",
        "model.vision_tower.embeddings.patch_embedding",
    ),
)
