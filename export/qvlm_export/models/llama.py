"""Llama decoder (Touvron et al. 2023): grouped-query attention with rope, gated MLP. Shared by
families. Biases and norms of queries and keys (Qwen3) are built where the checkpoint has them;
M-RoPE and deepstack (Qwen-VL) where the config asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from qvlm.checkpoint import Checkpoint
from qvlm_export.attention import CausalAttention, HeadShape, Rotary, causal_attention
from qvlm_export.graph import GraphBuilder
from qvlm_export.linear_plan import has_linear
from qvlm_export.ops import (
    activation,
    embedding_merge,
    last_position,
    rms_norm,
    rope_axes,
    rope_frequencies,
    rope_tables,
    split_heads,
)
from qvlm_export.processor import eos_token_ids, template_tokens, token_text
from qvlm_export.qdq import heads_linear, linear, linears, lookup
from qvlm_runtime.manifest import ModelSpec


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the decoder, with transformers' defaults for keys that a config leaves out.

    deepstack: layers behind which a further part of the image's features is added.
    """

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope: Mapping[str, Any] = field(default_factory=dict)
    deepstack: int = 0

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> LlamaConfig:
        """Read ``text_config``; rope in transformers 5's form (rope_parameters) or the older one
        (rope_scaling).
        """
        names = set(LlamaConfig.__dataclass_fields__) - {"rope"}
        rope = {"rope_theta": data.get("rope_theta") or 10000.0}
        rope.update(data.get("rope_scaling") or {})
        rope.update(data.get("rope_parameters") or {})
        return LlamaConfig(**{k: v for k, v in data.items() if k in names}, rope=rope)

    @property
    def feature_parts(self) -> tuple[int, ...]:
        """Numbers in a row of image_features: the embedding, then what is added behind each layer."""
        return (self.hidden_size,) * (1 + self.deepstack)

    @property
    def heads(self) -> HeadShape:
        """Attention heads; one key/value head per query head unless the config says otherwise."""
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        return HeadShape(
            self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads, head_dim
        )


def decoder_spec(
    checkpoint: Checkpoint, c: LlamaConfig, image_token_id: int, context: int
) -> ModelSpec:
    """The manifest's numbers of a model with this decoder, one row of features as wide as a token."""
    return ModelSpec(
        family=str(checkpoint.config["model_type"]),
        hidden_size=c.hidden_size,
        vocab_size=c.vocab_size,
        layers=c.num_hidden_layers,
        kv_heads=c.heads.kv_heads,
        head_dim=c.heads.head_dim,
        max_context=context,
        eos_token_ids=eos_token_ids(checkpoint),
        image_token=token_text(checkpoint, image_token_id),
        image_token_id=image_token_id,
        feature_size=c.hidden_size,
        template_tokens=template_tokens(checkpoint),
    )


def decoder(
    b: GraphBuilder, c: LlamaConfig, prefix: str, head: str, positions: int, where: str
) -> None:
    """The decoder graph of the model folder's contract, for up to ``positions`` tokens.

    ``prefix`` names the decoder's modules, ``head`` the output projection (the embedding where it
    is tied).
    """
    axes = rope_axes(c.rope, c.heads.head_dim, where)
    ids, image_index = (
        b.input(name, ir.DataType.INT64, (1, "S")) for name in ("input_ids", "image_index")
    )
    position_ids = b.input("position_ids", ir.DataType.INT64, (3 if axes else 1, "S"))
    features = b.input("image_features", b.float_type, ("M", sum(c.feature_parts)))
    table = f"{prefix}.embed_tokens"
    with b.scope("embed"):
        text = lookup(b, ids, table, (c.vocab_size, c.hidden_size))
        x, further = embedding_merge(b, text, image_index, features, c.feature_parts)
    with b.scope("positions"):
        frequencies = rope_frequencies(c.rope, c.heads.head_dim, where)
        rotary = Rotary(*rope_tables(b, frequencies, positions, bool(axes)), position_ids, axes)
        attention = causal_attention(b, c.heads, rotary, positions)
    for i in range(c.num_hidden_layers):
        with b.scope(f"layers.{i}"):
            x = _layer(b, c, f"{prefix}.layers.{i}", i, attention, x)
            if i < len(further):
                x = b.op("Add", x, further[i])
    x = last_position(b, x)
    x = rms_norm(b, x, f"{prefix}.norm", c.hidden_size, c.rms_norm_eps)
    if has_linear(b.weights.checkpoint, head):
        logits = linear(b, x, head)
    else:  # tied: the embedding's bytes are stored once
        shared = b.parameter(f"{table}.weight", (c.vocab_size, c.hidden_size))
        logits = b.op("MatMul", x, b.op("Transpose", shared, perm=[1, 0]))
    b.output(logits, "logits", b.float_type, (1, 1, c.vocab_size))


def _layer(
    b: GraphBuilder,
    c: LlamaConfig,
    prefix: str,
    index: int,
    attention: CausalAttention,
    x: ir.Value,
) -> ir.Value:
    heads = c.heads
    h = rms_norm(b, x, f"{prefix}.input_layernorm", c.hidden_size, c.rms_norm_eps)
    with b.scope("self_attn"):
        qkv = linears(b, h, [f"{prefix}.self_attn.{p}_proj" for p in "qkv"])
        counts = (heads.heads, heads.kv_heads, heads.kv_heads)
        q, k, v = (
            split_heads(b, part, n, heads.head_dim) for part, n in zip(qkv, counts, strict=True)
        )
        if f"{prefix}.self_attn.q_norm.weight" in b.weights:
            q, k = (
                rms_norm(b, part, f"{prefix}.self_attn.{n}_norm", heads.head_dim, c.rms_norm_eps)
                for part, n in ((q, "q"), (k, "k"))
            )
        context = attention.layer(index, q, k, v)
        x = b.op("Add", x, heads_linear(b, context, f"{prefix}.self_attn.o_proj"))
    h = rms_norm(b, x, f"{prefix}.post_attention_layernorm", c.hidden_size, c.rms_norm_eps)
    with b.scope("mlp"):
        gate, up = linears(b, h, [f"{prefix}.mlp.{p}_proj" for p in ("gate", "up")])
        inner = b.op("Mul", activation(b, gate, c.hidden_act, prefix), up)
        return b.op("Add", x, linear(b, inner, f"{prefix}.mlp.down_proj"))
