"""Q-Former (Li et al. 2023, BLIP-2): a BERT-like stack of learned queries, of which every n-th layer asks the image.

Norms stand behind the residual sums. Only queries run through it, so BERT's text half is not built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qvlm_export.attention import full_attention
from qvlm_export.graph import GraphBuilder
from qvlm_export.ops import activation, layer_norm, split_heads
from qvlm_export.qdq import heads_linear, linear, linears

# What a layer makes of the rows it attends to.
_SEEN = ("key", "value")


@dataclass(frozen=True)
class QformerConfig:
    """Sizes, with transformers' defaults for keys that a config leaves out."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    cross_attention_frequency: int = 2

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> QformerConfig:
        """Read ``qformer_config``."""
        names = QformerConfig.__dataclass_fields__
        return QformerConfig(**{k: v for k, v in data.items() if k in names})


def queried(
    b: GraphBuilder, c: QformerConfig, prefix: str, queries: ir.Value, rows: ir.Value
) -> ir.Value:
    """queries F [1, Q, hidden] ask ``rows`` of the image, F [1, S, any width]; the answers [1, Q, hidden]."""
    x = _norm(b, c, queries, f"{prefix}.layernorm")
    layers = [f"{prefix}.encoder.layer.{i}" for i in range(c.num_hidden_layers)]
    asking = layers[:: c.cross_attention_frequency]
    with b.scope("image"):
        names = [f"{layer}.crossattention.attention.{n}" for layer in asking for n in _SEEN]
        # At once: INT8 products that share their input run as integers if they are one.
        seen = dict(zip(names, linears(b, rows, names), strict=True))
    for i, layer in enumerate(layers):
        own, other = f"{layer}.attention", f"{layer}.crossattention"
        x = b.stream(x, layer)
        with b.scope(f"layers.{i}"):
            with b.scope("attention"):
                parts = linears(b, x, [f"{own}.attention.{n}" for n in ("query", *_SEEN)])
                x = _attended(b, c, own, x, parts)
            if layer in asking:
                with b.scope("crossattention"):
                    query = linear(b, x, f"{other}.attention.query")
                    found = [seen[f"{other}.attention.{n}"] for n in _SEEN]
                    x = _attended(b, c, other, x, [query, *found])
            x = _mlp(b, c, layer, x)
    return x


def _attended(
    b: GraphBuilder, c: QformerConfig, prefix: str, x: ir.Value, parts: Sequence[ir.Value]
) -> ir.Value:
    """x [1, Q, hidden] and what its queries find; parts: queries, keys and values, [1, rows, hidden] each."""
    head_dim = c.hidden_size // c.num_attention_heads
    q, k, v = (split_heads(b, part, c.num_attention_heads, head_dim) for part in parts)
    context = full_attention(b, b.narrow(q), b.narrow(k), b.narrow(v), head_dim)
    found = heads_linear(b, context, f"{prefix}.output.dense")
    return _norm(b, c, b.op("Add", found, x), f"{prefix}.output.LayerNorm")


def _mlp(b: GraphBuilder, c: QformerConfig, layer: str, x: ir.Value) -> ir.Value:
    with b.scope("mlp"):
        inner = linear(b, x, f"{layer}.intermediate_query.dense")
        found = linear(b, activation(b, inner, c.hidden_act, layer), f"{layer}.output_query.dense")
        return _norm(b, c, b.op("Add", found, x), f"{layer}.output_query.LayerNorm")


def _norm(b: GraphBuilder, c: QformerConfig, x: ir.Value, name: str) -> ir.Value:
    return layer_norm(b, x, name, c.hidden_size, c.layer_norm_eps)
