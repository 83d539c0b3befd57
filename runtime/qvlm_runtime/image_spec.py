"""How an image becomes the inputs of the vision graph, as data: one frozen dataclass for each way.

    whole     one tile of fixed size (LLaVA, BLIP-2, SigLIP towers)
    split     the image at a multiple of the tile, cut, and the whole image as the last tile
              (Idefics3, SmolVLM)
    canvas    the grid of tiles nearest in aspect ratio, cut, and a thumbnail as the last tile
              (InternVL, GOT-OCR2)
    anyres    the whole image as the first tile, then the image padded into the best of several
              resolutions and cut; rows of padding are left out, each line ends with the newline row
              (LLaVA-NeXT, LLaVA-OneVision)
    patches   the image at its own aspect ratio as a list of patches (Qwen2-VL and later)

The manifest holds one of them; tiles.py, anyres.py and patches.py carry them out; vision.py chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class PixelSpec:
    """Arithmetic on pixels, the same in every kind: resize with ``resample``, rescale, normalise.

    resample is Pillow's number; rescale and mean/std None leave their step out.
    """

    resample: int
    rescale: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    convert_rgb: bool = True


@dataclass(frozen=True)
class WholeImage:
    """One tile: resized, then cropped, each optional.

    rows: rows of image_features an image gives. resize is ("shortest_edge", n), ("exact", h, w) or
    None; crop is a centre crop (h, w) or None.
    """

    pixels: PixelSpec
    rows: int
    resize: tuple[Any, ...] | None
    crop: tuple[int, int] | None
    kind: str = "whole"


@dataclass(frozen=True)
class SplitImage:
    """Idefics3's tiles of side ``tile``, ``rows`` rows of image_features each.

    The longest edge becomes ``longest_edge`` (also of smaller images), then both edges the next
    multiple of ``tile``. ``split`` False: the image becomes one tile.
    """

    pixels: PixelSpec
    rows: int
    tile: int
    longest_edge: int
    split: bool = True
    kind: str = "split"


@dataclass(frozen=True)
class CanvasImage:
    """InternVL's tiles of (h, w) ``tile``, ``rows`` rows each: from ``least`` to ``most`` of them, and
    a thumbnail behind them if they are more than one.
    """

    pixels: PixelSpec
    rows: int
    tile: tuple[int, int]
    least: int
    most: int
    kind: str = "canvas"


@dataclass(frozen=True)
class AnyresImage:
    """LLaVA-NeXT's tiles of side ``tile``, cells x cells rows each; the resolutions (h, w), multiples
    of the tile, that an image may be padded into.
    """

    pixels: PixelSpec
    tile: int
    cells: int
    resolutions: tuple[tuple[int, int], ...]
    kind: str = "anyres"


@dataclass(frozen=True)
class PatchImage:
    """Qwen2-VL's patches of side ``patch``: merge x merge of them become one row of image_features.

    Both edges become multiples of patch * merge, the area lies between least_pixels and most_pixels;
    each patch is repeated ``temporal`` times. window: side in pixels of the windows that attention
    is limited to (Qwen2.5-VL). position_side: side of the learned table of positions that is
    interpolated for the image's grid (Qwen3-VL).
    """

    pixels: PixelSpec
    patch: int
    merge: int
    temporal: int
    least_pixels: int
    most_pixels: int
    window: int | None = None
    position_side: int | None = None
    kind: str = "patches"


ImageSpec = WholeImage | SplitImage | CanvasImage | AnyresImage | PatchImage
KINDS: dict[str, type[ImageSpec]] = {
    "whole": WholeImage,
    "split": SplitImage,
    "canvas": CanvasImage,
    "anyres": AnyresImage,
    "patches": PatchImage,
}


@dataclass(frozen=True)
class Layout:
    """What an image of some size becomes.

    tiles: tiles or, for patches, 1. rows: rows of image_features. grid: lines and columns of tiles
    the image is cut into, (0, 0) if it is not cut; for patches, of the rows of image_features.
    """

    tiles: int
    rows: int
    grid: tuple[int, int]


def parse_image(data: Mapping[str, Any]) -> ImageSpec:
    """From the manifest's JSON. KeyError or TypeError for an unknown kind or key."""
    values = {key: _tuples(value) for key, value in data.items()}
    values["pixels"] = PixelSpec(**{k: _tuples(v) for k, v in data["pixels"].items()})
    return KINDS[data["kind"]](**values)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def wrong_values(spec: ImageSpec) -> Iterator[str]:
    """Values that no kind can work with, named with their key."""
    yield from _wrong_types(spec, "image")
    yield from _wrong_types(spec.pixels, "image.pixels")
    if isinstance(spec, CanvasImage) and not spec.least <= spec.most:
        yield f"image.least is {spec.least!r}, expected at most image.most, {spec.most!r}"
    if isinstance(spec, AnyresImage):
        if not spec.resolutions:
            yield "image.resolutions is empty, expected sizes"
        for size in spec.resolutions:
            if not _positive(size, "") or any(edge % spec.tile for edge in size):
                yield f"image.resolutions has {size!r}, expected multiples of {spec.tile}"


def _wrong_types(part: ImageSpec | PixelSpec, prefix: str) -> Iterator[str]:
    for field in fields(part):
        value, kind = getattr(part, field.name), str(field.type)
        if kind.startswith("int") and not (value is None and "None" in kind):
            least = 0 if field.name == "resample" else 1
            if type(value) is not int or value < least:
                yield f"{prefix}.{field.name} is {value!r}, expected an integer from {least}"
        if kind == "bool" and not isinstance(value, bool):
            yield f"{prefix}.{field.name} is {value!r}, expected true or false"
        if kind.startswith("tuple[int") and not _positive(value, kind):
            yield f"{prefix}.{field.name} is {value!r}, expected two positive integers"


def _positive(value: Any, kind: str) -> bool:
    if value is None:
        return "None" in kind
    pair = isinstance(value, tuple) and len(value) == 2
    return pair and all(type(edge) is int and edge > 0 for edge in value)
