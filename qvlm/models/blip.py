"""BLIP-2 (Li et al. 2023) with an OPT decoder: a ViT, a Q-Former that asks it with learned queries, one linear, OPT.

The Q-Former's layers and the linear behind them are the projector; every second one reads the tower's output as well.
transformers' forward is made for captions: it wants pixels at every call, and a mask of all tokens behind a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from qvlm.models import parts
from qvlm.models.adapter import Adapter, ScalePair

_TEXT = "language_model.model.decoder"
_QFORMER = "qformer.encoder.layer"
_FUSED_VALUES = "its values come out of one linear with queries and keys, whose rows do not commute with a scale alone"
_BEHIND_SUM = "reads a norm that the residual reads as well: a scale of one would change the other"
_BEHIND_TOWER = "reads the vision tower's output, whose norm other layers read too"
_BEHIND_QUERIES = (
    "reads the learned queries and no picture: what it gives is a constant to every compiler"
)
_BEHIND_VALUES = (
    "a scale pair holds for every layer of its component, and not every one has this attention"
)
# OPT-350M norms behind the layers, OPT before transformers 4.20 has no last norm; a scale passes ReLU only; text enters
# the Q-Former of InstructBLIP.
_TEXT_EXPECTED = {
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "layer_norm_elementwise_affine": True,
    "activation_function": "relu",
}
_QUERIES_EXPECTED = {"use_qformer_text_input": False}
# What its authors evaluate question answering with (arXiv 2301.12597, appendix); an empty question asks for a caption.
# The processor puts the image's tokens in front by itself.
TEMPLATE = (
    "{% for message in messages %}{% set text %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endset %}{% if text and not loop.first %}{{ ' ' }}{% endif %}"
    "{% if message['role'] == 'user' and text %}{{ 'Question: ' + text + ' Answer:' }}{% else %}{{ text }}{% endif %}"
    "{% endfor %}"
)


def _refusal(config: Mapping[str, Any]) -> str:
    text, queries = config.get("text_config") or {}, config.get("qformer_config") or {}
    if (kind := text.get("model_type", "opt")) != "opt":
        return f"text_config model_type is {kind!r}, expected 'opt' (as in blip2-opt-2.7b)."
    width = text.get("hidden_size", 768)
    if (text.get("word_embed_proj_dim") or width) != width:
        return f"text_config word_embed_proj_dim is {text['word_embed_proj_dim']}, expected hidden_size, {width}."
    for part, expected in ((text, _TEXT_EXPECTED), (queries, _QUERIES_EXPECTED)):
        for key, value in expected.items():
            if (found := part.get(key, value)) != value:
                return f"{key} is {found!r}, expected {value!r} (as in blip2-opt-2.7b)."
    if config.get("image_token_index") is None:
        return "no image_token_index. Download the checkpoint again: its newer files have it."
    return ""


def _image_tokens(config: Any) -> int:
    return int(config.num_query_tokens)


def _layers(config: Any) -> int:
    return int(config.vision_config.num_hidden_layers)


def _complete(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A mask of all tokens, past ones included, and no features where there are no pixels."""
    ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
    seen = 0 if cache is None else cache.get_seq_length()
    added: dict[str, Any] = {"attention_mask": ids.new_ones(len(ids), seen + ids.shape[1])}
    if kwargs.get("pixel_values") is None:
        nothing = torch.zeros(0, module.config.text_config.hidden_size)
        image = SimpleNamespace(pooler_output=nothing, qformer_outputs=None, vision_outputs=None)
        added |= {"pixel_values": None, "mm_encoder_outputs": {"image": image}}
    return args, {**kwargs, **added}


ADAPTER = Adapter(
    model_type="blip-2",
    vision_layers="vision_model.encoder.layers",
    projector="language_projection",
    text_layers=f"{_TEXT}.layers",
    head="language_model.lm_head",
    pixels="vision_model.embeddings.patch_embedding",
    image_token_id=parts.image_token_id,
    image_tokens=_image_tokens,
    live_vision_layers=_layers,
    head_dim=parts.head_dim,
    embeddings=(f"{_TEXT}.embed_tokens",),
    scale_pairs=(
        ScalePair("vision", "layer_norm1", ("self_attn.qkv",), "self_attn"),
        ScalePair("vision", "layer_norm2", ("mlp.fc1",), "mlp"),
        ScalePair("text", "self_attn_layer_norm", parts.QKV, "self_attn"),
        ScalePair("text", "self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj", True),
        ScalePair("text", "final_layer_norm", ("fc1",), "fc1"),
        # ReLU passes a positive scale.
        ScalePair("text", "fc1", ("fc2",), "fc2"),
        ScalePair("head", f"/{_TEXT}.final_layer_norm", ("",), ""),
    ),
    keep_float={
        f"{_QFORMER}.0.attention.*": _BEHIND_QUERIES,
        f"{_QFORMER}.0.crossattention.attention.query": _BEHIND_QUERIES,
    },
    unfolded={
        "vision_model.*.self_attn.projection": _FUSED_VALUES,
        "vision_model.*.mlp.fc2": parts.BEHIND_ACTIVATION,
        f"{_QFORMER}.*.output_query.dense": parts.BEHIND_ACTIVATION,
        f"{_QFORMER}.*.output.dense": _BEHIND_VALUES,
        f"{_QFORMER}.*.crossattention.attention.key": _BEHIND_TOWER,
        f"{_QFORMER}.*.crossattention.attention.value": _BEHIND_TOWER,
        f"{_QFORMER}.*": _BEHIND_SUM,
        "language_projection": _BEHIND_SUM,
    },
    projector_layers=_QFORMER,
    vision_output="vision_model.post_layernorm",
    tail=(f"{_TEXT}.final_layer_norm",),
    refusal=_refusal,
    chat_template=TEMPLATE,
    images=1,
    forward_hook=_complete,
)
