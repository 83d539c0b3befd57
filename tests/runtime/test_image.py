"""Proves that preprocessing equals transformers' PIL image processor bit for bit on odd images, and
that an unreadable image is one clear line: python -m pytest tests/runtime/test_image.py
"""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvlm_runtime.errors import ImageError
from qvlm_runtime.image import open_image
from qvlm_runtime.image_spec import PixelSpec, WholeImage
from qvlm_runtime.vision import prepare

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
RESCALE = 1 / 255


def noise(height: int, width: int, *channels: int) -> np.ndarray:
    generator = np.random.default_rng(height * 1000 + width)
    return generator.integers(0, 256, (height, width, *channels), dtype=np.uint8)


def palette_with_transparency() -> Image.Image:
    image = Image.fromarray(noise(40, 31, 3)).quantize(16)
    data = io.BytesIO()
    image.save(data, "PNG", transparency=3)
    return Image.open(data)


ODD_IMAGES = {
    "rgb": lambda: Image.fromarray(noise(73, 129, 3)),
    "upright": lambda: Image.fromarray(noise(300, 77, 3)),
    "grey": lambda: Image.fromarray(noise(50, 60)),
    "grey with alpha": lambda: Image.fromarray(noise(50, 60, 2), "LA"),
    "rgba": lambda: Image.fromarray(noise(45, 45, 4)),
    "palette": lambda: Image.fromarray(noise(33, 90, 3)).quantize(7),
    "palette with transparency": palette_with_transparency,
    "one bit": lambda: Image.fromarray(noise(20, 20) > 99),
    "cmyk": lambda: Image.fromarray(noise(21, 34, 4), "CMYK"),
    "16 bit": lambda: Image.fromarray(noise(30, 30).astype(np.uint16) * 257),
    "float": lambda: Image.fromarray(noise(30, 30).astype(np.float32)),
    "one pixel": lambda: Image.fromarray(noise(1, 1, 3)),
    "one row": lambda: Image.fromarray(noise(1, 37, 3)),
    "one column": lambda: Image.fromarray(noise(41, 1, 3)),
    "already the size": lambda: Image.fromarray(noise(32, 32, 3)),
}


def whole(resize, crop, resample, rescale, mean, std, convert_rgb=True) -> WholeImage:
    return WholeImage(PixelSpec(resample, rescale, mean, std, convert_rgb), 1, resize, crop)


def pixel_values(images, spec: WholeImage) -> np.ndarray:
    """[N, 3, H, W] of what the vision graph is given one by one."""
    return np.concatenate([prepare(one, spec, "image 1")[1]["pixel_values"] for one in images])


SPECS = {
    "clip": whole(("shortest_edge", 32), (32, 32), 3, RESCALE, MEAN, STD),
    "exact": whole(("exact", 24, 40), None, 3, RESCALE, MEAN, STD),
    "bilinear": whole(("exact", 24, 40), None, 2, RESCALE, MEAN, STD),
    "lanczos": whole(("shortest_edge", 29), (30, 31), 1, RESCALE, MEAN, STD),
    "crop only": whole(None, (36, 35), 3, RESCALE, MEAN, STD),
    "no rescale": whole(("exact", 16, 16), None, 3, None, MEAN, STD),
    "no normalise": whole(("exact", 16, 16), None, 3, RESCALE, None, None),
}


def oracle(image: Image.Image, spec: WholeImage) -> np.ndarray:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    options: dict = {"do_resize": False, "do_center_crop": False}
    if spec.resize is not None:
        edge = spec.resize[0] == "shortest_edge"
        size = {"shortest_edge": spec.resize[1]}
        if not edge:
            size = {"height": spec.resize[1], "width": spec.resize[2]}
        options |= {"do_resize": True, "size": size, "resample": spec.pixels.resample}
    if spec.crop is not None:
        crop = {"height": spec.crop[0], "width": spec.crop[1]}
        options |= {"do_center_crop": True, "crop_size": crop}
    options |= {
        "do_rescale": spec.pixels.rescale is not None,
        "do_normalize": spec.pixels.mean is not None,
    }
    if spec.pixels.rescale is not None:
        options["rescale_factor"] = spec.pixels.rescale
    if spec.pixels.mean is not None:
        options |= {"image_mean": list(spec.pixels.mean), "image_std": list(spec.pixels.std)}
    return CLIPImageProcessorPil(**options)(image, return_tensors="np")["pixel_values"]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("make", ODD_IMAGES.values(), ids=ODD_IMAGES.keys())
def test_equal_to_transformers_bit_for_bit(make, spec: WholeImage) -> None:
    expected = oracle(make(), spec)
    got = pixel_values([make()], spec)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize("make", ODD_IMAGES.values(), ids=ODD_IMAGES.keys())
def test_equal_to_blips_bit_for_bit(make) -> None:
    """BLIP-2's processor: a square, whatever the picture's shape."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    expected = BlipImageProcessorPil(size={"height": 28, "width": 28})(make(), return_tensors="np")
    got = pixel_values([make()], whole(("exact", 28, 28), None, 3, RESCALE, MEAN, STD))
    np.testing.assert_array_equal(got, expected["pixel_values"])


def test_a_path_is_opened_as_transformers_opens_it(tmp_path: Path) -> None:
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned, clear = tmp_path / "turned.jpg", tmp_path / "clear.png"
    Image.fromarray(noise(30, 50, 3)).save(turned, exif=exif)
    Image.fromarray(noise(30, 50, 4)).save(clear)
    for path in (turned, clear):
        expected = oracle(load_image(str(path)), SPECS["clip"])
        np.testing.assert_array_equal(pixel_values([path], SPECS["clip"]), expected)
    assert open_image(turned).size == (30, 50)
    # An object is taken as it is, orientation and all, as the processor takes it.
    with Image.open(turned) as image:
        assert open_image(image).size == (50, 30)


def test_arrays_and_several_images_stack_in_order() -> None:
    images = [noise(9, 12, 3), Image.fromarray(noise(20, 5, 3)), noise(7, 7)]
    together = pixel_values(images, SPECS["exact"])
    assert together.shape == (3, 3, 24, 40)
    for image, pixels in zip(images, together, strict=True):
        np.testing.assert_array_equal(pixel_values([image], SPECS["exact"])[0], pixels)


def refusal(source: object, spec: WholeImage = SPECS["exact"]) -> str:
    with pytest.raises(ImageError) as caught:
        pixel_values([source], spec)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_an_absent_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nothing.png")
    assert str(tmp_path) in refusal(tmp_path)
    assert "no such file" in refusal("http://example.com/a.png")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_truncated_file_is_refused_at_any_length(tmp_path: Path, form: str) -> None:
    data = io.BytesIO()
    Image.fromarray(noise(40, 40, 3)).save(data, form)
    whole = data.getvalue()
    path = tmp_path / "cut"
    for length in (0, 1, 10, len(whole) // 4, len(whole) // 2):
        path.write_bytes(whole[:length])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about some metadata first
            assert str(path) in refusal(path)


def test_random_bytes_behind_a_header_are_an_image_error_or_an_image(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(noise(24, 24, 3)).save(data, "PNG")
    whole = bytearray(data.getvalue())
    generator = np.random.default_rng(0)
    path = tmp_path / "odd.png"
    outcomes = set()
    for _ in range(60):
        broken = bytearray(whole)
        for place in generator.integers(8, len(whole), 3):
            broken[place] = generator.integers(256)
        path.write_bytes(broken)
        try:
            outcomes.add(pixel_values([path], SPECS["exact"]).shape)
        except ImageError:
            outcomes.add("refused")
    assert outcomes <= {"refused", (1, 3, 24, 40)} and "refused" in outcomes


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.fromarray(noise(100, 100, 3)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # an error from twice that
    assert "decompression bomb" in refusal(path)


def test_a_sliver_that_resizing_would_blow_up_is_refused() -> None:
    sliver = np.zeros((1, 60_000, 3), np.uint8)
    spec = whole(("shortest_edge", 224), (224, 224), 3, RESCALE, MEAN, STD)
    assert "Crop the image first" in refusal(sliver, spec)


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (0, 0)])
def test_an_image_without_pixels_is_refused(shape: tuple[int, ...]) -> None:
    for resize in (("exact", 8, 8), ("shortest_edge", 8)):
        spec = whole(resize, (8, 8), 3, RESCALE, MEAN, STD)
        line = refusal(np.zeros(shape, np.uint8), spec)
        assert f"{shape[1]} x {shape[0]} pixels, expected at least one" in line


def test_a_mode_without_three_channels_is_refused_when_conversion_is_off() -> None:
    spec = whole(("exact", 8, 8), None, 3, RESCALE, MEAN, STD, convert_rgb=False)
    assert pixel_values([noise(9, 9, 3)], spec).shape == (1, 3, 8, 8)
    assert "expected RGB" in refusal(noise(9, 9), spec)
    assert "expected uint8" in refusal(noise(9, 9, 3).astype(np.float32))
    assert "cannot be decoded" in refusal(3)
