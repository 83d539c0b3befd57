"""OPT decoder (Zhang et al. 2022): LayerNorms in front of attention and of a two-linear MLP, biases, learned positions.

A position is a row of a table that is added to the embedding, so attention turns nothing. The first two rows of the
table belong to padding and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qvlm.errors import ExportError
from qvlm_export.attention import CausalAttention, HeadShape, Places, causal_attention
from qvlm_export.graph import GraphBuilder
from qvlm_export.models.decoder import decoder_inputs, decoder_logits
from qvlm_export.ops import activation, last_position, layer_norm, split_heads
from qvlm_export.qdq import heads_linear, linear, linears

# Of a LayerNorm that is made without a word about it.
_EPS = 1e-5
# Rows of the table in front of position 0.
_OFFSET = 2


@dataclass(frozen=True)
class OptConfig:
    """Sizes of the decoder, with transformers' defaults for keys that a config leaves out."""

    hidden_size: int = 768
    ffn_dim: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 50272
    max_position_embeddings: int = 2048
    activation_function: str = "relu"

    @staticmethod
    def from_json(data: Mapping[str, Any], where: str) -> OptConfig:
        """Read ``text_config``; ExportError for OPT-350M's two differences."""
        config = OptConfig(**{k: v for k, v in data.items() if k in OptConfig.__dataclass_fields__})
        if not data.get("do_layer_norm_before", True):
            raise ExportError(f"{where}: do_layer_norm_before is false, expected true")
        width = data.get("word_embed_proj_dim") or config.hidden_size
        if width != config.hidden_size:
            raise ExportError(
                f"{where}: word_embed_proj_dim is {width}, expected hidden_size, {config.hidden_size}"
            )
        return config

    @property
    def heads(self) -> HeadShape:
        """One key/value head per query head."""
        count = self.num_attention_heads
        return HeadShape(count, count, self.hidden_size // count)


def decoder(b: GraphBuilder, c: OptConfig, prefix: str, head: str, positions: int) -> None:
    """The decoder graph of the model folder's contract, for up to ``positions`` tokens.

    ``prefix`` names the decoder's modules, ``head`` the output projection (the embedding where it is tied).
    """
    table = f"{prefix}.embed_tokens"
    entered = decoder_inputs(b, c, table, (c.hidden_size,), 1)
    with b.scope("positions"):
        rows = b.op("Gather", _positions(b, c, prefix, positions), entered.position_ids, axis=0)
        x = b.op("Add", entered.x, rows)
        attention = causal_attention(b, c.heads, Places(entered.position_ids), positions)
    for i in range(c.num_hidden_layers):
        with b.scope(f"layers.{i}"):
            x = _layer(b, c, f"{prefix}.layers.{i}", i, attention, x)
    x = layer_norm(b, last_position(b, x), f"{prefix}.final_layer_norm", c.hidden_size, _EPS)
    decoder_logits(b, c, x, head, table)


def _positions(b: GraphBuilder, c: OptConfig, prefix: str, positions: int) -> ir.Value:
    """The table's rows of positions 0 to ``positions`` - 1, [positions, hidden]."""
    name = f"{prefix}.embed_positions.weight"
    b.weights.expect(name, (c.max_position_embeddings + _OFFSET, c.hidden_size))
    shape = (positions, c.hidden_size)
    rows = b.weights.stored(name, shape, lambda array: array[_OFFSET : _OFFSET + positions])
    return b.constant(name, rows)


def _layer(
    b: GraphBuilder, c: OptConfig, prefix: str, index: int, attention: CausalAttention, x: ir.Value
) -> ir.Value:
    heads, x = c.heads, b.stream(x, prefix)
    h = layer_norm(b, x, f"{prefix}.self_attn_layer_norm", c.hidden_size, _EPS)
    with b.scope("self_attn"):
        qkv = linears(b, h, [f"{prefix}.self_attn.{p}_proj" for p in "qkv"])
        q, k, v = (split_heads(b, part, heads.heads, heads.head_dim) for part in qkv)
        context = attention.layer(index, b.narrow(q), b.narrow(k), b.narrow(v))
        x = b.op("Add", x, heads_linear(b, context, f"{prefix}.self_attn.out_proj"))
    h = layer_norm(b, x, f"{prefix}.final_layer_norm", c.hidden_size, _EPS)
    with b.scope("mlp"):
        inner = activation(b, linear(b, h, f"{prefix}.fc1"), c.activation_function, prefix)
        return b.op("Add", x, linear(b, inner, f"{prefix}.fc2"))
