"""The kind "anyres" of image_spec.py (LLaVA-NeXT, LLaVA-OneVision): the whole image in one tile, then
the image at the best of several resolutions, cut into tiles; which of the tiles' rows are kept.

1. Best resolution: the most pixels of the image kept, then the fewest wasted.
2. The image is scaled into it and centred; the rest is black.
3. The tiles' rows form one grid of lines; lines or columns that hold padding alone are left out.
4. Behind each line comes the newline row, a row of the model that is no pixel's.

LLaVA-OneVision shrinks a grid of more than 1.1^2 * max tiles by interpolating features, which is no
choice of rows: processor.py leaves out the resolutions of which that could happen.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime.backend import Array
from qvlm_runtime.image import normalised, resized
from qvlm_runtime.image_spec import AnyresImage, Layout
from qvlm_runtime.tiles import Bytes, cut, stacked


def best_resolution(spec: AnyresImage, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the resolution for an image of that size."""

    def worth(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(spec.resolutions, key=worth)  # the first of equals


def _kept(spec: AnyresImage, height: int, width: int) -> tuple[slice, slice]:
    """Lines and columns of rows that hold more than padding, of all tiles' rows as one grid."""
    best = best_resolution(spec, height, width)
    lines, columns = (edge // spec.tile * spec.cells for edge in best)
    if width / height > columns / lines:
        padding = (lines - int(round(height * (columns / width), 7))) // 2
        return slice(padding, lines - padding), slice(0, columns)
    padding = (columns - int(round(width * (lines / height), 7))) // 2
    return slice(0, lines), slice(padding, columns - padding)


def anyres_layout(spec: AnyresImage, height: int, width: int) -> Layout:
    """Tiles, and the rows that are kept, newlines included."""
    lines, columns = (edge // spec.tile for edge in best_resolution(spec, height, width))
    kept = _kept(spec, height, width)
    high, wide = (piece.stop - piece.start for piece in kept)
    return Layout(lines * columns + 1, spec.cells**2 + high * (wide + 1), (lines, columns))


def anyres_extremes(spec: AnyresImage) -> tuple[Layout, Layout]:
    """A sliver of which only the whole image's tile remains, and the largest without padding."""
    grids = [(h // spec.tile, w // spec.tile) for h, w in spec.resolutions]
    fewest = min(grids, key=math.prod)
    whole = spec.cells**2

    def rows(grid: tuple[int, int]) -> int:
        return whole + grid[0] * spec.cells * (grid[1] * spec.cells + 1)

    largest = max(grids, key=rows)
    most = max(math.prod(grid) for grid in grids) + 1
    return Layout(math.prod(fewest) + 1, whole, fewest), Layout(most, rows(largest), largest)


def anyres_shapes(spec: AnyresImage, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shapes of pixel_values and feature_index."""
    tiles = (layout.tiles, 3, spec.tile, spec.tile)
    return {"pixel_values": tiles, "feature_index": (layout.rows,)}


def feature_index(spec: AnyresImage, height: int, width: int) -> NDArray[np.int64]:
    """int64 [M]: rows of the tiles in order; the newline row is behind them all."""
    cells, best = spec.cells, best_resolution(spec, height, width)
    lines, columns = (edge // spec.tile for edge in best)
    tiles = lines * columns + 1
    rows = np.arange(cells**2, tiles * cells**2).reshape(lines, columns, cells, cells)
    grid = rows.transpose(0, 2, 1, 3).reshape(lines * cells, columns * cells)
    kept = grid[_kept(spec, height, width)]
    newlines = np.full((len(kept), 1), tiles * cells**2)
    ended = np.concatenate([kept, newlines], axis=1).reshape(-1)
    return np.concatenate([np.arange(cells**2), ended]).astype(np.int64)


def anyres_arrays(spec: AnyresImage, array: Bytes, where: str) -> dict[str, Array]:
    """uint8 [H, W, 3] to pixel_values float32 [N, 3, tile, tile] and feature_index. ImageError."""
    height, width = array.shape[:2]
    best = best_resolution(spec, height, width)
    if best[1] / width < best[0] / height:
        size = (min(math.ceil(height * (best[1] / width)), best[0]), best[1])
    else:
        size = (best[0], min(math.ceil(width * (best[0] / height)), best[1]))
    canvas = np.zeros((*best, 3), np.uint8)
    top, left = ((best[i] - size[i]) // 2 for i in range(2))
    canvas[top : top + size[0], left : left + size[1]] = resized(array, size, spec.pixels, where)
    tile = (spec.tile, spec.tile)
    tiles = [resized(array, tile, spec.pixels, where), *cut(canvas, tile)]
    return {
        "pixel_values": normalised(stacked(tiles), spec.pixels),
        "feature_index": feature_index(spec, height, width),
    }
