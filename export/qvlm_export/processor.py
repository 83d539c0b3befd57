"""What the manifest needs from a checkpoint's tokenizer and processor files: image settings and
special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvlm.checkpoint import Checkpoint, load_json
from qvlm.errors import ExportError
from qvlm_runtime.image_spec import PatchImage, PixelSpec, WholeImage

# transformers' defaults of CLIPImageProcessor.
_RESAMPLE_BICUBIC = 3
_RESCALE = 1 / 255
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# And of Qwen2VLImageProcessor.
_LEAST_PIXELS, _MOST_PIXELS = 56 * 56, 28 * 28 * 1280


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
    crop = (
        _size(data.get("crop_size"), where, "crop_size")
        if data.get("do_center_crop", True)
        else None
    )
    final = crop or (resize[1:] if resize is not None and resize[0] == "exact" else None)
    if final != expected:
        raise ExportError(
            f"{where}: images become {final or 'of any size'}, the vision tower takes {expected}"
        )
    return WholeImage(_pixels(data, where), rows, resize, crop)


def patch_image(
    checkpoint: Checkpoint,
    cut: tuple[int, int, int],
    window: int | None = None,
    position_side: int | None = None,
) -> PatchImage:
    """Settings of a processor that cuts an image of any size into patches; ExportError unless they are
    the vision tower's ``cut``: a patch's side, patches merged on a side, frames.

    The area is limited by ``size`` (least and largest under the names of two edges), or by
    min_pixels and max_pixels. window and position_side: see PatchImage.
    """
    data, where = _processor(checkpoint)
    keys = ("patch_size", "merge_size", "temporal_patch_size")
    found = tuple(int(data.get(key, one)) for key, one in zip(keys, cut, strict=True))
    if found != cut or not data.get("do_resize", True):
        raise ExportError(
            f"{where}: {', '.join(keys)} are {found}, the vision tower takes {cut} of a resized "
            "image. Copy the model's own processor files beside its weights."
        )
    size = data.get("size") or {}
    least = data.get("min_pixels") or size.get("shortest_edge") or _LEAST_PIXELS
    most = data.get("max_pixels") or size.get("longest_edge") or _MOST_PIXELS
    pixels = _pixels(data, where)
    return PatchImage(pixels, *cut, int(least), int(most), window, position_side)


def _pixels(data: Mapping[str, Any], where: str) -> PixelSpec:
    normalise = data.get("do_normalize", True)
    return PixelSpec(
        resample=int(data.get("resample", _RESAMPLE_BICUBIC)),
        rescale=float(data.get("rescale_factor", _RESCALE))
        if data.get("do_rescale", True)
        else None,
        mean=_three(data.get("image_mean", _MEAN), where, "image_mean") if normalise else None,
        std=_three(data.get("image_std", _STD), where, "image_std") if normalise else None,
        convert_rgb=bool(data.get("do_convert_rgb", True)),
    )


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


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The chat template: chat_template.jinja, or the key of that name in one of three JSON files;
    None without one.
    """
    path = checkpoint.directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = checkpoint.directory / name
        found = load_json(path).get("chat_template") if path.is_file() else None
        if isinstance(found, str):
            return found
    return None
