"""Proves that every kind of image spec gives the vision graph what transformers' PIL processor of that
family gives its model, bit for bit, on images of odd shapes, with the indices transformers computes
inside its models, and as many rows: python -m pytest tests/runtime/test_image_kinds.py
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qvlm_runtime.errors import ImageError
from qvlm_runtime.image import open_image
from qvlm_runtime.image_spec import (
    AnyresImage,
    CanvasImage,
    ImageSpec,
    PatchImage,
    PixelSpec,
    SplitImage,
    parse_image,
    wrong_values,
)
from qvlm_runtime.vision import extremes, input_shapes, layout, prepare

CLIP = PixelSpec(
    3, 1 / 255, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
HALF = PixelSpec(1, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def noise(height: int, width: int, *channels: int) -> np.ndarray:
    generator = np.random.default_rng(height * 1000 + width)
    return generator.integers(0, 256, (height, width, *channels), dtype=np.uint8)


ODD_IMAGES = {
    "wide": lambda: Image.fromarray(noise(73, 129, 3)),
    "high": lambda: Image.fromarray(noise(301, 77, 3)),
    "square": lambda: Image.fromarray(noise(64, 64, 3)),
    "grey": lambda: Image.fromarray(noise(50, 61)),
    "rgba": lambda: Image.fromarray(noise(45, 47, 4)),
    "palette": lambda: Image.fromarray(noise(33, 90, 3)).quantize(7),
    "one pixel": lambda: Image.fromarray(noise(1, 1, 3)),
    "one row": lambda: Image.fromarray(noise(1, 37, 3)),
    "one column": lambda: Image.fromarray(noise(41, 1, 3)),
    "large": lambda: Image.fromarray(noise(240, 310, 3)),
    "thin": lambda: Image.fromarray(noise(3, 200, 3)),
}
odd = pytest.mark.parametrize("make", ODD_IMAGES.values(), ids=ODD_IMAGES.keys())


def prepared(image: Any, spec: ImageSpec) -> tuple[Any, dict[str, np.ndarray]]:
    """Layout and arrays, after what holds for every kind: shapes as told before, within extremes."""
    found, arrays = prepare(image, spec, "image 1")
    assert found == layout(spec, image.size[1], image.size[0])
    shapes = input_shapes(spec, found)
    assert {name: array.shape for name, array in arrays.items()} == shapes
    least, most = extremes(spec)
    assert least.rows <= found.rows <= most.rows and least.tiles <= found.tiles <= most.tiles
    return found, dict(arrays)


# --- split ---------------------------------------------------------------------------------------

SPLITS = {
    "four tiles": SplitImage(HALF, 4, 32, 128),
    "uneven": SplitImage(HALF, 4, 28, 101),
    "one tile": SplitImage(HALF, 4, 40, 40),
    "never": SplitImage(HALF, 4, 24, 100, split=False),
    "beyond 4096": SplitImage(HALF, 4, 2048, 5000),
}


@odd
@pytest.mark.parametrize("spec", list(SPLITS.values())[:-1], ids=list(SPLITS)[:-1])
def test_split_equals_idefics3_and_smolvlm(make: Any, spec: SplitImage) -> None:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    found, arrays = prepared(make(), spec)
    for processor in (Idefics3ImageProcessorPil, SmolVLMImageProcessorPil):
        expected = processor(
            size={"longest_edge": spec.longest_edge},
            max_image_size={"longest_edge": spec.tile},
            do_image_splitting=spec.split,
            return_row_col_info=True,
        )(make(), return_tensors="np")
        np.testing.assert_array_equal(arrays["pixel_values"], expected["pixel_values"][0])
        assert found.grid == (expected["rows"][0][0], expected["cols"][0][0])


def test_the_longest_edge_of_a_split_image_is_4096() -> None:
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        get_resize_output_image_size,
    )

    from qvlm_runtime.tiles import _fitted

    for height, width in ((1, 3), (5000, 300), (300, 5000), (4097, 4097), (7, 11)):
        image = np.zeros((3, height, width), np.uint8)
        for edge in (1456, 5001):
            spec = SplitImage(HALF, 4, 364, edge)
            assert _fitted(spec, height, width) == get_resize_output_image_size(image, edge)


# --- canvas --------------------------------------------------------------------------------------


@odd
@pytest.mark.parametrize(
    "spec",
    [CanvasImage(CLIP, 4, (32, 32), 1, 12), CanvasImage(CLIP, 4, (28, 36), 2, 5)],
    ids=["internvl", "uneven"],
)
def test_canvas_equals_got_ocr2(make: Any, spec: CanvasImage) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    found, arrays = prepared(make(), spec)
    expected = GotOcr2ImageProcessorPil(
        size={"height": spec.tile[0], "width": spec.tile[1]},
        crop_to_patches=True,
        min_patches=spec.least,
        max_patches=spec.most,
    )(make(), return_tensors="np")
    np.testing.assert_array_equal(arrays["pixel_values"], np.stack(expected["pixel_values"]))
    assert found.tiles == expected["num_patches"][0]


def test_the_grid_of_a_canvas_is_transformers_for_any_size() -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    generator = np.random.default_rng(3)
    for height, width in generator.integers(1, 900, (200, 2)).tolist():
        least, most = sorted(generator.integers(1, 13, 2).tolist())
        spec = CanvasImage(CLIP, 4, (32, 48), least, most)
        columns, lines = get_optimal_tiled_canvas((height, width), (32, 48), least, most)
        expected = (0, 0) if lines * columns == 1 else (lines, columns)
        assert layout(spec, height, width).grid == expected


# --- anyres --------------------------------------------------------------------------------------

RESOLUTIONS = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))
NEXT = AnyresImage(CLIP, 32, 4, RESOLUTIONS)


def packed(spec: AnyresImage, sizes: list[tuple[int, int]], tiles: list[int]) -> list[Any]:
    """LLaVA-NeXT's own rearrangement of numbered rows; -1 is the newline row."""
    from types import SimpleNamespace

    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    side = spec.tile // spec.cells
    vision = SimpleNamespace(image_size=spec.tile, patch_size=side)
    pinpoints = [list(one) for one in spec.resolutions]
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints)
    rows = [torch.arange(n * spec.cells**2).reshape(n, -1, 1) for n in tiles]
    found, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), rows, sizes, "full", image_newline=torch.tensor([-1])
    )
    return [one[:, 0].numpy() for one in found]


@odd
def test_anyres_equals_llava_next(make: Any) -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    image = make()
    found, arrays = prepared(image, NEXT)
    square = {"height": NEXT.tile, "width": NEXT.tile}
    expected = LlavaNextImageProcessorPil(
        size={"shortest_edge": NEXT.tile},
        crop_size=square,
        image_grid_pinpoints=[list(one) for one in RESOLUTIONS],
    )(image, return_tensors="np")
    np.testing.assert_array_equal(arrays["pixel_values"], expected["pixel_values"][0])
    (rows,) = packed(NEXT, [(image.size[1], image.size[0])], [found.tiles])
    index = arrays["feature_index"]
    last = found.tiles * NEXT.cells**2
    np.testing.assert_array_equal(np.where(index == last, -1, index), rows)


@odd
def test_anyres_equals_llava_onevision(make: Any) -> None:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    resolutions = tuple((32 * h, 32 * w) for h in range(1, 4) for w in range(1, 4))
    spec = AnyresImage(CLIP, 32, 4, resolutions)
    _, arrays = prepared(make(), spec)
    expected = LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32}, image_grid_pinpoints=[list(one) for one in resolutions]
    )(make(), return_tensors="np")
    np.testing.assert_array_equal(arrays["pixel_values"], expected["pixel_values"][0])


def test_rows_without_padding_are_llava_nexts_for_any_size() -> None:
    generator = np.random.default_rng(5)
    for height, width in generator.integers(1, 300, (200, 2)).tolist():
        found = layout(NEXT, height, width)
        (rows,) = packed(NEXT, [(height, width)], [found.tiles])
        assert found.rows == len(rows)


# --- patches -------------------------------------------------------------------------------------

PATCHES = {
    "qwen2-vl": PatchImage(CLIP, 14, 2, 2, 56 * 56, 28 * 28 * 40),
    "qwen2.5-vl": PatchImage(CLIP, 14, 2, 2, 56 * 56, 28 * 28 * 200, window=112),
    "qwen3-vl": PatchImage(HALF, 16, 2, 2, 64 * 64, 32 * 32 * 90, position_side=12),
}


@odd
@pytest.mark.parametrize("spec", PATCHES.values(), ids=PATCHES.keys())
def test_patches_equal_qwens(make: Any, spec: PatchImage) -> None:
    from transformers import vision_utils
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    found, arrays = prepared(make(), spec)
    expected = Qwen2VLImageProcessorPil(
        size={"shortest_edge": spec.least_pixels, "longest_edge": spec.most_pixels},
        patch_size=spec.patch,
        merge_size=spec.merge,
        temporal_patch_size=spec.temporal,
        resample=spec.pixels.resample,
        image_mean=list(spec.pixels.mean),
        image_std=list(spec.pixels.std),
    )(make(), return_tensors="np")
    np.testing.assert_array_equal(arrays["pixel_values"], expected["pixel_values"])
    grid = torch.from_numpy(expected["image_grid_thw"])
    assert found.grid == tuple((grid[0, 1:] // spec.merge).tolist())
    positions = vision_utils.get_vision_position_ids(grid, spec.merge)
    np.testing.assert_array_equal(arrays["patch_positions"], positions.numpy())
    if spec.window is not None:
        order, ends = vision_utils.get_vision_window_index(
            grid, spec.merge, spec.window, spec.patch
        )
        np.testing.assert_array_equal(arrays["window_index"], order.numpy())
        np.testing.assert_array_equal(arrays["window_inverse"], torch.argsort(order).numpy())
        starts = 1 + np.flatnonzero(np.diff(arrays["window_segments"]))
        np.testing.assert_array_equal([0, *starts, len(positions)], ends.numpy())
    if spec.position_side is not None:
        index, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, spec.position_side, align_corners=True, spatial_merge_size=spec.merge
        )
        np.testing.assert_array_equal(arrays["position_index"].T, index.numpy())
        np.testing.assert_array_equal(arrays["position_weights"].T, weights.numpy())


def test_a_size_of_patches_is_transformers_for_any_size() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    spec = PATCHES["qwen2.5-vl"]
    generator = np.random.default_rng(7)
    for height, width in generator.integers(1, 2000, (300, 2)).tolist():
        if max(height, width) <= 60 * min(height, width):
            expected = smart_resize(height, width, 28, spec.least_pixels, spec.most_pixels)
            assert layout(spec, height, width).grid == tuple(edge // 28 for edge in expected)


def test_a_sliver_is_refused() -> None:
    with pytest.raises(ImageError, match=r"factor of 201, expected at most 200"):
        layout(PATCHES["qwen2-vl"], 1, 201)
    few = PatchImage(CLIP, 14, 2, 2, 28 * 28, 28 * 28 * 4)
    assert layout(few, 50, 50).rows == 4
    with pytest.raises(ImageError, match="expected at most 3136 pixels"):
        layout(few, 10, 1000)
    for height in (3, 10):  # beyond the ratio, beyond the area: which of several pictures it is
        with pytest.raises(ImageError, match=rf"^image 2: image of 1000 x {height} pixels"):
            prepare(noise(height, 1000, 3), few, "image 2")


# --- all -----------------------------------------------------------------------------------------

EVERY: dict[str, ImageSpec] = {
    **SPLITS,
    "canvas": CanvasImage(CLIP, 4, (32, 32), 1, 12),
    "anyres": NEXT,
    **PATCHES,
}


@pytest.mark.parametrize("spec", EVERY.values(), ids=EVERY.keys())
def test_extremes_hold_for_any_size_and_json_gives_the_spec_back(spec: ImageSpec) -> None:
    assert parse_image(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec
    assert list(wrong_values(spec)) == []
    least, most = extremes(spec)
    generator = np.random.default_rng(11)
    for height, width in (2 ** (generator.random((300, 2)) * 11)).astype(int).tolist():
        if max(height, width) <= 50 * min(height, width):
            found = layout(spec, height, width)
            assert least.rows <= found.rows <= most.rows
            assert least.tiles <= found.tiles <= most.tiles
            shapes = input_shapes(spec, found)
            assert all(math.prod(shape) > 0 for shape in shapes.values())


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        (NEXT, {"resolutions": ()}, "image.resolutions is empty"),
        (NEXT, {"resolutions": ((33, 32),)}, "expected multiples of 32"),
        (NEXT, {"cells": 0}, "image.cells is 0"),
        (EVERY["canvas"], {"least": 13}, "image.least is 13, expected at most image.most, 12"),
        (EVERY["canvas"], {"tile": (32,)}, "image.tile is"),
        (SPLITS["never"], {"split": 1}, "image.split is 1"),
        (PATCHES["qwen2-vl"], {"window": 1.5}, "image.window is 1.5"),
    ],
)
def test_a_value_that_cannot_work_is_named(
    spec: ImageSpec, change: dict[str, Any], message: str
) -> None:
    (wrong,) = wrong_values(dataclasses.replace(spec, **change))
    assert message in wrong


def test_a_file_is_turned_by_its_exif_before_it_is_cut(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.fromarray(noise(60, 120, 3)).save(path, exif=exif)
    found, arrays = prepare(path, SPLITS["four tiles"], "image 1")
    assert found.grid == (4, 2)
    upright = prepare(open_image(path), SPLITS["four tiles"], "image 1")[1]
    np.testing.assert_array_equal(arrays["pixel_values"], upright["pixel_values"])
