"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a vision transformer on patches of any grid, a patch merger, a Llama-like decoder.

Vision hidden states are [patches of all images, width], without a batch; how images and windows are told apart comes
with each layer's arguments. The model remembers how far its rotary positions lag behind the last prompt's tokens.
"""

from __future__ import annotations

from typing import Any

from qvlm.models.adapter import Adapter, Residual, ScalePair

_TEXT = "model.language_model"
_VISION = "model.visual"
_MERGERS = f"{_VISION}.deepstack_merger_list"
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_TEXT_PAIRS = (
    ScalePair("text", "input_layernorm", _QKV, "self_attn"),
    ScalePair("text", "self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj", values=True),
    ScalePair("text", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    ScalePair("text", "mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
    ScalePair("head", f"/{_TEXT}.norm", ("",), ""),
)
_BEHIND_ACTIVATION = "reads the output of an activation function, which no channel scale passes"
_FUSED_VALUES = "its values come out of one linear with queries and keys, whose rows do not commute with a scale alone"
_JOINED_PATCHES = (
    "reads several patches side by side, and the norm before has one gain for each of them"
)
_OWN_NORM = "a scale pair folds in one layer only, and every merger is one with other inputs"


def _image_token_id(config: Any) -> int:
    return int(config.image_token_id)


def _image_tokens(config: Any) -> int:
    """Of a picture of 640 x 480."""
    side = int(config.vision_config.patch_size * config.vision_config.spatial_merge_size)
    return round(640 / side) * round(480 / side)


def _layers(config: Any) -> int:
    return int(config.vision_config.depth)


def _head_dim(config: Any, component: str) -> int:
    if component == "vision":
        part = config.vision_config
        return int(getattr(part, "embed_dim", part.hidden_size) // part.num_heads)
    part = config.text_config
    return int(getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads)


def _adapter(
    model_type: str,
    mlp: tuple[ScalePair, ...],
    merger: tuple[str, str],
    mlp_last: str,
    deepstack: bool = False,
) -> Adapter:
    """``merger``: its two linears; ``mlp_last``: of a vision MLP, if it reads an activation."""
    first, second = (f"{_VISION}.merger.{name}" for name in merger)
    unfolded = {
        f"{_VISION}.blocks.*.attn.proj": _FUSED_VALUES,
        first: _JOINED_PATCHES,
        second: _BEHIND_ACTIVATION,
    }
    if mlp_last:
        unfolded[f"{_VISION}.blocks.*.mlp.{mlp_last}"] = _BEHIND_ACTIVATION
    entries = [second]
    if deepstack:
        entries.append(f"{_MERGERS}.*.{merger[1]}")
        unfolded[f"{_MERGERS}.*.{merger[0]}"] = _OWN_NORM
        unfolded[f"{_MERGERS}.*.{merger[1]}"] = _BEHIND_ACTIVATION
    return Adapter(
        model_type=model_type,
        vision_layers=f"{_VISION}.blocks",
        projector=f"{_VISION}.merger",
        text_layers=f"{_TEXT}.layers",
        head="lm_head",
        pixels=f"{_VISION}.patch_embed",
        image_token_id=_image_token_id,
        image_tokens=_image_tokens,
        live_vision_layers=_layers,
        head_dim=_head_dim,
        scale_pairs=(ScalePair("vision", "norm1", ("attn.qkv",), "attn"), *mlp, *_TEXT_PAIRS),
        unfolded=unfolded,
        residual=Residual(
            embedding=f"{_TEXT}.embed_tokens",
            entries=tuple(entries),
            writers=("self_attn.o_proj", "mlp.down_proj"),
        ),
        embeddings=(f"{_TEXT}.embed_tokens", f"{_VISION}.patch_embed.proj"),
        remembered=("model.rope_deltas",),
        projectors=_MERGERS if deepstack else "",
        deepstack="deepstack_visual_embeds" if deepstack else "",
    )


QWEN2 = _adapter(
    "qwen2_vl", (ScalePair("vision", "norm2", ("mlp.fc1",), "mlp"),), ("mlp.0", "mlp.2"), "fc2"
)
QWEN2_5 = _adapter(
    "qwen2_5_vl",
    (
        ScalePair("vision", "norm2", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
        ScalePair("vision", "mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
    ),
    ("mlp.0", "mlp.2"),
    "",
)
QWEN3 = _adapter(
    "qwen3_vl",
    (ScalePair("vision", "norm2", ("mlp.linear_fc1",), "mlp"),),
    ("linear_fc1", "linear_fc2"),
    "linear_fc2",
    deepstack=True,
)
