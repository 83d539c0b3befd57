"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: their own vision transformer, a Llama-like decoder with M-RoPE.

An image has as many tokens as its size asks for. One run of the vision graph takes one image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm_export.graph import GraphBuilder
from qvlm_export.models.decoder import decoder_spec
from qvlm_export.models.family import Family
from qvlm_export.models.llama import LlamaConfig, decoder
from qvlm_export.models.qwen_vit import QwenVitConfig, features
from qvlm_export.processor import patch_image
from qvlm_runtime.image_spec import ImageSpec
from qvlm_runtime.manifest import ModelSpec

VISION = "model.visual"
TEXT = "model.language_model"
HEAD = "lm_head"


def _qwen2_vision(v: Mapping[str, Any]) -> QwenVitConfig:
    return QwenVitConfig(
        width=v["embed_dim"],
        out_size=v["hidden_size"],
        rms=False,
        mlp=("fc1", "fc2"),
        merger=("ln_q", "mlp.0", "mlp.2"),
        **_common(v),
    )


def _qwen2_5_vision(v: Mapping[str, Any]) -> QwenVitConfig:
    return QwenVitConfig(
        width=v["hidden_size"],
        out_size=v["out_hidden_size"],
        rms=True,
        mlp=("gate_proj", "up_proj", "down_proj"),
        merger=("ln_q", "mlp.0", "mlp.2"),
        window=v["window_size"],
        full=tuple(v["fullatt_block_indexes"]),
        **_common(v),
    )


def _qwen3_vision(v: Mapping[str, Any]) -> QwenVitConfig:
    return QwenVitConfig(
        width=v["hidden_size"],
        out_size=v["out_hidden_size"],
        rms=False,
        mlp=("linear_fc1", "linear_fc2"),
        merger=("norm", "linear_fc1", "linear_fc2"),
        positions=v["num_position_embeddings"],
        deepstack=tuple(v["deepstack_visual_indexes"]),
        **_common(v),
    )


def _common(v: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "heads": v["num_heads"],
        "layers": v["depth"],
        "channels": v["in_channels"],
        "frames": v["temporal_patch_size"],
        "patch_side": v["patch_size"],
        "merge": v["spatial_merge_size"],
        "act": v["hidden_act"],
        "rope_theta": float((v.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
    }


@dataclass(frozen=True)
class Generation:
    """What differs between the three.

    vision and text: transformers' defaults of the keys that a config may leave out; tower: reads
    them; interleaved: how ``mrope_section`` deals out the frequencies.
    """

    tower: Callable[[Mapping[str, Any]], QwenVitConfig]
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    mrope_section: tuple[int, int, int]
    interleaved: bool


_VISION = {
    "depth": 32,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_TEXT = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
GENERATIONS = {
    "qwen2_vl": Generation(
        _qwen2_vision,
        {**_VISION, "embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu"},
        _TEXT,
        (16, 24, 24),
        False,
    ),
    "qwen2_5_vl": Generation(
        _qwen2_5_vision,
        {
            **_VISION,
            "hidden_size": 3584,
            "out_hidden_size": 3584,
            "hidden_act": "silu",
            "window_size": 112,
            "fullatt_block_indexes": (7, 15, 23, 31),
        },
        _TEXT,
        (16, 24, 24),
        False,
    ),
    "qwen3_vl": Generation(
        _qwen3_vision,
        {
            **_VISION,
            "depth": 27,
            "hidden_size": 1152,
            "out_hidden_size": 3584,
            "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": (8, 16, 24),
        },
        {
            **_TEXT,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5e5,
        },
        (24, 20, 20),
        True,
    ),
}


@dataclass(frozen=True)
class QwenConfig:
    """config.json of a Qwen-VL checkpoint."""

    vision: QwenVitConfig
    text: LlamaConfig
    image_token_id: int

    @staticmethod
    def of(checkpoint: Checkpoint) -> QwenConfig:
        """Read it; ExportError for what the builder does not know, or sizes that do not fit."""
        data, where = checkpoint.config, str(checkpoint.directory / "config.json")
        g = GENERATIONS[str(data["model_type"])]
        given = data.get("text_config") or data  # on the hub the decoder's keys stand at the top
        if given.get("use_sliding_window"):
            raise ExportError(f"{where}: use_sliding_window is not supported")
        text = LlamaConfig.from_json({**g.text, **given})
        rope = {"mrope_section": g.mrope_section, **text.rope, "mrope_interleaved": g.interleaved}
        vision = g.tower({**g.vision, **(data.get("vision_config") or {})})
        if vision.out_size != text.hidden_size or vision.head_dim % 4:
            raise ExportError(
                f"{where}: features of {vision.out_size} numbers and vision heads of "
                f"{vision.head_dim}, expected the decoder's {text.hidden_size} and a multiple of 4"
            )
        text = replace(text, rope=rope, deepstack=len(vision.deepstack))
        return QwenConfig(vision, text, int(data.get("image_token_id", 151655)))


def vision_graph(b: GraphBuilder, positions: int) -> None:
    """The inputs of ``qwen_vit.features`` -> image_features F [G, feature_size]."""
    c = QwenConfig.of(b.weights.checkpoint).vision
    with b.scope("vision"):
        x = features(b, c, VISION)
    b.output(x, "image_features", b.float_type, ("G", c.feature_size))


def decoder_graph(b: GraphBuilder, positions: int) -> None:
    """The decoder of the model folder's contract."""
    checkpoint = b.weights.checkpoint
    where = f"{checkpoint.directory / 'config.json'}: text_config"
    decoder(b, QwenConfig.of(checkpoint).text, TEXT, HEAD, positions, where)


def max_context(checkpoint: Checkpoint) -> int:
    """Positions the decoder was trained for."""
    return QwenConfig.of(checkpoint).text.max_position_embeddings


def model_spec(checkpoint: Checkpoint, context: int) -> ModelSpec:
    """The manifest's numbers."""
    c = QwenConfig.of(checkpoint)
    spec = decoder_spec(checkpoint, c.text, c.image_token_id, context)
    return replace(spec, feature_size=c.vision.feature_size, positions="mrope")


def image_spec(checkpoint: Checkpoint) -> ImageSpec:
    """The processor's settings, and what the tower asks of the runtime."""
    c = QwenConfig.of(checkpoint).vision
    side = math.isqrt(c.positions) or None
    return patch_image(checkpoint, c.patch_side, c.merge, c.window, side, c.frames)


QWEN_VL = {
    model_type: Family(
        model_type,
        {"vision": vision_graph, "decoder": decoder_graph},
        max_context,
        model_spec,
        image_spec,
    )
    for model_type in GENERATIONS
}
