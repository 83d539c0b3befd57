"""Proves both cache forms on ONNX Runtime with a toy decoder computed in NumPy beside it: cached
decode equals a full recompute, rows are where they should be, and nothing is copied:
python -m pytest tests/runtime/test_decoder.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from runtime_support import (
    FORMS,
    SCATTERS,
    model_spec,
    reference_logits,
    target_spec,
    toy_decoder,
    toy_weights,
)

from qvlm_runtime.backend import EXACT, FAST, open_session
from qvlm_runtime.decoder import Decoder, DecoderState
from qvlm_runtime.errors import PromptError, SessionError

GENERATOR = np.random.default_rng(0)
IDS = GENERATOR.integers(4, 260, 30).tolist()
INDEX = [-1, 2, 0, 1, -1, -1, 3] + [-1] * 23
FEATURES = GENERATOR.standard_normal((4, 12)).astype(np.float32)
# Sums of at most 12 products per logit through four matrix products: each rounds to 2^-24 (2^-11 in
# float16) of its terms. 4 * 12 roundings of the largest magnitude bound the error of one logit.
ROUNDINGS = 4 * 12
TOLERANCE = {"float32": ROUNDINGS * 2**-24, "float16": ROUNDINGS * 2**-11}


def decoder(tmp_path: Path, form: str, dtype: str = "float32", **changes: Any) -> Decoder:
    spec, target = model_spec(**changes), target_spec(form, dtype)
    path = tmp_path / "decoder.onnx"
    onnx.save(toy_decoder(spec, target), path)
    return Decoder(open_session(path, threads=1, accuracy_level=EXACT), spec, target)


def assert_reference(logits: np.ndarray, count: int, dtype: str) -> None:
    expected = reference_logits(model_spec(), IDS[:count], INDEX[:count], FEATURES)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunks", [[30], [7] + [1] * 23, [1] * 30, [7, 5, 1, 1, 9, 1, 6]])
def test_cached_steps_equal_a_full_recompute(
    tmp_path: Path, form: str, dtype: str, chunks: list[int]
) -> None:
    state = decoder(tmp_path, form, dtype).start(30, FEATURES)
    for chunk in chunks:
        part = slice(state.length, state.length + chunk)
        logits = state.step(IDS[part], INDEX[part])
        assert logits.dtype == np.float32 and logits.shape == (260,)
        assert_reference(logits, state.length, dtype)


@pytest.mark.parametrize("form", FORMS)
def test_cache_rows_are_the_projections_of_the_tokens(tmp_path: Path, form: str) -> None:
    state = decoder(tmp_path, form).start(40, FEATURES)
    state.step(IDS[:7], INDEX[:7])
    for token in IDS[7:30]:
        state.step([token])
    weights = toy_weights(model_spec())
    x = weights["embedding"][IDS].copy()
    x[:7][np.array(INDEX[:7]) >= 0] = FEATURES[[2, 0, 1, 3]]
    x += weights["positions"][:30]
    for rows, name in zip(state.cache_rows(0), ("wk", "wv"), strict=True):
        assert rows.shape == (1, 2, 30, 6)
        expected = (x @ weights[name]).reshape(30, 2, 6).transpose(1, 0, 2)[None]
        atol = TOLERANCE["float32"] * np.abs(expected).max()
        np.testing.assert_allclose(rows, expected, rtol=0, atol=atol)


# Shape of a cache of 16 rows, and the axis of its rows.
KEYS = {"scatter": ((2, 16, 6), 1), "grown": ((2, 16, 6), 1), "append": ((16, 2, 6), 0)}
VALUES = {**KEYS, "grown": ((2, 6, 16), 2)}


def storage(state: DecoderState) -> list[np.ndarray]:
    return [buffer.array for pair in state._cache.layers for buffer in pair]  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", FORMS)
def test_a_step_writes_its_row_in_place_and_touches_no_other(tmp_path: Path, form: str) -> None:
    """Bytes planted in the rows behind and before the new one survive: nothing was copied over."""
    state = decoder(tmp_path, form).start(16, FEATURES)
    state.step(IDS[:7], INDEX[:7])
    arrays = storage(state)
    addresses = [array.ctypes.data for array in arrays]
    layouts = [KEYS[form], VALUES[form]]
    for array, (shape, axis) in zip(arrays, layouts, strict=True):
        np.moveaxis(array.reshape(shape), axis, 0)[8:] = 77.0
    before = [array.copy() for array in arrays]
    state.step([IDS[7]])
    assert [array.ctypes.data for array in storage(state)] == addresses
    for array, old, (shape, axis) in zip(arrays, before, layouts, strict=True):
        changed = np.moveaxis((array != old).reshape(shape), axis, 0).any((1, 2))
        assert changed.tolist() == [False] * 7 + [True] + [False] * 8


@pytest.mark.parametrize("form", FORMS)
def test_past_and_present_are_bound_to_one_buffer(tmp_path: Path, form: str) -> None:
    """The graph reads what it wrote: a row altered in the buffer alters the next logits, and the
    address given to ONNX Runtime for the output is inside the buffer given for the input."""
    state = decoder(tmp_path, form).start(16, FEATURES)
    calls: dict[str, tuple[tuple[int, ...], int]] = {}
    native = state._binding._binding  # type: ignore[attr-defined]
    for kind in ("bind_input", "bind_output"):
        original = getattr(native, kind)

        def spy(name: str, device: str, index: int, dtype: Any, shape: Any, address: int,
                original: Any = original) -> None:  # fmt: skip
            calls[name] = (tuple(shape), address)
            original(name, device, index, dtype, shape, address)

        setattr(native, kind, spy)
    state.step(IDS[:7], INDEX[:7])
    state.step([IDS[7]])
    key = storage(state)[0]
    past, present = calls["past_key_0"], calls["present_key_0"]
    assert past[1] == key.ctypes.data
    if form != "append":
        assert present == past == ((1, 2, 16, 6), key.ctypes.data)
    else:
        assert past[0] == (1, 7, 2, 6) and present[0] == (1, 1, 2, 6)
        assert present[1] == key.ctypes.data + 7 * 2 * 6 * 4


@pytest.mark.skipif(not SCATTERS, reason="ONNX Runtime without opset 24")
def test_a_grown_cache_reads_little_more_than_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its view follows the length up and down in steps, and the answers are those of one view."""
    monkeypatch.setattr("qvlm_runtime.cache.STEP", 8)
    opened = decoder(tmp_path, "grown")
    state, views = opened.start(30, FEATURES), list[int]()
    cache = state._cache
    for length in (7, 8, 9, 16, 17, 30, 5, 12):
        if length < state.length:
            state.rewind(length - 1)
        while state.length < length:
            at = state.length
            logits = state.step([IDS[at]], [INDEX[at]] if at < 7 else None)
        views.append(cache._view)  # type: ignore[attr-defined]
        assert_reference(logits, length, "float32")
    assert views == [8, 8, 16, 16, 24, 30, 8, 16]
    assert all(array.size == 30 * 12 for array in storage(state)), "no second buffer"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("before", "kept", "after"), [(9, 9, 30), (30, 4, 12), (20, 0, 9)])
def test_a_cache_of_another_size_keeps_its_rows(
    tmp_path: Path, form: str, dtype: str, before: int, kept: int, after: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Larger or smaller, bit for bit; the memory is that of a new one, and what follows is right."""
    monkeypatch.setattr("qvlm_runtime.cache.STEP", 8)
    state = decoder(tmp_path, form, dtype).start(before, FEATURES)
    state.step(IDS[:9], INDEX[:9])
    state.rewind(kept)
    rows = state.cache_rows(0)
    state.resize(after)
    assert (state.length, state.capacity) == (kept, after)
    assert [array.size for array in storage(state)] == [after * 12] * 2
    for moved, row in zip(state.cache_rows(0), rows, strict=True):
        np.testing.assert_array_equal(moved, row)
    while state.length < after:
        at = state.length
        logits = state.step([IDS[at]], [INDEX[at]] if at < 7 else None)
        assert_reference(logits, at + 1, dtype)
    with pytest.raises(PromptError, match=f"cache of {after} rows"):
        state.step([9])


@pytest.mark.parametrize("form", FORMS)
def test_returned_logits_and_rows_do_not_change_later(tmp_path: Path, form: str) -> None:
    state = decoder(tmp_path, form).start(16, FEATURES)
    first = state.step(IDS[:5], INDEX[:5])
    rows = state.cache_rows(0)
    kept = [array.copy() for array in (first, *rows)]
    state.step([9])
    for array, copy in zip((first, *rows), kept, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("form", FORMS)
def test_sequences_of_one_decoder_are_independent(tmp_path: Path, form: str) -> None:
    shared = decoder(tmp_path, form)
    alone = shared.start(30, FEATURES)
    expected = [alone.step(IDS[:7], INDEX[:7]), *(alone.step([t]) for t in IDS[7:12])]
    one, other = shared.start(30, FEATURES), shared.start(64)
    got = [one.step(IDS[:7], INDEX[:7])]
    other.step(IDS[3:20])
    for token in IDS[7:12]:
        got.append(one.step([token]))
        other.step([token + 1])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.skipif(not SCATTERS, reason="ONNX Runtime without opset 24")
def test_a_graph_with_a_fixed_cache_gives_the_limit(tmp_path: Path) -> None:
    spec, target = model_spec(), target_spec("scatter")
    model = toy_decoder(spec, target)
    for value in [*model.graph.input, *model.graph.output]:
        if "_key_" in value.name or "_value_" in value.name:
            value.type.tensor_type.shape.dim[2].ClearField("dim_param")
            value.type.tensor_type.shape.dim[2].dim_value = 20
    path = tmp_path / "decoder.onnx"
    onnx.save(model, path)
    fixed = Decoder(open_session(path, threads=1), spec, target)
    assert fixed.max_rows == 20
    state = fixed.start(5)
    assert [array.size for array in storage(state)] == [20 * 12] * 2
    with pytest.raises(PromptError, match="at most 20"):
        fixed.start(21)


def test_the_accuracy_level_reaches_onnx_runtime(tmp_path: Path) -> None:
    """Level 1 multiplies float activations with the stored integers; level 4 rounds activations."""
    generator = np.random.default_rng(1)
    stored = generator.integers(-8, 8, (256, 64)).astype(np.int8)
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[1, 1, 256] x) => (float[1, 1, 64] y) {
        w = DequantizeLinear <axis = 0, block_size = 128> (q, s)
        y = MatMul (x, w)
    }"""
    model = onnx.parser.parse_model(text)
    nibbles = stored.reshape(-1) & 0xF
    packed = (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8).tobytes()
    weight = onnx.TensorProto(name="q", dims=stored.shape, data_type=onnx.TensorProto.INT4)
    weight.raw_data = packed
    scales = onnx.numpy_helper.from_array(np.full((2, 64), 0.125, np.float32), "s")
    model.graph.initializer.extend([weight, scales])
    path = tmp_path / "linear.onnx"
    onnx.save(model, path)
    x = generator.standard_normal((1, 1, 256)).astype(np.float32)
    exact = x.astype(np.float64) @ (stored * 0.125)
    error = {}
    for level in (EXACT, FAST):
        got = open_session(path, threads=1, accuracy_level=level).run({"x": x})["y"]
        error[level] = np.abs(got - exact).max() / np.abs(exact).max()
    # A sum of 256 float32 roundings, against activations rounded to 1/127 of their block's largest.
    assert error[EXACT] < 256 * 2**-24
    assert 2**-12 < error[FAST] < 2**-5


def test_a_file_that_is_no_graph_and_a_failing_run_are_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    path.write_bytes(b"not a graph")
    for source in (path, tmp_path / "absent.onnx"):
        with pytest.raises(SessionError, match=r"ONNX Runtime .* cannot open") as caught:
            open_session(source)
        assert "\n" not in str(caught.value)
    shared = decoder(tmp_path, "append")
    with pytest.raises(SessionError, match="cannot run this graph") as caught:
        shared.start(8).step([10**6])
    assert "\n" not in str(caught.value)
    with pytest.raises(SessionError, match="cannot run this graph"):
        shared.session.run({"input_ids": np.zeros(3, np.int64)})
    with pytest.raises(SessionError, match="no backend 'cuda'"):
        open_session(path, backend="cuda")


def test_external_data_is_found_beside_the_graph_and_its_absence_is_told(tmp_path: Path) -> None:
    spec, target = model_spec(), target_spec("append")
    path = tmp_path / "decoder.onnx"
    onnx.save(toy_decoder(spec, target), path, save_as_external_data=True, location="w.data",
              size_threshold=0)  # fmt: skip
    opened = Decoder(open_session(path, threads=1), spec, target)
    assert_reference(opened.start(9, FEATURES).step(IDS[:9], INDEX[:9]), 9, "float32")
    (tmp_path / "w.data").unlink()
    with pytest.raises(SessionError, match="cannot open"):
        open_session(path)


def test_a_closed_session_says_so(tmp_path: Path) -> None:
    shared = decoder(tmp_path, "append")
    state = shared.start(8)
    shared.session.close()
    with pytest.raises(SessionError, match="Load the folder again"):
        state.step([5])
    with pytest.raises(SessionError, match="closed"):
        shared.session.run({})
    with pytest.raises(SessionError, match="closed"):
        shared.start(8)
