"""The kind "patches" of image_spec.py (Qwen2-VL, Qwen2.5-VL, Qwen3-VL): an image at its own aspect
ratio as a list of patches, and what the vision graph must know of where they stood.

Patches come in the order of the groups of merge x merge that become one row of features: group by
group, line by line; within a group line by line. Every index is of that order.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime.backend import Array
from qvlm_runtime.errors import ImageError
from qvlm_runtime.image import normalised, resized
from qvlm_runtime.image_spec import Layout, PatchImage

# transformers refuses images beyond this ratio of edges.
_LARGEST_RATIO = 200


def _fitted(spec: PatchImage, height: int, width: int) -> tuple[int, int]:
    """Multiples of patch * merge of about the image's ratio and an area within the limits."""
    unit = spec.patch * spec.merge
    ratio = max(height, width) / min(height, width)
    if ratio > _LARGEST_RATIO:
        raise ImageError(
            f"image of {width} x {height} pixels: its edges differ by a factor of {ratio:.0f}, "
            f"expected at most {_LARGEST_RATIO}. Crop the image first."
        )
    high, wide = round(height / unit) * unit, round(width / unit) * unit
    if high * wide < spec.least_pixels:
        scale = math.sqrt(spec.least_pixels / (height * width))
        high = math.ceil(height * scale / unit) * unit
        wide = math.ceil(width * scale / unit) * unit
    # Also behind the other branch: where the limits are close, rounding up can pass the upper one.
    if high * wide > spec.most_pixels:
        scale = math.sqrt(height * width / spec.most_pixels)
        high = max(unit, math.floor(height / scale / unit) * unit)
        wide = max(unit, math.floor(width / scale / unit) * unit)
    if high * wide > spec.most_pixels:  # a sliver, whose short edge cannot get shorter
        raise ImageError(
            f"image of {width} x {height} pixels becomes {wide} x {high}, expected at most "
            f"{spec.most_pixels} pixels. Crop the image first."
        )
    return high, wide


def patch_layout(spec: PatchImage, height: int, width: int) -> Layout:
    """The grid of rows for an image of that size. ImageError for a sliver."""
    high, wide = (edge // (spec.patch * spec.merge) for edge in _fitted(spec, height, width))
    return Layout(1, high * wide, (high, wide))


def patch_extremes(spec: PatchImage) -> tuple[Layout, Layout]:
    """One row, which no image goes below, and as many as most_pixels hold."""
    most = max(1, spec.most_pixels // (spec.patch * spec.merge) ** 2)
    return Layout(1, 1, (1, 1)), Layout(1, most, (1, most))


def patch_shapes(spec: PatchImage, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shapes of the vision graph's inputs."""
    patches, groups = layout.rows * spec.merge**2, layout.rows
    shapes: dict[str, tuple[int, ...]] = {
        "pixel_values": (patches, 3 * spec.temporal * spec.patch**2),
        "patch_positions": (patches, 2),
    }
    if spec.window is not None:
        shapes |= {"window_index": (groups,), "window_inverse": (groups,)}
        shapes["window_segments"] = (patches,)
    if spec.position_side is not None:
        shapes |= {"position_index": (4, patches), "position_weights": (4, patches)}
    return shapes


def patch_arrays(spec: PatchImage, array: NDArray[np.uint8], where: str) -> dict[str, Array]:
    """uint8 [H, W, 3] to the vision graph's inputs. ImageError."""
    size = _fitted(spec, *array.shape[:2])
    pixels = normalised(np.moveaxis(resized(array, size, spec.pixels, where), -1, 0), spec.pixels)
    lines, columns = (edge // spec.patch for edge in size)
    positions = _patch_positions(spec, lines, columns)
    found: dict[str, Array] = {
        "pixel_values": _flattened(spec, pixels),
        "patch_positions": positions,
    }
    if spec.window is not None:
        found |= _windows(spec, lines // spec.merge, columns // spec.merge)
    if spec.position_side is not None:
        found |= _corners(spec.position_side, positions, (lines, columns))
    return found


def _flattened(spec: PatchImage, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 [3, H, W] to [P, 3 * temporal * patch * patch], one image repeated in time."""
    merge, patch = spec.merge, spec.patch
    _, height, width = pixels.shape
    unit = patch * merge
    cut = pixels.reshape(3, height // unit, merge, patch, width // unit, merge, patch)
    patches = cut.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    repeated = np.repeat(patches, spec.temporal, axis=5)
    return repeated.reshape(height * width // patch**2, -1)


def _patch_positions(spec: PatchImage, lines: int, columns: int) -> NDArray[np.int64]:
    """int64 [P, 2]: line and column of each patch."""
    merge = spec.merge
    grid = np.indices((lines, columns), np.int64)
    groups = grid.reshape(2, lines // merge, merge, columns // merge, merge)
    return np.ascontiguousarray(groups.transpose(1, 3, 2, 4, 0).reshape(-1, 2))


def _windows(spec: PatchImage, lines: int, columns: int) -> dict[str, Array]:
    """Groups window by window, its inverse, and each patch's window in that order."""
    assert spec.window is not None
    side = spec.window // spec.merge // spec.patch
    line, column = np.indices((lines, columns))
    window = (line // side * math.ceil(columns / side) + column // side).reshape(-1)
    order = np.argsort(window, kind="stable").astype(np.int64)
    return {
        "window_index": order,
        "window_inverse": np.argsort(order).astype(np.int64),
        "window_segments": np.repeat(window[order], spec.merge**2).astype(np.int64),
    }


def _corners(side: int, positions: NDArray[np.int64], size: tuple[int, int]) -> dict[str, Array]:
    """Where each patch falls in a table of side x side whose corners are the image's: the four
    entries around it and their bilinear shares, in float32 as torch computes them.
    """
    taps, shares = [], []
    for axis in range(2):
        steps = np.float32(max(size[axis] - 1, 1))
        place = positions[:, axis].astype(np.float32) * np.float32(side - 1) / steps
        low = np.floor(place)
        taps.append([np.minimum(low.astype(np.int64) + i, side - 1) for i in range(2)])
        away = [np.abs(place - low - np.float32(i)) for i in range(2)]
        shares.append([np.maximum(np.float32(1) - one, np.float32(0)) for one in away])
    pairs = [(i, j) for i in range(2) for j in range(2)]
    return {
        "position_index": np.stack([taps[0][i] * side + taps[1][j] for i, j in pairs]),
        "position_weights": np.stack([shares[0][i] * shares[1][j] for i, j in pairs]),
    }
