"""CLIP vision tower (Radford et al. 2021): patch embedding, class token, pre-norm transformer.
Shared by families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qvlm.errors import ExportError
from qvlm_export.attention import full_attention
from qvlm_export.graph import GraphBuilder
from qvlm_export.ops import activation, layer_norm, split_heads
from qvlm_export.qdq import heads_linear, linear, linears
from qvlm_export.weights import Array


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of the tower, with transformers' defaults for keys that a config leaves out."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ClipConfig:
        """Read ``vision_config``."""
        names = ClipConfig.__dataclass_fields__
        return ClipConfig(**{key: value for key, value in data.items() if key in names})

    @property
    def patches(self) -> int:
        """Patches of one image, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    def layer_of(self, index: int, where: str) -> int:
        """Number of layers before hidden state ``index`` (0 is the embedding, -1 the last layer's
        output).
        """
        states = self.num_hidden_layers + 1
        if not -states <= index < states:
            raise ExportError(f"{where}: {index}, the tower has hidden states 0 to {states - 1}")
        return index % states


def hidden_states(
    b: GraphBuilder, config: ClipConfig, prefix: str, pixels: ir.Value, wanted: Sequence[int]
) -> list[ir.Value]:
    """pixels F [N, C, H, W] to the hidden states before layers ``wanted``, each [N, patches + 1,
    hidden].

    Layers behind the last wanted one, and the tower's final norm, are not built.
    """
    with b.scope("embeddings"):
        x = _embed(b, config, prefix, pixels)
    states = {0: x}
    for i in range(max(wanted)):
        with b.scope(f"layers.{i}"):
            x = _layer(b, config, f"{prefix}.encoder.layers.{i}", x)
        states[i + 1] = x
    return [states[i] for i in wanted]


def _embed(b: GraphBuilder, c: ClipConfig, prefix: str, pixels: ir.Value) -> ir.Value:
    name = f"{prefix}.embeddings"
    patches = _patches(b, c, f"{name}.patch_embedding", pixels)
    label = b.constant(
        f"{name}.class_embedding",
        b.weights.stored(f"{name}.class_embedding", (1, 1, c.hidden_size), _rows(c.hidden_size)),
    )
    if b.target.image_batch != 1:
        count = b.op("Shape", pixels, start=0, end=1)
        label = b.op("Expand", label, b.op("Concat", count, b.i64(1, c.hidden_size), axis=0))
    x = b.op("Concat", label, patches, axis=1)
    x = b.op(
        "Add", x, b.parameter(f"{name}.position_embedding.weight", (c.patches + 1, c.hidden_size))
    )
    return layer_norm(b, x, f"{prefix}.pre_layrnorm", c.hidden_size, c.layer_norm_eps)


def _patches(b: GraphBuilder, c: ClipConfig, name: str, pixels: ir.Value) -> ir.Value:
    """pixels [N, C, H, W] to [N, patches, hidden]: a convolution, or the same as a linear over the
    patches where its weight is quantized.
    """
    size = c.patch_size
    if name in b.weights.checkpoint.linears:
        side, rest = divmod(c.image_size, size)
        if rest:
            raise ExportError(
                f"{name}: image_size {c.image_size} is no multiple of patch_size {size}. "
                "Keep the patch projection in float."
            )
        cut = b.op("Reshape", pixels, b.i64(0, c.num_channels, side, size, side, size))
        rows = b.op("Transpose", cut, perm=[0, 2, 4, 1, 3, 5])
        flat = b.op("Reshape", rows, b.i64(0, c.patches, c.num_channels * size * size))
        return linear(b, flat, name)
    kernel = b.parameter(f"{name}.weight", (c.hidden_size, c.num_channels, size, size))
    grid = b.op("Conv", pixels, kernel, kernel_shape=[size] * 2, strides=[size] * 2)
    flat = b.op("Reshape", grid, b.i64(0, c.hidden_size, -1))
    return b.op("Transpose", flat, perm=[0, 2, 1])


def _rows(width: int) -> Any:
    def reshape(array: Array) -> Array:
        return array.reshape(1, 1, width)

    return reshape


def _layer(b: GraphBuilder, c: ClipConfig, prefix: str, x: ir.Value) -> ir.Value:
    h = layer_norm(b, x, f"{prefix}.layer_norm1", c.hidden_size, c.layer_norm_eps)
    with b.scope("self_attn"):
        qkv = linears(b, h, [f"{prefix}.self_attn.{p}_proj" for p in "qkv"])
        q, k, v = (split_heads(b, part, c.num_attention_heads, c.head_dim) for part in qkv)
        context = full_attention(b, q, k, v, c.head_dim)
        x = b.op("Add", x, heads_linear(b, context, f"{prefix}.self_attn.out_proj"))
    h = layer_norm(b, x, f"{prefix}.layer_norm2", c.hidden_size, c.layer_norm_eps)
    with b.scope("mlp"):
        inner = activation(b, linear(b, h, f"{prefix}.mlp.fc1"), c.hidden_act, prefix)
        return b.op("Add", x, linear(b, inner, f"{prefix}.mlp.fc2"))
