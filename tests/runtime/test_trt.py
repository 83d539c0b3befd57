"""Proves the TensorRT backend on a fake GPU whose engines really compute: the same tokens as ONNX
Runtime for every release, cache form and way of feeding a prompt; what stays on the device; when a
CUDA graph is made.

Run: python -m pytest tests/runtime/test_trt.py   (the test marked gpu needs a GPU and TensorRT)
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from device_support import DRIVEN, Machine, machine, pictures, toy_engines
from fake_cuda import CUDA_RELEASES
from runtime_support import PLAN_FORMS, SCATTERS, image_spec, model_spec, target_spec, toy_decoder

from qvlm_runtime import SessionError, cuda, load
from qvlm_runtime.backend import EXACT, as_float32, as_host, host_dtype, open_session
from qvlm_runtime.decoder import Decoder
from qvlm_runtime.kept import KeptCaches
from qvlm_runtime.manifest import read_manifest
from qvlm_runtime.trt import TrtSession

GENERATOR = np.random.default_rng(0)
IDS = GENERATOR.integers(4, 260, 30).tolist()
INDEX = [-1, 2, 0, 1, -1, -1, 3] + [-1] * 23
FEATURES = GENERATOR.standard_normal((4, 12)).astype(np.float32)
# A row of 256 bytes, so that new rows lie where TensorRT takes them as they are.
ALIGNED = {"kv_heads": 2, "head_dim": 32}


def open_decoder(folder: Path, backend: str, name: str) -> Decoder:
    manifest = read_manifest(folder)
    target = manifest.targets["device"]
    paths = {"ort": target.graphs["decoder"], backend: target.engines["sm87/decoder"].path}
    session = open_session(folder / paths[name], threads=1, accuracy_level=EXACT, backend=name)
    return Decoder(session, manifest.model, target)


@pytest.mark.parametrize("release", DRIVEN)
def test_a_loaded_folder_answers_as_onnx_runtime_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str
) -> None:
    device = machine(monkeypatch, release, cuda_release=CUDA_RELEASES[DRIVEN.index(release) % 2])
    toy_engines(tmp_path, device)
    asked = [pictures(count) for count in (0, 1, 3)]

    def answers(**options: Any) -> list[tuple[int, ...]]:
        with load(tmp_path, threads=1, **options) as model:
            assert (model.target, model.backend) == (
                "device",
                options.get("backend", device.backend),
            )
            return [model.generate("Compare", p, max_new_tokens=20).token_ids for p in asked]

    assert answers() == answers(backend="ort")  # engines are taken where they run


def assert_equal_steps(folder: Path, device: Machine, chunks: list[int]) -> None:
    """Logits of every step, and the cache at the end, bit for bit."""
    states = [
        open_decoder(folder, device.backend, name).start(31, FEATURES)
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


@pytest.mark.parametrize("form", PLAN_FORMS)
@pytest.mark.parametrize("release", DRIVEN)
def test_every_release_steps_as_onnx_runtime_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, form: str
) -> None:
    """Prefill, a piece behind it, single tokens: every profile; scatter in place or through a twin."""
    device = machine(monkeypatch, release)
    toy_engines(tmp_path, device, form)
    assert_equal_steps(tmp_path, device, [7, 5, 1, 1, 9, 1, 6])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", PLAN_FORMS)
@pytest.mark.parametrize("chunks", [[30], [1] * 30])
def test_any_way_of_feeding_steps_as_onnx_runtime_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chunks: list[int], form: str, dtype: str
) -> None:
    device = machine(monkeypatch, "10.3.0")
    toy_engines(tmp_path, device, form, dtype, **ALIGNED)
    assert_equal_steps(tmp_path, device, chunks)


def test_new_rows_are_written_behind_the_past_without_a_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A row of 256 bytes lies where TensorRT takes it; a narrower row goes through aligned scratch,
    copied on the device."""
    for changes, copied in ((ALIGNED, 0), ({}, 2 * (1 * 48 + 2 * 48))):
        folder = tmp_path / str(copied)
        device = machine(monkeypatch, "10.3.0")
        toy_engines(folder, device, **changes)
        state = open_decoder(folder, "tensorrt", "tensorrt").start(31, FEATURES)
        state.step(IDS[:7], INDEX[:7])
        before = device.gpu.copied["DeviceToDevice"]
        state.step([5])
        state.step(IDS[:2])
        assert device.gpu.copied["DeviceToDevice"] - before == copied


def test_the_host_waits_once_a_step_and_fetches_logits_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = machine(monkeypatch, "10.3.0")
    toy_engines(tmp_path, device)
    with load(tmp_path) as model:
        ready = model.prepare("What?", pictures(2))
        device.gpu.waits = 0
        features = model.image_features(ready.pictures)
        state = model.decoder.start(40, features)
        assert device.gpu.waits == 0  # the decoder reads what the vision engine wrote, no host
        state.step(ready.token_ids, ready.image_index)
        sent = device.gpu.copied["HostToDevice"]
        for step in range(1, 6):
            state.step([9])
            assert device.gpu.waits == 1 + step
        assert device.gpu.copied["DeviceToHost"] == 6 * 260 * 4
        assert device.gpu.copied["HostToDevice"] - sent == 5 * 3 * 8  # three int64 a token
        mallocs = device.gpu.calls.count("cudaMalloc")
        state.step([9])
        assert device.gpu.calls.count("cudaMalloc") == mallocs  # buffers are allocated once


@pytest.mark.skipif(not SCATTERS, reason="ONNX Runtime without opset 24")
@pytest.mark.parametrize(
    ("release", "captures", "launches"), [("10.16.1.11", 1, 9), ("10.13.3.9", 0, 0)]
)
def test_a_decode_step_that_repeats_becomes_one_cuda_graph(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, captures: int, launches: int
) -> None:
    """In place, one graph from the second step on. Through a twin two addresses alternate: none."""
    device = machine(monkeypatch, release)
    toy_engines(tmp_path, device, "scatter")
    state = open_decoder(tmp_path, "tensorrt", "tensorrt").start(31)
    state.step(IDS[:7])
    for _ in range(10):
        state.step([9])
    assert (device.gpu.captures, device.gpu.launches) == (captures, launches)


@pytest.mark.skipif(not SCATTERS, reason="ONNX Runtime without opset 24")
def test_another_sequence_or_shape_drops_the_graph(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two sequences have two caches: a graph of one replayed for the other would write its rows."""
    device = machine(monkeypatch, "10.16.1.11")
    toy_engines(tmp_path, device, "scatter")
    both = {name: open_decoder(tmp_path, "tensorrt", name) for name in ("ort", "tensorrt")}
    states = {name: [decoder.start(64) for _ in range(2)] for name, decoder in both.items()}
    # 3 steps of one (captured), 3 of the other (its own graph), a piece, the first again.
    for which, token_ids in [(0, [9])] * 3 + [(1, [8])] * 3 + [(0, [7, 6])] + [(0, [5])] * 3:
        expected, got = (states[name][which].step(token_ids) for name in both)
        np.testing.assert_array_equal(got, expected)
    assert device.gpu.captures == 3


@pytest.mark.skipif(not SCATTERS, reason="ONNX Runtime without opset 24")
@pytest.mark.parametrize(("release", "times"), [("10.13.3.9", 2), ("10.16.1.11", 1)])
def test_a_cache_that_is_not_written_in_place_takes_two_buffers_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, times: int
) -> None:
    device = machine(monkeypatch, release)
    spec = toy_engines(tmp_path, device, "scatter", **ALIGNED).model
    decoder = open_decoder(tmp_path, "tensorrt", "tensorrt")
    one = 2 * spec.layers * spec.kv_heads * spec.head_dim * spec.max_context * 4
    assert decoder.cache_bytes(31) == times * one
    state = decoder.start(31)
    state.step(IDS[:7])
    state.step([9])
    cache: Any = state._cache
    buffers = [buffer for pair in cache.layers for buffer in pair]
    held = sum(b.nbytes + (b._twin.nbytes if b._twin else 0) for b in buffers)
    assert held == decoder.cache_bytes(31)


def test_in_the_append_form_no_step_repeats_and_none_is_captured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = machine(monkeypatch, "11.4.0.106")
    toy_engines(tmp_path, device)
    state = open_decoder(tmp_path, "tensorrt", "tensorrt").start(31)
    for token in IDS:
        state.step([token])
    assert device.gpu.captures == 0


def test_a_shape_value_is_read_on_the_host_where_the_engine_wants_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not SCATTERS:
        pytest.skip("ONNX Runtime without opset 24")
    device = machine(monkeypatch, "10.16.1.11")
    device.trt.on_host = {"kv_len"}
    toy_engines(tmp_path, device, "scatter")
    assert_equal_steps(tmp_path, device, [7, 1, 1, 1])
    assert device.gpu.captures == 0  # its value changes with every step


@pytest.mark.parametrize(
    ("form", "profiles"), [("append", [0, 1, 2, 1]), ("scatter", [0, 1, 0, 1])]
)
def test_the_narrowest_profile_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str, profiles: list[int]
) -> None:
    """Prefill, decode, a piece behind a past, decode: a wider profile has slower kernels."""
    if form not in PLAN_FORMS:
        pytest.skip("ONNX Runtime without opset 24")
    device = machine(monkeypatch, "10.16.1.11")
    toy_engines(tmp_path, device, form)
    decoder = open_decoder(tmp_path, "tensorrt", "tensorrt")
    state = decoder.start(31)
    session: Any = decoder.session
    ran: list[Any] = []
    enqueue = session._enqueue

    def spy(context: Any) -> None:
        ran.append(context)
        enqueue(context)

    monkeypatch.setattr(session, "_enqueue", spy)
    for count in (7, 1, 5, 1):
        state.step(IDS[:count])
    indices = {id(context): index for index, context in session._contexts.items()}
    assert [indices[id(context)] for context in ran] == profiles


def test_a_buffer_is_zero_at_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toy_engines(tmp_path, machine(monkeypatch, "10.3.0"))
    buffer = open_decoder(tmp_path, "tensorrt", "tensorrt").session.buffer(9, "float32")
    assert not buffer.read(2, (7,)).any()


def test_threads_take_turns_and_get_their_own_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = machine(monkeypatch, "10.3.0")
    toy_engines(tmp_path, device)
    with load(tmp_path) as model:
        prompts = [f"prompt {i}" for i in range(6)]
        alone = [model.generate(p, max_new_tokens=8).token_ids for p in prompts]
        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(model.generate, p, max_new_tokens=8) for p in prompts]
            assert [future.result().token_ids for future in futures] == alone


@pytest.mark.parametrize("form", PLAN_FORMS)
def test_a_kept_cache_gets_another_size_on_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    device = machine(monkeypatch, "10.3.0")
    toy_engines(tmp_path, device, form)
    with load(tmp_path, threads=1) as model:
        loaded = device.gpu.free
        with KeptCaches(model, 1) as kept:
            for text, new in (("a" * 9, 5), ("a" * 14, 11), ("a" * 15, 3)):
                expected = model.generate(text, max_new_tokens=new).token_ids
                done = kept.stream(text, max_new_tokens=new).read()
                assert done.token_ids == expected
                assert model.budget.used == model.cache_bytes(len(text) + 2 + new)
            assert done.timings.cached_tokens == 1 + 14
            assert device.gpu.free < loaded
        gc.collect()
        assert device.gpu.free == loaded


def test_memory_is_given_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = machine(monkeypatch, "10.3.0")
    toy_engines(tmp_path, device)
    model = load(tmp_path)
    loaded = device.gpu.free
    for _ in range(3):
        model.generate("Hello", pictures(1), max_new_tokens=3)
    gc.collect()
    assert len(model.feature_cache) == 3
    assert loaded - device.gpu.free == 3 * cuda.ALIGNMENT  # each image's features are smaller
    model.feature_cache.clear()
    assert device.gpu.free == loaded
    model.generate("Hello", pictures(1), max_new_tokens=3)
    gc.collect()
    model.close()
    assert device.gpu.free == device.gpu.total
    with pytest.raises(SessionError, match="Load the folder again"):
        model.generate("Hello")


def test_what_no_profile_takes_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = machine(monkeypatch, "10.3.0")
    toy_engines(tmp_path, device)
    decoder = open_decoder(tmp_path, "tensorrt", "tensorrt")
    features = np.zeros((70, 12), np.float32)
    with pytest.raises(SessionError, match=r"image_features has shape \[70, 12\], expected .*64"):
        decoder.start(8, features).step([5])
    session = decoder.session
    with pytest.raises(SessionError, match="tensor input_ids is not bound"):
        session.binding().run()


def test_run_on_host_arrays_equals_onnx_runtime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = machine(monkeypatch, "11.4.0.106")
    toy_engines(tmp_path, device)
    pixels = GENERATOR.standard_normal((1, 3, 6, 6)).astype(np.float32)
    got = TrtSession(tmp_path / "device/engines/vision.sm87.plan", "tensorrt")
    expected = open_session(tmp_path / "device/vision.onnx", threads=1)
    feed = {"pixel_values": pixels}
    np.testing.assert_array_equal(
        got.run(feed)["image_features"], expected.run(feed)["image_features"]
    )


def test_bfloat16_goes_in_and_out_as_bits_rounded_to_nearest_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -3.3e38, 1e-40, 0.1], np.float32)
    bits = as_host(values, "bfloat16")
    expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(bits, expected.view(np.uint16))
    np.testing.assert_array_equal(as_float32(bits, "bfloat16"), expected.astype(np.float32))
    assert as_host(bits, "bfloat16") is bits
    assert host_dtype("bfloat16") == np.uint16 and host_dtype("float16") == np.float16


@pytest.mark.gpu
def test_an_engine_of_this_machine_steps_as_onnx_runtime_does(tmp_path: Path) -> None:
    """The same comparison with the real library: builds the toy's engines here and runs them.

    float32 on both sides: TensorRT may use TF32 products, whose inputs round to 2^-11.
    """
    pytest.importorskip("tensorrt")
    try:
        cuda.device()
    except SessionError as error:
        pytest.skip(str(error))
    from qvlm.progress import silent
    from qvlm_export.builder import Options, profiles
    from qvlm_export.engine import compile_graph

    spec, target = model_spec(**ALIGNED), target_spec("append")
    path = tmp_path / "decoder.onnx"
    onnx.save(toy_decoder(spec, target), path)
    plan, _ = compile_graph(
        path, profiles("decoder", spec, image_spec()), tmp_path / "timing", Options(), silent
    )
    (tmp_path / "decoder.plan").write_bytes(plan)
    sessions = [
        open_session(path, threads=1, accuracy_level=EXACT),
        open_session(tmp_path / "decoder.plan", backend="tensorrt"),
    ]
    states = [Decoder(session, spec, target).start(31, FEATURES) for session in sessions]
    for chunk in [7, 5, 1, 1, 9, 1, 6]:
        part = slice(states[0].length, states[0].length + chunk)
        expected, got = (state.step(IDS[part], INDEX[part]) for state in states)
        np.testing.assert_allclose(
            got, expected, rtol=0, atol=4 * 64 * 2**-11 * np.abs(expected).max()
        )
