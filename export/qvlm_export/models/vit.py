"""Vision transformers on fixed square tiles: CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023), InternViT
(Chen et al. 2024), BLIP-2's EVA ViT (Fang et al. 2022). One graph; what differs is a row of ``TOWERS``.

Patch embedding, optional class token, learned positions, pre-norm layers of full attention and a two-linear MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qvlm.errors import ExportError
from qvlm_export.attention import full_attention
from qvlm_export.graph import GraphBuilder
from qvlm_export.ops import activation, layer_norm, rms_norm, split_heads, split_last
from qvlm_export.qdq import heads_linear, linear, linears


@dataclass(frozen=True)
class Tower:
    """Where a kind of tower keeps its parts, and transformers' defaults for keys that its config leaves out.

    Names are relative to the tower, those from ``norms`` on to a layer; "" is a part it does not have. label: the
    class token. qkv: one linear that gives queries, keys and values; "" where they are three. scales: a gain per
    channel on what attention and MLP add. query_norms: norms over all heads at once, where the config asks for them
    (use_qk_norm).
    """

    defaults: Mapping[str, Any]
    patch: str = "embeddings.patch_embedding"
    label: str = ""
    positions: str = "embeddings.position_embedding.weight"
    pre_norm: str = ""
    final_norm: str = "post_layernorm"
    layers: str = "encoder.layers"
    norms: tuple[str, str] = ("layer_norm1", "layer_norm2")
    attention: str = "self_attn"
    output: str = "out_proj"
    qkv: str = ""
    scales: tuple[str, ...] = ()
    query_norms: tuple[str, ...] = ()


_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP = {**_CLIP, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_IDEFICS = {**_SIGLIP, "hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}
_INTERN = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "use_mean_pooling": True,
}

_BLIP = {
    **_SIGLIP,
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "gelu",
}

TOWERS: dict[str, Tower] = {
    "clip_vision_model": Tower(_CLIP, label="embeddings.class_embedding", pre_norm="pre_layrnorm"),
    "siglip_vision_model": Tower(_SIGLIP),
    # transformers looks a patch's row up by its fraction of the tile, in float32. On full tiles that is the patch's own
    # row for all sizes that were published (26, 27 and 32 patches a side).
    "smolvlm_vision": Tower(_IDEFICS),
    "idefics3_vision": Tower(_IDEFICS),
    "internvl_vision": Tower(
        _INTERN,
        patch="embeddings.patch_embeddings.projection",
        label="embeddings.cls_token",
        positions="embeddings.position_embeddings",
        final_norm="layernorm",
        layers="encoder.layer",
        norms=("layernorm_before", "layernorm_after"),
        attention="attention",
        output="projection_layer",
        scales=("lambda_1", "lambda_2"),
        query_norms=("q_norm", "k_norm"),
    ),
    "blip_2_vision_model": Tower(
        _BLIP,
        label="embeddings.class_embedding",
        positions="embeddings.position_embedding",
        output="projection",
        qkv="qkv",
    ),
}


@dataclass(frozen=True)
class VitConfig:
    """Sizes of one tower and its row of ``TOWERS``."""

    tower: Tower
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    num_channels: int = 3
    norm_type: str = "layer_norm"
    use_qk_norm: bool = False
    use_mean_pooling: bool = False
    use_absolute_position_embeddings: bool = True

    @staticmethod
    def from_json(data: Mapping[str, Any], kind: str, where: str) -> VitConfig:
        """Read ``vision_config`` of a tower of ``kind``; ExportError for an oblong tile or an unknown norm."""
        tower = TOWERS[kind]
        names = set(VitConfig.__dataclass_fields__) - {"tower"}
        values = {k: v for k, v in {**tower.defaults, **data}.items() if k in names}
        for key in ("image_size", "patch_size"):
            values[key] = _square(values[key], f"{where}: {key}")
        config = VitConfig(tower, **values)
        if config.norm_type not in ("layer_norm", "rms_norm"):
            raise ExportError(
                f"{where}: norm_type is {config.norm_type!r}, expected layer_norm or rms_norm"
            )
        return config

    @property
    def side(self) -> int:
        """Patches along one side of a tile; what is left over at the edge is not seen."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of one tile, without the class token."""
        return self.side**2

    @property
    def labels(self) -> int:
        """Class tokens in front of the patches: 0 or 1."""
        return 1 if self.tower.label else 0

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


def _square(value: Any, where: str) -> int:
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise ExportError(f"{where} is {value}, expected a square")
    return int(sides.pop())


def hidden_states(
    b: GraphBuilder, config: VitConfig, prefix: str, pixels: ir.Value, wanted: Sequence[int]
) -> list[ir.Value]:
    """pixels F [N, C, H, W] to the hidden states before layers ``wanted``, each [N, labels +
    patches, hidden].

    Layers behind the last wanted one, and the tower's final norm, are not built.
    """
    with b.scope("embeddings"):
        x = _embed(b, config, prefix, pixels)
    states = {0: x}
    for i in range(max(wanted)):
        with b.scope(f"layers.{i}"):
            x = _layer(b, config, f"{prefix}.{config.tower.layers}.{i}", x)
        states[i + 1] = x
    return [states[i] for i in wanted]


def final_norm(b: GraphBuilder, c: VitConfig, prefix: str, x: ir.Value) -> ir.Value:
    """The norm behind the last layer; a tower that pools by the mean has none."""
    if c.use_mean_pooling:
        return x
    return layer_norm(b, x, f"{prefix}.{c.tower.final_norm}", c.hidden_size, c.layer_norm_eps)


def _embed(b: GraphBuilder, c: VitConfig, prefix: str, pixels: ir.Value) -> ir.Value:
    tower = c.tower
    x = _patches(b, c, f"{prefix}.{tower.patch}", pixels)
    if tower.label:
        x = b.op("Concat", _label(b, c, f"{prefix}.{tower.label}", pixels), x, axis=1)
    if c.use_absolute_position_embeddings:
        x = b.op("Add", x, _positions(b, c, f"{prefix}.{tower.positions}"))
    if not tower.pre_norm:
        return x
    return layer_norm(b, x, f"{prefix}.{tower.pre_norm}", c.hidden_size, c.layer_norm_eps)


def _label(b: GraphBuilder, c: VitConfig, name: str, pixels: ir.Value) -> ir.Value:
    shape = (1, 1, c.hidden_size)
    label = b.constant(name, b.weights.stored(name, shape, lambda array: array.reshape(shape)))
    if pixels.shape is not None and pixels.shape[0] == 1:
        return label
    # Not Shape's start and end: older importers do not read these attributes.
    count = b.op("Gather", b.op("Shape", pixels), b.i64(0), axis=0)
    return b.op("Expand", label, b.op("Concat", count, b.i64(1, c.hidden_size), axis=0))


def _positions(b: GraphBuilder, c: VitConfig, name: str) -> ir.Value:
    """The position table [labels + patches, hidden]."""
    shape = (c.labels + c.patches, c.hidden_size)
    batched = len(b.weights.shape(name)) == 3
    b.weights.expect(name, (1, *shape) if batched else shape)
    return b.constant(name, b.weights.stored(name, shape, lambda array: array.reshape(shape)))


def _patches(b: GraphBuilder, c: VitConfig, name: str, pixels: ir.Value) -> ir.Value:
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
    kernel = [b.parameter(f"{name}.weight", (c.hidden_size, c.num_channels, size, size))]
    if f"{name}.bias" in b.weights:
        kernel.append(b.parameter(f"{name}.bias", (c.hidden_size,)))
    grid = b.op("Conv", pixels, *kernel, kernel_shape=[size] * 2, strides=[size] * 2)
    flat = b.op("Reshape", grid, b.i64(0, c.hidden_size, -1))
    return b.op("Transpose", flat, perm=[0, 2, 1])


def _layer(b: GraphBuilder, c: VitConfig, prefix: str, x: ir.Value) -> ir.Value:
    tower, attention = c.tower, f"{prefix}.{c.tower.attention}"
    x = b.stream(x, prefix)
    h = _norm(b, c, x, f"{prefix}.{tower.norms[0]}")
    with b.scope("self_attn"):
        if tower.qkv:
            q, k, v = split_last(b, linear(b, h, f"{attention}.{tower.qkv}"), [c.hidden_size] * 3)
        else:
            q, k, v = linears(b, h, [f"{attention}.{p}_proj" for p in "qkv"])
        if c.use_qk_norm:
            # InternVL's own norm has no eps of its own in the config: 1e-6 is its constructor's.
            q, k = (
                rms_norm(b, part, f"{attention}.{name}", c.hidden_size, 1e-6)
                for part, name in zip((q, k), tower.query_norms, strict=True)
            )
        q, k, v = (split_heads(b, part, c.num_attention_heads, c.head_dim) for part in (q, k, v))
        context = full_attention(b, b.narrow(q), b.narrow(k), b.narrow(v), c.head_dim)
        added = heads_linear(b, context, f"{attention}.{tower.output}")
        x = b.op("Add", x, _scaled(b, c, added, prefix, 0))
    h = _norm(b, c, x, f"{prefix}.{tower.norms[1]}")
    with b.scope("mlp"):
        inner = activation(b, linear(b, h, f"{prefix}.mlp.fc1"), c.hidden_act, prefix)
        added = linear(b, inner, f"{prefix}.mlp.fc2")
        return b.op("Add", x, _scaled(b, c, added, prefix, 1))


def _norm(b: GraphBuilder, c: VitConfig, x: ir.Value, name: str) -> ir.Value:
    if c.norm_type == "rms_norm":
        return rms_norm(b, x, name, c.hidden_size, c.layer_norm_eps)
    return layer_norm(b, x, name, c.hidden_size, c.layer_norm_eps)


def _scaled(b: GraphBuilder, c: VitConfig, x: ir.Value, prefix: str, index: int) -> ir.Value:
    if not c.tower.scales:
        return x
    return b.op("Mul", x, b.parameter(f"{prefix}.{c.tower.scales[index]}", (c.hidden_size,)))
