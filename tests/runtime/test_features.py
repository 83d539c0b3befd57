"""Proves the image-feature cache and the frames that are taken: a second question about an image skips vision and is
answered the same, the key holds all that features depend on, the cache is bounded, device arrays are refused by
name: python -m pytest tests/runtime/test_features.py
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runtime_support import FORMS, write_folder

from qvlm_runtime import FeatureCache, ImageError, Model, load
from qvlm_runtime.decoder import Features
from qvlm_runtime.ort import OrtBuffer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_folder(path, max_context=256)
    return path


@pytest.fixture(params=["ort", "rtx"] if FORMS[0] == "scatter" else ["rtx"])
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    """Both cache forms."""
    with load(folder, request.param, threads=1, verify=False) as opened:
        yield opened


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (8, 9, 3), np.uint8) for _ in range(count)]


# --- image features ------------------------------------------------------------------------------


def test_a_second_question_about_an_image_skips_vision(model: Model, tmp_path: Path) -> None:
    frame = pictures(1, 5)[0]
    Image.fromarray(frame).save(tmp_path / "same.png")
    cold = model.generate("what?", [frame], max_new_tokens=20)
    assert (cold.timings.images, cold.timings.cached_images) == (1, 0)
    model.vision.close()  # from here on the vision graph cannot run
    for source in (
        frame,
        frame.copy(),
        tmp_path / "same.png",
        (tmp_path / "same.png").read_bytes(),
    ):
        again = model.generate("what?", [source], max_new_tokens=20)
        assert again.token_ids == cold.token_ids and again.timings.cached_images == 1


def test_one_changed_pixel_is_another_image(model: Model) -> None:
    frame = pictures(1)[0]
    other = frame.copy()
    other[4, 4, 1] ^= 255
    keys = {model.pictures([image])[0].key for image in (frame, other, frame.copy())}
    assert len(keys) == 2


def test_the_key_holds_the_preprocessing_and_the_graph(folder: Path) -> None:
    shared = FeatureCache()
    first = load(folder, "rtx", verify=False, feature_cache=shared)
    second = load(folder, "rtx", verify=False, feature_cache=shared)
    first.generate("a", pictures(1), max_new_tokens=2)
    assert second.generate("a", pictures(1), max_new_tokens=2).timings.cached_images == 1
    salt = second._feature_salt
    for changed in (salt.replace("0.5", "0.4"), salt.replace(salt[-9:-3], "other!")):
        assert changed != salt
        second._feature_salt = changed
        assert second.generate("a", pictures(1), max_new_tokens=2).timings.cached_images == 0


def kept(rows: int) -> Features:
    """Features of ``rows`` rows of four."""
    return Features(OrtBuffer(np.zeros((rows, 4), np.float32)), rows)


def test_the_feature_cache_is_bounded_and_drops_the_oldest_use() -> None:
    row = np.zeros((1, 4), np.float32)
    cache = FeatureCache(3 * row.nbytes)
    for key in "abc":
        cache.put(key, kept(1))
    assert cache.get("a") is not None
    cache.put("d", kept(1))
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]
    cache.put("big", kept(4))
    assert cache.get("big") is None and len(cache) == 3 and cache.bytes == 3 * row.nbytes
    cache.put("d", kept(2))
    assert cache.bytes <= cache.max_bytes and (cache.hits, cache.misses) == (4, 2)
    cache.clear()
    assert len(cache) == 0 and cache.bytes == 0


def test_the_feature_cache_counts_right_under_threads() -> None:
    cache, size = FeatureCache(40 * 16), np.zeros((1, 4), np.float32).nbytes

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(400):
            key = str(generator.integers(0, 90))
            if cache.get(key) is None:
                cache.put(key, kept(1))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.bytes == size * len(cache) <= cache.max_bytes
    assert cache.hits + cache.misses == 6 * 400


# --- frames --------------------------------------------------------------------------------------


class Lent:
    """An array of another library: DLPack, or the older interface, or a device."""

    def __init__(self, array: np.ndarray, kind: str) -> None:
        self.array = array
        if kind == "interface":
            self.__array_interface__ = array.__array_interface__
        if kind == "cuda":
            self.__cuda_array_interface__ = {"shape": array.shape}


class Dlpack:
    def __init__(self, array: np.ndarray, device: int = 1) -> None:
        self.array, self.device = array, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.array.__dlpack__(**arguments)


def test_frames_of_other_libraries_are_taken(model: Model) -> None:
    frame = pictures(1)[0]
    (expected,) = model.pictures([frame])
    for picture in model.pictures([Lent(frame, "interface"), Dlpack(frame)]):
        for name, array in expected.inputs.items():
            np.testing.assert_array_equal(picture.inputs[name], array)


@pytest.mark.parametrize(
    ("make", "device"),
    [
        (lambda array: Lent(array, "cuda"), "CUDA"),
        (lambda array: Dlpack(array, 2), "CUDA 0"),
        (lambda array: Dlpack(array, 8), "Metal 0"),
        (lambda array: Dlpack(array, 99), "DLPack type 99 0"),
    ],
)
def test_a_device_array_is_refused_by_its_device(model: Model, make: Any, device: str) -> None:
    with pytest.raises(ImageError, match=rf"image 1: the array is on a device \({device}\)"):
        model.prepare("a", [make(pictures(1)[0])])
