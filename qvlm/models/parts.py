"""What architectures share: the scale pairs of a pre-norm vision layer and of a Llama-like decoder, sizes of heads."""

from __future__ import annotations

from typing import Any

from qvlm.models.adapter import ScalePair

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BEHIND_ACTIVATION = "reads the output of an activation function, which no channel scale passes"
BEHIND_STREAM = (
    "reads the vision tower's residual stream: no norm and no linear before it can take its scale"
)
BEHIND_SHUFFLE = (
    "reads several patches side by side, and the norm before them has one gain for all of them"
)


def head_dim(config: Any, component: str) -> int:
    """Width of an attention head, from the part of the config that the component is made of."""
    part = config.vision_config if component == "vision" else config.text_config
    return int(getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads)


def patches(vision: Any) -> int:
    """Patches of one square tile."""
    size, patch = (
        int(value[0] if isinstance(value, list | tuple) else value)
        for value in (vision.image_size, vision.patch_size)
    )
    return (size // patch) ** 2


def live_layers(config: Any) -> int:
    """hidden_states[k] is the output of the first k layers; ``vision_feature_layer`` is one index or several."""
    total = int(config.vision_config.num_hidden_layers)
    chosen = config.vision_feature_layer
    indices = [chosen] if isinstance(chosen, int) else list(chosen)
    return max(index if index >= 0 else total + 1 + index for index in indices)


def image_token_id(config: Any) -> int:
    """Id of the token that stands for one row of image features."""
    return int(config.image_token_id)


def vision_pairs(
    norms: tuple[str, str] = ("layer_norm1", "layer_norm2"),
    attention: str = "self_attn",
    output: str = "out_proj",
) -> tuple[ScalePair, ...]:
    """Of a pre-norm layer with q, k and v projections and a two-linear MLP; names relative to the layer."""
    projections = tuple(f"{attention}.{part}_proj" for part in "qkv")
    out = f"{attention}.{output}"
    return (
        ScalePair("vision", norms[0], projections, attention),
        ScalePair("vision", f"{attention}.v_proj", (out,), out, values=True),
        ScalePair("vision", norms[1], ("mlp.fc1",), "mlp"),
    )


def llama_pairs(text: str) -> tuple[ScalePair, ...]:
    """Of a gated decoder behind RMSNorms, and of the head behind the last; ``text`` is the decoder's module."""
    out = "self_attn.o_proj"
    return (
        ScalePair("text", "input_layernorm", QKV, "self_attn"),
        ScalePair("text", "self_attn.v_proj", (out,), out, values=True),
        ScalePair("text", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
        ScalePair("text", "mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
        ScalePair("head", f"/{text}.norm", ("",), ""),
    )
