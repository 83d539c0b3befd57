"""Families that cut an image into square tiles: tower, projector, Llama-like decoder. A family is one row, ``Tiles``.

Every tile runs through a vision transformer (``vit.py``); its patches go through the projector, after four (or more)
neighbours became one where the family has pixel shuffle. The rows of all tiles, in order, are the image's features.
Families that drop padding and end image lines with a learned row tell the rest by ``feature_index``: the runtime
computes it from the picture's size, the graph gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm_export.graph import GraphBuilder
from qvlm_export.models.decoder import decoder_spec
from qvlm_export.models.family import Family
from qvlm_export.models.llama import LlamaConfig, decoder
from qvlm_export.models.vit import VitConfig, final_norm, hidden_states
from qvlm_export.ops import INT64_MAX, activation, layer_norm
from qvlm_export.qdq import linear
from qvlm_runtime.image_spec import ImageSpec
from qvlm_runtime.manifest import MarkerSpec, ModelSpec

# transformers' defaults of the decoders, as far as they differ from Llama's.
_DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
    },
    "qwen3": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
    },
}
# Of a LayerNorm that is made without a word about it.
_TORCH_EPS = 1e-5


@dataclass(frozen=True)
class Tiles:
    """What a family is made of.

    towers and decoders: the vision and text model types its builder knows, the default first. defaults: of keys in
    config.json that it may leave out. vision, projector, text: where the modules are. norm: the projector's norm, ""
    without one. linears: the projector's, an activation between them. shuffle(config): side of the square of patches
    that become one row. normed(config): whether the tower's final norm is applied to its last state.
    text_defaults: of the decoder, where the family's differ from the decoder's own. newline: the row that ends a line
    of an image whose rows are rearranged, "" where they are not. image: how the processor cuts. marker: what stands in
    the prompt for an image.
    """

    model_type: str
    towers: tuple[str, ...]
    decoders: tuple[str, ...]
    defaults: Mapping[str, Any]
    image: Callable[[Checkpoint, TilesConfig], ImageSpec]
    vision: str = "model.vision_tower"
    projector: str = "model.multi_modal_projector"
    text: str = "model.language_model"
    norm: str = ""
    linears: tuple[str, ...] = ("linear_1", "linear_2")
    shuffle: Callable[[Mapping[str, Any]], int] = lambda config: 1
    normed: Callable[[Mapping[str, Any]], bool] = lambda config: False
    text_defaults: Mapping[str, Any] | None = None
    newline: str = ""
    marker: Callable[[Checkpoint], MarkerSpec] = lambda checkpoint: MarkerSpec()


@dataclass(frozen=True)
class TilesConfig:
    """config.json of a checkpoint of such a family."""

    vision: VitConfig
    text: LlamaConfig
    image_token_id: int
    feature_layers: tuple[int, ...]
    normed: bool
    keep_class_token: bool
    projector_act: str
    shuffle: int

    @staticmethod
    def of(tiles: Tiles, checkpoint: Checkpoint) -> TilesConfig:
        """Read it; ExportError for a tower, decoder or selection that the builder does not know."""
        where = str(checkpoint.directory / "config.json")
        data = {**tiles.defaults, **checkpoint.config}
        vision, text = _part(data, "vision_config", where), _part(data, "text_config", where)
        kind = vision.get("model_type", tiles.towers[0])
        _expect(kind, tiles.towers, f"{where}: vision model_type")
        tower = VitConfig.from_json(vision, kind, f"{where}: vision_config")
        strategy = data["vision_feature_select_strategy"]
        _expect(strategy, ("default", "full"), f"{where}: vision_feature_select_strategy")
        chosen = data["vision_feature_layer"]
        layers = [chosen] if isinstance(chosen, int) else chosen
        shuffle = tiles.shuffle(data)
        if tower.side % shuffle:
            raise ExportError(
                f"{where}: {tower.side} patches along a tile, expected a multiple of {shuffle}"
            )
        return TilesConfig(
            tower,
            _text(tiles, text, f"{where}: text_config"),
            int(data.get("image_token_id", data["image_token_index"])),
            tuple(tower.layer_of(int(i), f"{where}: vision_feature_layer") for i in layers),
            tiles.normed(data),
            strategy == "full",
            str(data["projector_hidden_act"]),
            shuffle,
        )

    @property
    def rows_per_tile(self) -> int:
        """Rows of image features that one tile gives, before any rearrangement."""
        labels = self.vision.labels if self.keep_class_token else 0
        return self.vision.patches // self.shuffle**2 + labels


def _text(tiles: Tiles, data: Mapping[str, Any], where: str) -> LlamaConfig:
    kind = data.get("model_type", tiles.decoders[0])
    _expect(kind, tiles.decoders, f"{where}: model_type")
    values = {**_DECODERS[kind], **(tiles.text_defaults or {}), **data}
    config = LlamaConfig.from_json(values)
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        raise ExportError(
            f"{where}: attention in a sliding window of {window}, expected all positions"
        )
    return config


def _part(data: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    part = data.get(key)
    if not isinstance(part, dict):
        raise ExportError(f"{where}: {key} is {type(part).__name__}, expected an object")
    return part


def _expect(found: object, known: Sequence[str], where: str) -> None:
    if found not in known:
        raise ExportError(f"{where} is {found!r}, expected {' or '.join(known)}")


def _vision_graph(tiles: Tiles, b: GraphBuilder) -> None:
    """pixel_values F [N, 3, H, W] -> image_features F [N * rows_per_tile, hidden], or, with feature_index int64 [M],
    these rows of them and the newline row behind them: F [M, hidden].
    """
    c = TilesConfig.of(tiles, b.weights.checkpoint)
    v, hidden = c.vision, c.text.hidden_size
    batch = "N" if tiles.newline or b.target.image_batch is None else b.target.image_batch
    pixels = b.input(
        "pixel_values", b.float_type, (batch, v.num_channels, v.image_size, v.image_size)
    )
    with b.scope("vision"):
        states = hidden_states(b, v, tiles.vision, pixels, c.feature_layers)
        if c.normed:
            states = [final_norm(b, v, tiles.vision, s) for s in states]
    with b.scope("projector"):
        if v.labels and not c.keep_class_token:
            states = [b.op("Slice", s, b.i64(1), b.i64(INT64_MAX), b.i64(1)) for s in states]
        x = states[0] if len(states) == 1 else b.op("Concat", *states, axis=-1)
        x = _project(b, tiles, c, _shuffled(b, c, x))
        x = b.op("Reshape", x, b.i64(-1, hidden))
    rows = "M" if batch == "N" else int(batch) * c.rows_per_tile
    if tiles.newline:
        index = b.input("feature_index", ir.DataType.INT64, ("M",))
        x = b.op("Gather", b.op("Concat", x, _newline(b, tiles, hidden), axis=0), index, axis=0)
    b.output(x, "image_features", b.float_type, (rows, hidden))


def _shuffled(b: GraphBuilder, c: TilesConfig, x: ir.Value) -> ir.Value:
    """[N, side * side, C] to [N, rows, n * n * C]: each square of n x n patches becomes one row, line by line."""
    n, side, width = c.shuffle, c.vision.side, c.vision.hidden_size * len(c.feature_layers)
    if n == 1:
        return x
    x = b.op("Reshape", x, b.i64(0, side // n, n, side // n, n * width))
    x = b.op("Transpose", x, perm=[0, 1, 3, 2, 4])
    return b.op("Reshape", x, b.i64(0, (side // n) ** 2, n * n * width))


def _project(b: GraphBuilder, tiles: Tiles, c: TilesConfig, x: ir.Value) -> ir.Value:
    if tiles.norm:
        width = c.vision.hidden_size * c.shuffle**2
        x = layer_norm(b, x, f"{tiles.projector}.{tiles.norm}", width, _TORCH_EPS)
    for i, name in enumerate(tiles.linears):
        if i:
            x = activation(b, x, c.projector_act, tiles.projector)
        x = linear(b, x, f"{tiles.projector}.{name}")
    return x


def _newline(b: GraphBuilder, tiles: Tiles, hidden: int) -> ir.Value:
    b.weights.expect(tiles.newline, (hidden,))
    row = b.weights.stored(tiles.newline, (1, hidden), lambda array: array.reshape(1, hidden))
    return b.constant(tiles.newline, row)


def _model_spec(tiles: Tiles, checkpoint: Checkpoint, context: int) -> ModelSpec:
    c = TilesConfig.of(tiles, checkpoint)
    spec = decoder_spec(checkpoint, c.text, c.image_token_id, context)
    return replace(spec, marker=tiles.marker(checkpoint))


def tiles_family(tiles: Tiles) -> Family:
    """The exporter's row of a family."""

    def vision_graph(b: GraphBuilder, positions: int) -> None:
        _vision_graph(tiles, b)

    def decoder_graph(b: GraphBuilder, positions: int) -> None:
        where = f"{b.weights.checkpoint.directory / 'config.json'}: text_config"
        text = TilesConfig.of(tiles, b.weights.checkpoint).text
        decoder(b, text, tiles.text, "lm_head", positions, where)

    return Family(
        tiles.model_type,
        {"vision": vision_graph, "decoder": decoder_graph},
        lambda checkpoint: TilesConfig.of(tiles, checkpoint).text.max_position_embeddings,
        lambda checkpoint, context: _model_spec(tiles, checkpoint, context),
        lambda checkpoint: tiles.image(checkpoint, TilesConfig.of(tiles, checkpoint)),
    )
