"""Proves the checkpoint format: INT4 packs as compressed-tensors has it, every kind of linear and every golden comes
back equal, damage is one clear line.

Run: python -m pytest tests/core/test_checkpoint.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvlm.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    QuantizedLinear,
    pack_int4,
    read_goldens,
    unpack_int4,
)
from qvlm.errors import CheckpointError
from qvlm.recipe import FORMATS, Recipe

RNG = np.random.default_rng(0)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_int4_comes_back(rows: int, columns: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(-8, 8, (rows, columns), dtype=np.int8)
    packed = pack_int4(values)
    assert packed.dtype == np.int32 and packed.shape == (rows, -(-columns // 8))
    assert np.array_equal(unpack_int4(packed, (rows, columns)), values)


def test_int4_layout_is_lowest_nibble_first_with_offset_eight() -> None:
    # compressed-tensors pack_to_int32: value + 8, column i in bits 4i .. 4i+3.
    assert pack_int4(np.array([[-8, -7, 0, 7, -8, -8, -8, -8]], np.int8)).tolist() == [[0xF810]]
    assert pack_int4(np.array([[-8] * 7 + [7]], np.int8)).tolist() == [[-(1 << 28)]]


def linear(name: str, rows: int = 5, columns: int = 128) -> QuantizedLinear:
    """Random integers, scales and zero points in the layout of a named format."""
    format_ = FORMATS[name]
    assert format_.weights is not None
    limit = 1 << (format_.weights.bits - 1)
    groups = format_.weights.groups(columns, name)
    activations = format_.activations
    static = activations is not None and activations.static
    length = columns if activations is not None and activations.granularity == "channel" else 1
    asymmetric = activations is not None and not activations.symmetric
    return QuantizedLinear(
        RNG.integers(-limit, limit, (rows, columns), dtype=np.int8),
        RNG.uniform(0.1, 1, (rows, groups)).astype(np.float16).astype(np.float32),
        format_,
        None,
        RNG.uniform(0.1, 1, length).astype(np.float32) if static else None,
        RNG.integers(-8, 8, length).astype(np.int32) if asymmetric else None,
    )


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "float"])
def test_every_format_comes_back(name: str, tmp_path: Path) -> None:
    written = linear(name)
    writer = CheckpointWriter(tmp_path)
    writer.add_linear("text", "a.b", written)
    writer.add("norm.weight", np.ones(3, np.float16))
    writer.close({"model_type": "x"}, Recipe(()), {"note": 1}, {"c": "head"})
    checkpoint = Checkpoint(tmp_path)
    read = checkpoint.linear("a.b")
    assert read is not None and read.format == written.format
    for field in ("integers", "scale", "zero_point", "input_scale", "input_zero_point"):
        mine, theirs = getattr(written, field), getattr(read, field)
        assert (mine is None) == (theirs is None)
        assert mine is None or (mine.dtype == theirs.dtype and np.array_equal(mine, theirs))
    assert checkpoint.linear("norm") is None
    assert checkpoint.float_tensor("norm.weight").tolist() == [1.0, 1.0, 1.0]
    assert checkpoint.method_report == {"note": 1} and checkpoint.float_linears == {"c": "head"}


def test_zero_points_come_back_and_shift_values(tmp_path: Path) -> None:
    base = linear("w8a8", 2, 4)
    zero = np.array([[3], [-4]], np.int8)
    written = QuantizedLinear(base.integers, base.scale, base.format, zero)
    expected = (base.integers.astype(np.float32) - zero) * base.scale
    assert np.array_equal(written.dequantize(), expected)
    writer = CheckpointWriter(tmp_path)
    writer.add_linear("text", "a", written)
    writer.close({}, Recipe(()), {})
    read = Checkpoint(tmp_path).linear("a")
    assert read is not None and np.array_equal(read.dequantize(), expected)


def test_bytes_count_packed_integers_and_float16_scales() -> None:
    assert linear("w4a16", 5, 256).nbytes() == 5 * 128 + 2 * 5 * 2
    assert linear("w8a8", 5, 256).nbytes() == 5 * 256 + 2 * 5


def test_a_real_checkpoint_reads_back(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint)
    assert {entry["component"] for entry in checkpoint.linears.values()} == {
        "vision",
        "projector",
        "text",
    }
    assert checkpoint.float_linears == {"lm_head": "head"}
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    goldens = checkpoint.goldens()
    assert len(goldens) == 2
    for golden in goldens:
        length, steps = len(golden.inputs["input_ids"]), len(golden.inputs["tokens"])
        assert steps == 64
        assert (golden.inputs["image_index"] >= 0).sum() == 9
        for side in ("float", "quant"):
            shapes = {key: value.shape for key, value in golden.outputs[side].items()}
            assert shapes == {
                "image_features": (9, 384),
                "logits": (steps, 333),
                "key": (length + steps - 1, 2, 64),
                "value": (length + steps - 1, 2, 64),
            }
        # Tokens are the float model's own greedy choice.
        assert np.array_equal(golden.outputs["float"]["logits"].argmax(-1), golden.inputs["tokens"])
        assert not np.array_equal(
            golden.outputs["float"]["logits"], golden.outputs["quant"]["logits"]
        )


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("recipe.json", "recipe.json: not found"),
        ("model.safetensors.index.json", "not found"),
        ("model-00001.safetensors", "listed in the index but absent"),
    ],
)
def test_a_missing_file_is_named(
    tiny_checkpoint: Path, tmp_path: Path, file: str, message: str
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    (copy / file).unlink()
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(copy)


def test_damaged_files_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    goldens = copy / "goldens.npz"
    goldens.write_bytes(goldens.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="goldens not readable"):
        read_goldens(goldens)
    shard = copy / "model-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        Checkpoint(copy)
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        Checkpoint(tiny_checkpoint).tensor("nothing")


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("quantization.json", "float_linears"),
        ("quantization.json", "method"),
        ("model.safetensors.index.json", "weight_map"),
    ],
)
def test_a_checkpoint_of_an_earlier_version_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, file: str, key: str
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    stored = json.loads((copy / file).read_text())
    del stored[key]
    (copy / file).write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=rf"\(no '{key}'\)\. Quantize again\.$"):
        Checkpoint(copy)


def test_goldens_of_an_earlier_version_are_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Those that did not say how large the pictures were."""
    with np.load(tiny_checkpoint / "goldens.npz") as stored:
        kept = {key: stored[key] for key in stored.files if not key.endswith("image_sizes")}
    np.savez(tmp_path / "goldens.npz", **kept)
    with pytest.raises(CheckpointError, match=r"0\.image_sizes .*Quantize again\.$"):
        read_goldens(tmp_path / "goldens.npz")


def test_a_negative_scale_is_kept(tmp_path: Path) -> None:
    scheme = FORMATS["w2a16"]
    integers = np.random.default_rng(0).integers(-2, 2, (4, 256), np.int8)
    scale = np.float32([[0.5, -0.25], [-1, 2], [-2, -0.125], [1, 1]])
    writer = CheckpointWriter(tmp_path)
    writer.add_linear("text", "a", QuantizedLinear(integers, scale, scheme))
    writer.close({}, Recipe(()), {})
    found = Checkpoint(tmp_path).linear("a")
    assert found is not None and np.array_equal(found.scale, scale)
    assert np.array_equal(found.dequantize()[1, :128], -1.0 * integers[1, :128])
