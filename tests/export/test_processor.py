"""Proves that processor files as transformers writes them become the image spec that treats an image as the
processor does, that files which do not fit the tower are refused, and that limits bound every image:
python -m pytest tests/export/test_processor.py
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qvlm.errors import ExportError
from qvlm_export import processor
from qvlm_export.image_limits import ImageLimits, limited, within_context
from qvlm_runtime.image_spec import ImageSpec
from qvlm_runtime.vision import extremes, layout, prepare

ODD = [Image.fromarray(np.random.default_rng(h).integers(0, 256, (h, w, 3), np.uint8))
       for h, w in ((40, 90), (130, 50), (1, 9))]  # fmt: skip


class Files:
    """What processor.py reads of a checkpoint: a folder and its config."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory, self.config = directory, dict[str, Any]()
        (directory / "preprocessor_config.json").write_text(json.dumps(settings))


Read = Callable[[Any], ImageSpec]


def _class(name: str, module: str) -> Any:
    import importlib

    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


CASES: dict[str, tuple[str, str, dict[str, Any], Read]] = {
    "llava": (
        "CLIPImageProcessorPil",
        "clip.image_processing_pil_clip",
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        lambda c: processor.whole_image(c, (32, 32), 4),
    ),
    "siglip": (
        "SiglipImageProcessorPil",
        "siglip.image_processing_pil_siglip",
        {"size": {"height": 32, "width": 32}},
        lambda c: processor.whole_image(c, (32, 32), 4),
    ),
    "blip_2": (
        "BlipImageProcessorPil",
        "blip.image_processing_pil_blip",
        {"size": {"height": 32, "width": 32}},
        lambda c: processor.whole_image(c, (32, 32), 4),
    ),
    "smolvlm": (
        "SmolVLMImageProcessorPil",
        "smolvlm.image_processing_pil_smolvlm",
        {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}},
        lambda c: processor.split_image(c, 32, 4),
    ),
    "internvl": (
        "GotOcr2ImageProcessorPil",
        "got_ocr2.image_processing_pil_got_ocr2",
        {"size": {"height": 28, "width": 28}, "crop_to_patches": True, "max_patches": 6},
        lambda c: processor.canvas_image(c, (28, 28), 4),
    ),
    "llava_next": (
        "LlavaNextImageProcessorPil",
        "llava_next.image_processing_pil_llava_next",
        {
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
            "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64], [96, 32]],
        },
        lambda c: processor.anyres_image(c, 32, 4),
    ),
    "llava_onevision": (
        "LlavaOnevisionImageProcessorPil",
        "llava_onevision.image_processing_pil_llava_onevision",
        {
            "size": {"height": 32, "width": 32},
            "image_grid_pinpoints": [[32, 32], [32, 64], [64, 64], [96, 64]],
        },
        lambda c: processor.anyres_image(c, 32, 4, most_tiles=9),
    ),
    "qwen2_vl": (
        "Qwen2VLImageProcessorPil",
        "qwen2_vl.image_processing_pil_qwen2_vl",
        {"min_pixels": 28 * 28 * 2, "max_pixels": 28 * 28 * 12},
        lambda c: processor.patch_image(c, 14, 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_saved_processor_and_its_spec_give_the_same_pixels(name: str, tmp_path: Path) -> None:
    cls, module, settings, read = CASES[name]
    theirs = _class(cls, module)(**settings)
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    bare = {key: settings[key] for key in settings}  # defaults are the class's, not the file's
    for number, written in enumerate((saved, bare)):
        if number and name in ("siglip", "llava_onevision"):
            continue  # their classes' means are in every file of theirs
        spec = read(Files(tmp_path, written))
        for image in ODD:
            expected = np.asarray(theirs(image, return_tensors="np")["pixel_values"])
            got = prepare(image, spec, "image 1")[1]["pixel_values"]
            np.testing.assert_array_equal(got, expected.reshape(got.shape))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("smolvlm", {"max_image_size": {"longest_edge": 40}}, r"tiles of \(40, 40\)"),
        ("smolvlm", {"size": {"height": 3, "width": 3}}, "size is"),
        ("smolvlm", {"do_resize": False}, "do_resize is false"),
        ("internvl", {"size": {"height": 30, "width": 28}}, r"tiles of \(30, 28\)"),
        ("llava_next", {"image_grid_pinpoints": [[32, 50]]}, "multiples of 32"),
        ("llava_next", {"image_grid_pinpoints": []}, "image_grid_pinpoints is"),
        ("llava_next", {"crop_size": 24}, r"tiles of \(24, 24\)"),
        ("qwen2_vl", {"patch_size": 16}, r"are \(16, 2, 2\), the vision tower"),
        ("qwen2_vl", {"temporal_patch_size": 1}, r"are \(14, 2, 1\), the vision tower"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, _, settings, read = CASES[name]
    with pytest.raises(ExportError, match=message):
        read(Files(tmp_path, {**settings, **change}))


def test_resolutions_of_which_features_would_be_interpolated_are_left_out(tmp_path: Path) -> None:
    points = [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)]
    files: Any = Files(tmp_path, {"size": 384, "image_grid_pinpoints": points})
    spec = processor.anyres_image(files, 384, 27, most_tiles=9)
    tiles = {h * w // 384**2 for h, w in spec.resolutions}
    assert max(tiles) == 10 and tiles == {h * w for h in range(1, 7) for w in range(1, 7)} & set(
        range(11)
    )
    # transformers interpolates where sqrt(rows / (9 * 27^2)) > 1.1.
    assert (10 / 9) ** 0.5 < 1.1 < (12 / 9) ** 0.5


@pytest.mark.parametrize("name", ["smolvlm", "internvl", "llava_next", "qwen2_vl"])
def test_limits_bound_every_image(name: str, tmp_path: Path) -> None:
    _, _, settings, read = CASES[name]
    spec = read(Files(tmp_path, settings))
    assert limited(spec, ImageLimits()) == spec
    assert limited(spec, ImageLimits(10**6, 10**6)) == spec
    most = extremes(spec)[1].rows
    generator = np.random.default_rng(4)
    taken = 0
    for tokens in {most - 1, 2 * most // 3, most // 2}:
        try:
            smaller = limited(spec, ImageLimits(max_image_tokens=tokens))
        except ExportError as error:
            assert "Give a larger number" in str(error)
            continue
        taken += 1
        assert type(smaller) is type(spec) and extremes(smaller)[1].rows <= tokens
        for height, width in generator.integers(90, 300, (50, 2)).tolist():
            assert layout(smaller, height, width).rows <= tokens
    assert taken, "no limit was accepted"
    narrow = limited(spec, ImageLimits(image_size=48))
    assert extremes(narrow)[1].rows < most
    with pytest.raises(ExportError, match="or more"):
        limited(spec, ImageLimits(max_image_tokens=0))
    with pytest.raises(ExportError, match="--image-size 8: expected at least"):
        limited(spec, ImageLimits(image_size=8))


def test_a_limit_at_the_lower_one_takes_every_image(tmp_path: Path) -> None:
    """Qwen3-VL's own numbers: both limits meet, and rounding up would pass the upper one."""
    _, _, settings, read = CASES["qwen2_vl"]
    spec = replace(read(Files(tmp_path, settings)), patch=16, merge=2, least_pixels=65536)
    narrow = limited(replace(spec, most_pixels=16777216), ImageLimits(max_image_tokens=64))
    sides = range(40, 700, 20)
    rows = [layout(narrow, height, width).rows for height in sides for width in sides]
    assert max(rows) <= 64


def test_an_engine_is_not_built_for_images_no_prompt_holds(tmp_path: Path) -> None:
    _, _, settings, read = CASES["qwen2_vl"]
    spec = replace(read(Files(tmp_path, settings)), most_pixels=12845056)
    assert extremes(within_context(spec, 4096))[1].rows == 4095
    assert within_context(spec, 10**6) == spec


def test_a_tower_of_one_size_takes_no_limit(tmp_path: Path) -> None:
    _, _, settings, read = CASES["llava"]
    with pytest.raises(ExportError, match="have one size, 32 pixels a side"):
        limited(read(Files(tmp_path, settings)), ImageLimits(max_image_tokens=100))
