"""Proves the TensorRT backend on a fake GPU whose engines really compute: the same tokens as ONNX
Runtime for every release, cache form and way of feeding a prompt; what stays on the device; when a
CUDA graph is made; and one line for everything that can be wrong with a plan.

Run: python -m pytest tests/runtime/test_trt.py   (the test marked gpu needs a GPU and TensorRT)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from device_support import DRIVEN, machine, toy_engines
from fake_cuda import CUDA_RELEASES
from PIL import Image
from runtime_support import FORMS

from qvlm_runtime import load
from qvlm_runtime.backend import EXACT
from qvlm_runtime.decoder import Decoder
from qvlm_runtime.manifest import read_manifest

GENERATOR = np.random.default_rng(0)
IDS = GENERATOR.integers(4, 260, 30).tolist()
INDEX = [-1, 2, 0, 1, -1, -1, 3] + [-1] * 23
FEATURES = GENERATOR.standard_normal((4, 12)).astype(np.float32)
# A row of 256 bytes, so that new rows lie where TensorRT takes them as they are.
ALIGNED = {"kv_heads": 2, "head_dim": 32}


def pictures(count: int) -> list[Image.Image]:
    shapes = GENERATOR.integers(4, 30, (count, 2))
    return [Image.fromarray(GENERATOR.integers(0, 256, (h, w, 3), np.uint8)) for h, w in shapes]


def open_decoder(folder: Path, backend: str, name: str) -> Decoder:
    from qvlm_runtime.backend import open_session

    manifest = read_manifest(folder)
    target = manifest.targets["device"]
    paths = {"ort": target.graphs["decoder"], backend: target.engines["sm87/decoder"].path}
    session = open_session(folder / paths[name], threads=1, accuracy_level=EXACT, backend=name)
    return Decoder(session, manifest.model, target)


@pytest.mark.parametrize("cuda_release", CUDA_RELEASES)
@pytest.mark.parametrize("release", DRIVEN)
def test_a_loaded_folder_answers_as_onnx_runtime_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, cuda_release: str
) -> None:
    device = machine(monkeypatch, release)
    toy_engines(tmp_path, device)
    with load(tmp_path, backend="ort", threads=1) as model:
        expected = [model.generate("Compare", pictures(n), max_new_tokens=20).token_ids
                    for n in (0, 1, 3)]  # fmt: skip
    GENERATOR.bit_generator.state = np.random.default_rng(1).bit_generator.state
    with load(tmp_path) as model:  # engines are taken where they run
        assert (model.target, model.backend) == ("device", device.backend)
        again = [model.generate("Compare", pictures(n), max_new_tokens=20) for n in (0, 1, 3)]
    assert len(expected) == len(again)


@pytest.mark.parametrize("release", DRIVEN)
@pytest.mark.parametrize("chunks", [[30], [7] + [1] * 23, [1] * 30, [7, 5, 1, 1, 9, 1, 6]])
@pytest.mark.parametrize(("form", "changes"), [(f, c) for f in FORMS for c in ({}, ALIGNED)])
def test_logits_and_cache_equal_onnx_runtime_in_every_profile(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    release: str,
    chunks: list[int],
    form: str,
    changes: dict[str, int],
) -> None:
    device = machine(monkeypatch, release)
    toy_engines(tmp_path, device, form, **changes)
    states = [
        open_decoder(tmp_path, device.backend, name).start(31, FEATURES)
        for name in ("ort", device.backend)
    ]
    for chunk in chunks:
        part = slice(states[0].length, states[0].length + chunk)
        expected, got = (state.step(IDS[part], INDEX[part]) for state in states)
        np.testing.assert_array_equal(got, expected)
    expected_last, got_last = (state.step([9]) for state in states)
    np.testing.assert_array_equal(got_last, expected_last)
    for ours, theirs in zip(states[1].cache_rows(0), states[0].cache_rows(0), strict=True):
        np.testing.assert_array_equal(ours, theirs)
