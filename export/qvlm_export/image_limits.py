"""--image-size and --max-image-tokens: smaller images than the processor's files ask for.

Dynamic resolution costs what its largest image costs: rows of the prompt, memory of the vision graph,
the largest shape of an engine's profile. Each kind of image spec has its own number that bounds it:
the area of patches, the longest edge of a split image, the most tiles of a canvas, the resolutions of
anyres.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qvlm.errors import ExportError
from qvlm_runtime.image_spec import (
    AnyresImage,
    CanvasImage,
    ImageSpec,
    PatchImage,
    SplitImage,
    WholeImage,
)
from qvlm_runtime.vision import extremes, input_shapes


@dataclass(frozen=True)
class ImageLimits:
    """image_size: at most as many pixels as a square of that side has; max_image_tokens: rows of image_features
    that one image takes. None: what the processor's files say.
    """

    image_size: int | None = None
    max_image_tokens: int | None = None


NO_LIMITS = ImageLimits()


def limited(spec: ImageSpec, limits: ImageLimits) -> ImageSpec:
    """The spec whose images stay within the limits: larger ones are scaled down, as the processor
    does with its own limits. A limit above the processor's changes nothing.

    ExportError for a spec that has no such limit, or a limit below its smallest images.
    """
    image_size, max_image_tokens = limits.image_size, limits.max_image_tokens
    if image_size is None and max_image_tokens is None:
        return spec
    tile = _tile_of(spec)
    side = tile if image_size is None else image_size
    if isinstance(spec, WholeImage):
        raise ExportError(
            f"--image-size, --max-image-tokens: images of this model have one size, {tile} pixels a "
            "side, and one number of tokens. Leave the option out."
        )
    if side < tile:
        raise ExportError(f"--image-size {side}: expected at least {tile}, a tile of this model.")
    smaller = spec if image_size is None else _sized(spec, image_size)
    while max_image_tokens is not None and extremes(smaller)[1].rows > max_image_tokens:
        found = _one_less(smaller, max_image_tokens)
        if found is None:
            least = extremes(smaller)[1].rows
            raise ExportError(
                f"--max-image-tokens {max_image_tokens}: an image of this model takes {least} "
                "tokens or more. Give a larger number."
            )
        smaller = found
    return smaller


def within_context(spec: ImageSpec, context: int) -> ImageSpec:
    """The spec without patch images of ``context`` rows or more, which no prompt holds: an engine
    need not be built for them. Towers of fixed tiles are left as they are.
    """
    if not isinstance(spec, PatchImage):
        return spec
    most = min(spec.most_pixels, max(1, context - 1) * (spec.patch * spec.merge) ** 2)
    return replace(spec, most_pixels=most, least_pixels=min(spec.least_pixels, most))


def _tile_of(spec: ImageSpec) -> int:
    """The least side of an image, in pixels."""
    if isinstance(spec, PatchImage):
        return spec.patch * spec.merge
    if isinstance(spec, WholeImage):
        return max(input_shapes(spec, extremes(spec)[0])["pixel_values"][2:])
    return spec.tile if isinstance(spec.tile, int) else max(spec.tile)


def _sized(spec: ImageSpec, side: int) -> ImageSpec:
    if isinstance(spec, PatchImage):
        most = min(spec.most_pixels, side**2)
        return replace(spec, most_pixels=most, least_pixels=min(spec.least_pixels, most))
    if isinstance(spec, SplitImage):
        # The edge is rounded up to whole tiles.
        return replace(spec, longest_edge=min(spec.longest_edge, side - side % spec.tile))
    if isinstance(spec, CanvasImage):
        most = min(spec.most, max(1, side**2 // (spec.tile[0] * spec.tile[1])))
        return replace(spec, most=most, least=min(spec.least, most))
    assert isinstance(spec, AnyresImage)
    return replace(spec, resolutions=_within(spec, side**2))


def _within(spec: AnyresImage, area: int) -> tuple[tuple[int, int], ...]:
    """The resolutions of at most that area, or else the smallest one."""
    smallest = min(spec.resolutions, key=lambda one: one[0] * one[1])
    return tuple(one for one in spec.resolutions if one[0] * one[1] <= area) or (smallest,)


def _one_less(spec: ImageSpec, rows: int) -> ImageSpec | None:
    """The next smaller images, or None at the smallest."""
    if isinstance(spec, PatchImage):
        most = max(1, rows) * (spec.patch * spec.merge) ** 2
        if most >= spec.most_pixels:
            return None
        return replace(spec, most_pixels=most, least_pixels=min(spec.least_pixels, most))
    if isinstance(spec, SplitImage):
        longest = spec.longest_edge - (spec.longest_edge - 1) % spec.tile - 1
        return replace(spec, longest_edge=longest) if longest > 0 else None
    if isinstance(spec, CanvasImage):
        most = spec.most - 1
        return replace(spec, most=most, least=min(spec.least, most)) if most else None
    assert isinstance(spec, AnyresImage)
    largest = max(h * w for h, w in spec.resolutions)
    smaller = tuple(one for one in spec.resolutions if one[0] * one[1] < largest)
    return replace(spec, resolutions=smaller) if smaller else None
