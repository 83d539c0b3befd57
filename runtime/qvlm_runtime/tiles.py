"""Images cut into tiles of one size, a smaller picture of the whole behind them: the kinds "split" and
"canvas" of image_spec.py. The arithmetic of sizes is transformers 5.23's, step by step, for a tile
more or less is another prompt.

split (Idefics3, SmolVLM)
    1. The longest edge becomes ``longest_edge``, the other one follows, made even.
    2. Both edges become the next multiple of the tile; beyond one tile the image is cut there.
    3. The last tile is the image of step 2, squeezed into one tile.
canvas (GOT-OCR2, InternVL)
    1. Of the grids of least to most tiles, that of the nearest aspect ratio; of several, the later
       one while the image has more than half of its pixels.
    2. The image is stretched onto that grid and cut.
    3. The last tile, unless there is only one, is the image stretched onto one tile.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime.backend import Array
from qvlm_runtime.image import normalised, resized
from qvlm_runtime.image_spec import CanvasImage, Layout, SplitImage

Bytes = NDArray[np.uint8]
# No image of Idefics3 gets a longer edge, whatever its settings say.
_LONGEST = 4096


def cut(array: Bytes, tile: tuple[int, int]) -> list[Bytes]:
    """Tiles [h, w, 3] of [H, W, 3], line by line."""
    height, width = tile
    lines, columns = array.shape[0] // height, array.shape[1] // width
    return [
        array[line * height : (line + 1) * height, column * width : (column + 1) * width]
        for line in range(lines)
        for column in range(columns)
    ]


def stacked(tiles: list[Bytes]) -> Bytes:
    """Tiles [h, w, 3] as uint8 [N, 3, h, w]."""
    return np.stack([np.moveaxis(tile, -1, 0) for tile in tiles])


def _counted(rows: int, lines: int, columns: int) -> Layout:
    """The grid and the tile behind it; one tile alone is not a grid."""
    if lines * columns == 1:
        return Layout(1, rows, (0, 0))
    tiles = lines * columns + 1
    return Layout(tiles, tiles * rows, (lines, columns))


# --- split ---------------------------------------------------------------------------------------


def _fitted(spec: SplitImage, height: int, width: int) -> tuple[int, int]:
    """Size with the longest edge at ``longest_edge``, at most 4096."""
    edge, ratio = spec.longest_edge, width / height
    if width >= height:
        height, width = int(edge / ratio), edge
        height += height % 2
    else:
        height, width = edge, int(edge * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > _LONGEST:
        height, width = int(_LONGEST / ratio), _LONGEST
    elif height > width and height > _LONGEST:
        height, width = _LONGEST, int(_LONGEST * ratio)
    return max(height, 1), max(width, 1)


def _whole_tiles(spec: SplitImage, height: int, width: int) -> tuple[int, int]:
    """Size as the next multiples of the tile."""
    ratio = width / height
    if width >= height:
        width = _up(width, spec.tile)
        height = _up(int(width / ratio), spec.tile)
    else:
        height = _up(height, spec.tile)
        width = _up(int(height * ratio), spec.tile)
    return height, width


def _up(size: int, tile: int) -> int:
    return math.ceil(size / tile) * tile


def split_layout(spec: SplitImage, height: int, width: int) -> Layout:
    """Lines and columns of tiles for an image of that size."""
    if not spec.split:
        return _counted(spec.rows, 1, 1)
    height, width = _whole_tiles(spec, *_fitted(spec, height, width))
    return _counted(spec.rows, height // spec.tile, width // spec.tile)


def split_extremes(spec: SplitImage) -> tuple[Layout, Layout]:
    """A line of tiles, and a square of them."""
    side = _up(min(spec.longest_edge, _LONGEST), spec.tile) // spec.tile if spec.split else 1
    return _counted(spec.rows, 1, side), _counted(spec.rows, side, side)


def split_shapes(spec: SplitImage, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shape of pixel_values."""
    return {"pixel_values": (layout.tiles, 3, spec.tile, spec.tile)}


def split_arrays(spec: SplitImage, array: Bytes, where: str) -> dict[str, Array]:
    """uint8 [H, W, 3] to pixel_values float32 [N, 3, tile, tile]. ImageError."""
    tile = (spec.tile, spec.tile)
    array = resized(array, _fitted(spec, *array.shape[:2]), spec.pixels, where)
    if not spec.split:
        tiles = [resized(array, tile, spec.pixels, where)]
    else:
        array = resized(array, _whole_tiles(spec, *array.shape[:2]), spec.pixels, where)
        tiles = cut(array, tile)
        if len(tiles) > 1:
            tiles.append(resized(array, tile, spec.pixels, where))
    return {"pixel_values": normalised(stacked(tiles), spec.pixels)}


# --- canvas --------------------------------------------------------------------------------------


def _grids(spec: CanvasImage) -> list[tuple[int, int]]:
    """(lines, columns), fewer tiles first, among equals fewer columns first."""
    sides = range(1, spec.most + 1)
    grids = [(lines, columns) for columns in sides for lines in sides]
    return sorted(
        (grid for grid in grids if spec.least <= math.prod(grid) <= spec.most), key=math.prod
    )


def canvas_layout(spec: CanvasImage, height: int, width: int) -> Layout:
    """The grid for an image of that size."""
    nearest, best = math.inf, (1, 1)
    for lines, columns in _grids(spec):
        distance = abs(width / height - columns / lines)
        pixels = spec.tile[0] * spec.tile[1] * lines * columns
        if distance < nearest or (distance == nearest and height * width > 0.5 * pixels):
            nearest, best = distance, (lines, columns)
    return _counted(spec.rows, *best)


def canvas_extremes(spec: CanvasImage) -> tuple[Layout, Layout]:
    """The grids of the fewest and of the most tiles."""
    grids = _grids(spec)
    return _counted(spec.rows, *grids[0]), _counted(spec.rows, *grids[-1])


def canvas_shapes(spec: CanvasImage, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shape of pixel_values."""
    return {"pixel_values": (layout.tiles, 3, *spec.tile)}


def canvas_arrays(spec: CanvasImage, array: Bytes, where: str) -> dict[str, Array]:
    """uint8 [H, W, 3] to pixel_values float32 [N, 3, h, w]. ImageError."""
    lines, columns = canvas_layout(spec, *array.shape[:2]).grid
    whole = resized(array, spec.tile, spec.pixels, where)
    tiles = [whole]
    if lines:
        size = (lines * spec.tile[0], columns * spec.tile[1])
        tiles = [*cut(resized(array, size, spec.pixels, where), spec.tile), whole]
    return {"pixel_values": normalised(stacked(tiles), spec.pixels)}
