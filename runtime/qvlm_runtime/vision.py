"""An image to the vision graph's inputs, by the kind of the manifest's image spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qvlm_runtime.anyres import anyres_arrays, anyres_extremes, anyres_layout, anyres_shapes
from qvlm_runtime.backend import Array
from qvlm_runtime.errors import ImageError
from qvlm_runtime.image import rgb, whole_arrays, whole_extremes, whole_layout, whole_shapes
from qvlm_runtime.image_spec import (
    AnyresImage,
    CanvasImage,
    ImageSpec,
    Layout,
    PatchImage,
    SplitImage,
    WholeImage,
)
from qvlm_runtime.patches import patch_arrays, patch_extremes, patch_layout, patch_shapes
from qvlm_runtime.tiles import (
    canvas_arrays,
    canvas_extremes,
    canvas_layout,
    canvas_shapes,
    split_arrays,
    split_extremes,
    split_layout,
    split_shapes,
)


@dataclass(frozen=True)
class _Kind:
    """layout(spec, height, width) is arithmetic alone; extremes(spec) are the layouts of the fewest
    and of the most rows; shapes(spec, layout) are those of the vision graph's inputs by name;
    arrays(spec, uint8 [H, W, 3], where) gives these inputs.
    """

    layout: Callable[[Any, int, int], Layout]
    extremes: Callable[[Any], tuple[Layout, Layout]]
    shapes: Callable[[Any, Layout], dict[str, tuple[int, ...]]]
    arrays: Callable[[Any, Any, str], dict[str, Array]]


_KINDS: dict[type[Any], _Kind] = {
    WholeImage: _Kind(whole_layout, whole_extremes, whole_shapes, whole_arrays),
    SplitImage: _Kind(split_layout, split_extremes, split_shapes, split_arrays),
    CanvasImage: _Kind(canvas_layout, canvas_extremes, canvas_shapes, canvas_arrays),
    AnyresImage: _Kind(anyres_layout, anyres_extremes, anyres_shapes, anyres_arrays),
    PatchImage: _Kind(patch_layout, patch_extremes, patch_shapes, patch_arrays),
}


def layout(spec: ImageSpec, height: int, width: int) -> Layout:
    """What an image of that size becomes. ImageError for a size the model does not take."""
    return _KINDS[type(spec)].layout(spec, height, width)


def extremes(spec: ImageSpec) -> tuple[Layout, Layout]:
    """The layouts that take the fewest and the most rows of all image sizes."""
    return _KINDS[type(spec)].extremes(spec)


def input_shapes(spec: ImageSpec, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shapes of the vision graph's inputs by name, for an image of that layout."""
    return _KINDS[type(spec)].shapes(spec, layout)


def prepare(source: Any, spec: ImageSpec, where: str) -> tuple[Layout, Mapping[str, Array]]:
    """One image (anything ``open_image`` takes): its layout and the vision graph's inputs, float32
    and int64. ImageError.
    """
    array = rgb(source, spec.pixels, where)
    try:
        found = layout(spec, array.shape[0], array.shape[1])
    except ImageError as error:  # layouts know sizes only
        raise ImageError(f"{where}: {error}") from error
    return found, _KINDS[type(spec)].arrays(spec, array, where)
