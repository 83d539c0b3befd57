"""BLIP-2 (Li et al. 2023) with an OPT decoder: a ViT, a Q-Former that asks it, one linear.

Every picture is one tile and becomes as many rows as there are queries. They stand in front of the prompt's first
token, of one picture at most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm_export.graph import GraphBuilder
from qvlm_export.models import opt
from qvlm_export.models.decoder import decoder_spec
from qvlm_export.models.family import Family
from qvlm_export.models.opt import OptConfig
from qvlm_export.models.qformer import QformerConfig, queried
from qvlm_export.models.vit import VitConfig, final_norm, hidden_states
from qvlm_export.processor import whole_image
from qvlm_export.qdq import linear
from qvlm_runtime.image_spec import WholeImage
from qvlm_runtime.manifest import MarkerSpec, ModelSpec

VISION = "vision_model"
QFORMER = "qformer"
TEXT = "language_model.model.decoder"
HEAD = "language_model.lm_head"


@dataclass(frozen=True)
class BlipConfig:
    """config.json of a BLIP-2 checkpoint."""

    vision: VitConfig
    qformer: QformerConfig
    text: OptConfig
    queries: int
    image_token_id: int

    @staticmethod
    def of(checkpoint: Checkpoint) -> BlipConfig:
        """Read it; ExportError for a decoder that is no OPT, or no image token."""
        data, where = checkpoint.config, str(checkpoint.directory / "config.json")
        text = data.get("text_config") or {}
        if (kind := text.get("model_type", "opt")) != "opt":
            raise ExportError(f"{where}: text_config model_type is {kind!r}, expected 'opt'")
        if (token := data.get("image_token_index")) is None:
            raise ExportError(f"{where}: no image_token_index, expected the id of the image token")
        vision = data.get("vision_config") or {}
        return BlipConfig(
            VitConfig.from_json(vision, "blip_2_vision_model", f"{where}: vision_config"),
            QformerConfig.from_json(data.get("qformer_config") or {}),
            OptConfig.from_json(text, f"{where}: text_config"),
            int(data.get("num_query_tokens", 32)),
            int(token),
        )


def vision_graph(b: GraphBuilder, positions: int) -> None:
    """pixel_values F [1, 3, H, W] -> image_features F [queries, hidden]."""
    c = BlipConfig.of(b.weights.checkpoint)
    side = c.vision.image_size
    pixels = b.input("pixel_values", b.float_type, (1, c.vision.num_channels, side, side))
    with b.scope("vision"):
        (x,) = hidden_states(b, c.vision, VISION, pixels, (c.vision.num_hidden_layers,))
        x = final_norm(b, c.vision, VISION, x)
    with b.scope("projector"):
        queries = b.parameter("query_tokens", (1, c.queries, c.qformer.hidden_size))
        x = linear(b, queried(b, c.qformer, QFORMER, queries, x), "language_projection")
        x = b.op("Reshape", x, b.i64(-1, c.text.hidden_size))
    b.output(x, "image_features", b.float_type, (c.queries, c.text.hidden_size))


def decoder_graph(b: GraphBuilder, positions: int) -> None:
    """The decoder of the model folder's contract."""
    opt.decoder(b, BlipConfig.of(b.weights.checkpoint).text, TEXT, HEAD, positions)


def max_context(checkpoint: Checkpoint) -> int:
    """Positions in the decoder's table."""
    return BlipConfig.of(checkpoint).text.max_position_embeddings


def model_spec(checkpoint: Checkpoint, context: int) -> ModelSpec:
    """The manifest's numbers."""
    c = BlipConfig.of(checkpoint)
    spec = decoder_spec(checkpoint, c.text, c.image_token_id, context)
    return replace(spec, marker=MarkerSpec(leading=True), images=1)


def image_spec(checkpoint: Checkpoint) -> WholeImage:
    """The processor's settings."""
    c = BlipConfig.of(checkpoint)
    return whole_image(checkpoint, (c.vision.image_size, c.vision.image_size), c.queries)


BLIP_2 = Family(
    "blip-2",
    {"vision": vision_graph, "decoder": decoder_graph},
    max_context,
    model_spec,
    image_spec,
)
