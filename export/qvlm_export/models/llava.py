"""LLaVA 1.5, NeXT and OneVision (Liu et al. 2023, 2024; Li et al. 2024): a tower and a two-linear projector.

1.5 sees one tile. NeXT and OneVision see the whole picture in one tile and its pieces in more, drop the padding of the
pieces and end every image line with a learned row.
"""

from __future__ import annotations

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm_export.models.tiles import Tiles, TilesConfig, tiles_family
from qvlm_export.processor import anyres_image, whole_image
from qvlm_runtime.image_spec import AnyresImage, WholeImage

_DEFAULTS = {
    "image_token_index": 32000,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
}

_MOST = "anyres_max_"


def _whole(checkpoint: Checkpoint, c: TilesConfig) -> WholeImage:
    size = c.vision.image_size
    return whole_image(checkpoint, (size, size), c.rows_per_tile)


def _pieces(checkpoint: Checkpoint, c: TilesConfig, most: int | None = None) -> AnyresImage:
    if c.rows_per_tile != c.vision.side**2:
        raise ExportError(
            f"{checkpoint.directory / 'config.json'}: vision_feature_select_strategy keeps the class token, "
            "expected 'default': a tile's rows must be a square."
        )
    return anyres_image(checkpoint, c.vision.image_size, c.vision.side, most)


def _bounded_pieces(checkpoint: Checkpoint, c: TilesConfig) -> AnyresImage:
    """As many as ``vision_aspect_ratio`` names: "anyres_max_9"."""
    found = str(checkpoint.config.get("vision_aspect_ratio", f"{_MOST}9"))
    if not found.startswith(_MOST) or not found.removeprefix(_MOST).isdecimal():
        raise ExportError(
            f"{checkpoint.directory / 'config.json'}: vision_aspect_ratio is {found!r}, expected {_MOST} and a number"
        )
    most = int(found.removeprefix(_MOST))
    return _pieces(checkpoint, c, most)


LLAVA = tiles_family(Tiles("llava", ("clip_vision_model",), ("llama",), _DEFAULTS, _whole))
LLAVA_NEXT = tiles_family(
    Tiles(
        "llava_next",
        ("clip_vision_model",),
        ("llama", "mistral"),
        _DEFAULTS,
        _pieces,
        newline="model.image_newline",
    )
)
LLAVA_ONEVISION = tiles_family(
    Tiles(
        "llava_onevision",
        ("siglip_vision_model",),
        ("qwen2",),
        {
            **_DEFAULTS,
            "image_token_index": 151646,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        _bounded_pieces,
        newline="model.image_newline",
    )
)
