"""What the manifest needs from a checkpoint's tokenizer and processor files: image settings and
special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qvlm.checkpoint import Checkpoint, load_json
from qvlm.errors import ExportError
from qvlm_runtime.image_spec import (
    AnyresImage,
    CanvasImage,
    PatchImage,
    PixelSpec,
    SplitImage,
    WholeImage,
)

_RESAMPLE_LANCZOS = 1
# LLaVA-OneVision shrinks grids of rows from this factor of its limit's side on.
_SHRINKS_BEYOND = 1.1
_SIDES = ("height", "width")
_HALF = (0.5, 0.5, 0.5)
# transformers' defaults of CLIPImageProcessor.
_RESAMPLE_BICUBIC = 3
_RESCALE = 1 / 255
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def _processor(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], str]:
    """The image processor's settings: processor_config.json's part, or preprocessor_config.json."""
    path = checkpoint.directory / "processor_config.json"
    if path.is_file() and isinstance(part := load_json(path).get("image_processor"), dict):
        return part, f"{path}: image_processor"
    path = checkpoint.directory / "preprocessor_config.json"
    if not path.is_file():
        raise ExportError(
            f"{checkpoint.directory}: neither processor_config.json with image_processor "
            "nor preprocessor_config.json. Copy the model's processor files beside its weights."
        )
    return load_json(path), str(path)


def whole_image(checkpoint: Checkpoint, expected: tuple[int, int], rows: int) -> WholeImage:
    """Settings of a CLIP-like processor; ExportError unless every image ends up ``expected``
    (height, width). rows: of image_features that an image gives.
    """
    data, where = _processor(checkpoint)
    resize = _resize(data, where) if data.get("do_resize", True) else None
    crop_size = data.get("crop_size")  # SigLIP's and BLIP's classes have none
    cropped = data.get("do_center_crop", crop_size is not None)
    crop = _size(crop_size, where, "crop_size") if cropped else None
    final = crop or (resize[1:] if resize is not None and resize[0] == "exact" else None)
    if final != expected:
        raise ExportError(
            f"{where}: images become {final or 'of any size'}, the vision tower takes {expected}"
        )
    return WholeImage(_pixels(data, where), rows, resize, crop)


def split_image(checkpoint: Checkpoint, tile: int, rows: int) -> SplitImage:
    """Settings of Idefics3's and SmolVLM's processors; ExportError unless tiles have side ``tile``."""
    data, where = _processor(checkpoint)
    found = _edge(data.get("max_image_size", {"longest_edge": 364}), where, "max_image_size")
    longest = _edge(data.get("size", {"longest_edge": 4 * 364}), where, "size")
    _tile(where, (found, found), (tile, tile))
    _always(data, where, "do_resize")
    split = bool(data.get("do_image_splitting", True))
    pixels = _pixels(data, where, _RESAMPLE_LANCZOS, _HALF, _HALF)
    return SplitImage(pixels, rows, tile, longest, split)


def canvas_image(
    checkpoint: Checkpoint, tile: tuple[int, int], rows: int
) -> CanvasImage | WholeImage:
    """Settings of InternVL's processor (GOT-OCR2's), which cuts into tiles of (height, width)
    ``tile``; ExportError unless it does.
    """
    data, where = _processor(checkpoint)
    found = _size(data.get("size", 384), where, "size")
    _tile(where, found, tile)
    _always(data, where, "do_resize")
    pixels = _pixels(data, where, _RESAMPLE_BICUBIC)
    least, most = int(data.get("min_patches", 1)), int(data.get("max_patches", 12))
    # InternVL's own class asks for tiles whatever the image processor's file says.
    if most == 1:
        return WholeImage(pixels, rows, ("exact", *tile), None)
    return CanvasImage(pixels, rows, tile, least, most)


def anyres_image(
    checkpoint: Checkpoint, tile: int, cells: int, most_tiles: int | None = None
) -> AnyresImage:
    """Settings of LLaVA-NeXT's and LLaVA-OneVision's processors; ExportError unless tiles have side
    ``tile``.

    most_tiles: the number in LLaVA-OneVision's "anyres_max_9". Beyond 1.1^2 times as many it
    interpolates features, which no choice of rows does: resolutions that large are left out, so a
    large image keeps the best of the smaller ones. None: LLaVA-NeXT, which never does.
    """
    data, where = _processor(checkpoint)
    size = data.get("size", tile)
    edge = size["shortest_edge"] if isinstance(size, dict) and "shortest_edge" in size else None
    sides = (edge, edge) if edge is not None else _size(size, where, "size")
    crop = data.get("crop_size") if data.get("do_center_crop", True) else None
    for found in (sides, *([_size(crop, where, "crop_size")] if crop else [])):
        _tile(where, found, (tile, tile))
    points = data.get("image_grid_pinpoints", checkpoint.config.get("image_grid_pinpoints"))
    if not isinstance(points, list) or not points:
        raise ExportError(f"{where}: image_grid_pinpoints is {points!r}, expected sizes")
    resolutions = tuple(
        _size(dict(zip(_SIDES, one, strict=True)), where, "image_grid_pinpoints") for one in points
    )
    if uneven := [one for one in resolutions if one[0] % tile or one[1] % tile]:
        raise ExportError(
            f"{where}: image_grid_pinpoints has {uneven[0]}, expected multiples of {tile}"
        )
    if most_tiles is not None:
        area = _SHRINKS_BEYOND**2 * most_tiles * tile**2
        resolutions = tuple(one for one in resolutions if one[0] * one[1] <= area)
        if not resolutions:
            raise ExportError(
                f"{where}: image_grid_pinpoints has no size of {most_tiles} tiles or fewer, which "
                "vision_aspect_ratio allows. Give it one."
            )
    return AnyresImage(_pixels(data, where, _RESAMPLE_BICUBIC), tile, cells, resolutions)


def patch_image(
    checkpoint: Checkpoint,
    patch: int,
    merge: int,
    window: int | None = None,
    position_side: int | None = None,
    temporal: int = 2,
) -> PatchImage:
    """Settings of Qwen2-VL's processor, which later ones share; ExportError unless its patches are
    the tower's. window and position_side: see PatchImage; temporal: frames of a patch.
    """
    data, where = _processor(checkpoint)
    defaults = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    found = tuple(int(data.get(key, value)) for key, value in defaults.items())
    if found != (patch, merge, temporal):
        raise ExportError(
            f"{where}: {', '.join(defaults)} are {found}, the vision tower takes "
            f"{(patch, merge, temporal)}. Copy the model's own processor files beside its weights."
        )
    _always(data, where, "do_resize")
    size = data.get("size") or {}
    least = data.get("min_pixels") or size.get("shortest_edge") or 56 * 56
    most = data.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
    pixels = _pixels(data, where, _RESAMPLE_BICUBIC)
    return PatchImage(pixels, patch, merge, temporal, int(least), int(most), window, position_side)


def _pixels(
    data: Mapping[str, Any],
    where: str,
    resample: int = _RESAMPLE_BICUBIC,
    mean: Sequence[float] = _MEAN,
    std: Sequence[float] = _STD,
) -> PixelSpec:
    """The keys that all processors share; the arguments are the class's defaults."""
    normalise = data.get("do_normalize", True)
    return PixelSpec(
        resample=int(data.get("resample", resample)),
        rescale=float(data.get("rescale_factor", _RESCALE))
        if data.get("do_rescale", True)
        else None,
        mean=_three(data.get("image_mean", mean), where, "image_mean") if normalise else None,
        std=_three(data.get("image_std", std), where, "image_std") if normalise else None,
        convert_rgb=bool(data.get("do_convert_rgb", True)),
    )


def _edge(value: object, where: str, key: str) -> int:
    if isinstance(value, dict) and isinstance(edge := value.get("longest_edge"), int):
        return edge
    raise ExportError(f"{where}: {key} is {value!r}, expected longest_edge")


def _tile(where: str, found: tuple[int, int], expected: tuple[int, int]) -> None:
    if found != expected:
        raise ExportError(f"{where}: tiles of {found}, the vision tower takes {expected}")


def _always(data: Mapping[str, Any], where: str, key: str) -> None:
    if not data.get(key, True):
        raise ExportError(f"{where}: {key} is false, expected true: sizes would not fit the graph")


def _resize(data: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    size = data.get("size", {"shortest_edge": 224})
    if isinstance(size, dict) and "shortest_edge" in size:
        return ("shortest_edge", int(size["shortest_edge"]))
    if isinstance(size, int):
        return ("shortest_edge", size)
    return ("exact", *_size(size, where, "size"))


def _size(value: object, where: str, key: str) -> tuple[int, int]:
    if isinstance(value, dict) and {"height", "width"} <= set(value):
        return int(value["height"]), int(value["width"])
    if isinstance(value, int):
        return value, value
    raise ExportError(f"{where}: {key} is {value!r}, expected height and width")


def _three(value: Any, where: str, key: str) -> tuple[float, float, float]:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ExportError(f"{where}: {key} is {value!r}, expected three numbers")
    return float(value[0]), float(value[1]), float(value[2])


def eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Ids that end an answer: generation_config.json's, else the text config's; ExportError if
    there is none.
    """
    path = checkpoint.directory / "generation_config.json"
    sources = [
        load_json(path) if path.is_file() else {},
        checkpoint.config.get("text_config", {}),
        checkpoint.config,
    ]
    for source in sources:
        found = source.get("eos_token_id")
        if found is not None:
            return tuple(int(i) for i in (found if isinstance(found, list) else [found]))
    raise ExportError(
        f"{checkpoint.directory}: no eos_token_id in generation_config.json or config.json"
    )


def token_text(checkpoint: Checkpoint, token_id: int) -> str:
    """The text of a special token, from tokenizer.json; ExportError if it has no such id."""
    path = checkpoint.directory / "tokenizer.json"
    for token in load_json(path).get("added_tokens", []):
        if token.get("id") == token_id:
            return str(token["content"])
    raise ExportError(
        f"{path}: no added token with id {token_id}, which config.json names as the image token"
    )


def template_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """Special tokens by the names a chat template reads ("bos_token": "<s>"), from
    tokenizer_config.json.
    """
    path = checkpoint.directory / "tokenizer_config.json"
    found = load_json(path) if path.is_file() else {}
    tokens = {}
    for key, value in sorted(found.items()):
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    return tokens


def chat_template(checkpoint: Checkpoint) -> str:
    """The chat template: chat_template.jinja, or the key of that name in one of three JSON files; ExportError without
    one.
    """
    path = checkpoint.directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = checkpoint.directory / name
        found = load_json(path).get("chat_template") if path.is_file() else None
        if isinstance(found, str):
            return found
    raise ExportError(
        f"{checkpoint.directory}: no chat template (chat_template.jinja). "
        "Copy it from the model's source."
    )
