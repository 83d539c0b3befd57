"""LLaVA (Liu et al. 2023): CLIP tower, two-layer projector, Llama decoder; one image is a fixed run
of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm_export.graph import GraphBuilder
from qvlm_export.models.clip import ClipConfig, hidden_states
from qvlm_export.models.family import Family
from qvlm_export.models.llama import LlamaConfig, decoder
from qvlm_export.ops import INT64_MAX, activation
from qvlm_export.processor import (
    eos_token_ids,
    template_tokens,
    token_text,
    whole_image,
)
from qvlm_export.qdq import linear
from qvlm_runtime.image_spec import ImageSpec
from qvlm_runtime.manifest import ModelSpec

VISION = "model.vision_tower"
PROJECTOR = "model.multi_modal_projector"
TEXT = "model.language_model"
HEAD = "lm_head"


@dataclass(frozen=True)
class LlavaConfig:
    """config.json of a LLaVA checkpoint."""

    vision: ClipConfig
    text: LlamaConfig
    image_token_id: int
    feature_layers: tuple[int, ...]
    keep_class_token: bool
    projector_act: str

    @staticmethod
    def of(checkpoint: Checkpoint) -> LlavaConfig:
        """Read it; ExportError for a tower, decoder or selection that this family's builder does
        not know.
        """
        data, where = checkpoint.config, str(checkpoint.directory / "config.json")
        vision, text = _part(data, "vision_config", where), _part(data, "text_config", where)
        _expect(
            vision.get("model_type", "clip_vision_model"),
            ("clip_vision_model",),
            f"{where}: vision model_type",
        )
        _expect(text.get("model_type", "llama"), ("llama",), f"{where}: text model_type")
        strategy = data.get("vision_feature_select_strategy", "default")
        _expect(strategy, ("default", "full"), f"{where}: vision_feature_select_strategy")
        tower = ClipConfig.from_json(vision)
        chosen = data.get("vision_feature_layer", -2)
        layers = [chosen] if isinstance(chosen, int) else chosen
        return LlavaConfig(
            tower,
            LlamaConfig.from_json(text),
            int(data.get("image_token_id", data.get("image_token_index", 32000))),
            tuple(tower.layer_of(int(i), f"{where}: vision_feature_layer") for i in layers),
            strategy == "full",
            str(data.get("projector_hidden_act", "gelu")),
        )

    @property
    def tokens_per_image(self) -> int:
        """Rows of image_features that one image gives."""
        return self.vision.patches + (1 if self.keep_class_token else 0)


def _part(data: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    part = data.get(key)
    if not isinstance(part, dict):
        raise ExportError(f"{where}: {key} is {type(part).__name__}, expected an object")
    return part


def _expect(found: object, known: Sequence[str], where: str) -> None:
    if found not in known:
        raise ExportError(f"{where} is {found!r}, expected {' or '.join(known)}")


def vision_graph(b: GraphBuilder, positions: int) -> None:
    """pixel_values F [N, 3, H, W] -> image_features F [N * tokens_per_image, hidden]."""
    c = LlavaConfig.of(b.weights.checkpoint)
    v = c.vision
    batch = "N" if b.target.image_batch is None else b.target.image_batch
    pixels = b.input(
        "pixel_values", b.float_type, (batch, v.num_channels, v.image_size, v.image_size)
    )
    with b.scope("vision"):
        states = hidden_states(b, v, VISION, pixels, c.feature_layers)
    with b.scope("projector"):
        if not c.keep_class_token:
            states = [b.op("Slice", s, b.i64(1), b.i64(INT64_MAX), b.i64(1)) for s in states]
        x = states[0] if len(states) == 1 else b.op("Concat", *states, axis=-1)
        x = activation(b, linear(b, x, f"{PROJECTOR}.linear_1"), c.projector_act, PROJECTOR)
        x = linear(b, x, f"{PROJECTOR}.linear_2")
        x = b.op("Reshape", x, b.i64(-1, c.text.hidden_size))
    rows = "M" if b.target.image_batch is None else b.target.image_batch * c.tokens_per_image
    b.output(x, "image_features", b.float_type, (rows, c.text.hidden_size))


def decoder_graph(b: GraphBuilder, positions: int) -> None:
    """The decoder of the model folder's contract."""
    checkpoint = b.weights.checkpoint
    where = f"{checkpoint.directory / 'config.json'}: text_config"
    decoder(b, LlavaConfig.of(checkpoint).text, TEXT, HEAD, positions, where)


def max_context(checkpoint: Checkpoint) -> int:
    """Positions the decoder was trained for."""
    return LlavaConfig.of(checkpoint).text.max_position_embeddings


def model_spec(checkpoint: Checkpoint, context: int) -> ModelSpec:
    """The manifest's numbers."""
    c = LlavaConfig.of(checkpoint)
    return ModelSpec(
        family="llava",
        hidden_size=c.text.hidden_size,
        vocab_size=c.text.vocab_size,
        layers=c.text.num_hidden_layers,
        kv_heads=c.text.heads.kv_heads,
        head_dim=c.text.heads.head_dim,
        max_context=context,
        eos_token_ids=eos_token_ids(checkpoint),
        image_token=token_text(checkpoint, c.image_token_id),
        image_token_id=c.image_token_id,
        feature_size=c.text.hidden_size,
        template_tokens=template_tokens(checkpoint),
    )


def image_spec(checkpoint: Checkpoint) -> ImageSpec:
    """The processor's settings; ExportError unless they give the tower's image size."""
    c = LlavaConfig.of(checkpoint)
    size = c.vision.image_size
    return whole_image(checkpoint, (size, size), c.tokens_per_image)


LLAVA = Family(
    "llava",
    {"vision": vision_graph, "decoder": decoder_graph},
    max_context,
    model_spec,
    image_spec,
)
