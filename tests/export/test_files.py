"""Proves what lies on disk: the same bytes twice, constants outside and relative, nothing
half-written, and one clear error for a tensor or disk that does not fit.

Run: python -m pytest tests/export/test_files.py
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError, UnsupportedModelError
from qvlm.progress import silent
from qvlm_export.build import build, image_spec, model_spec
from qvlm_export.targets import TARGETS, named_target
from qvlm_export.weights import INLINE_BYTES


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("target", TARGETS)
def test_two_builds_give_the_same_bytes(
    built: Callable[..., Any], tmp_path: Path, target: str
) -> None:
    folder, spec, checkpoint = built("w4a16-g64", target)
    again = build(Checkpoint(checkpoint.directory), named_target(target), tmp_path, None, silent)
    assert again == spec
    assert _files(folder) == _files(tmp_path)
    stems = [f"{target}/{stem}.onnx{end}" for stem in spec.graphs for end in ("", ".data")]
    assert sorted(_files(folder)) == sorted(stems)


@pytest.mark.parametrize("target", TARGETS)
def test_graphs_are_plain_onnx_with_constants_beside_them(
    built: Callable[..., Any], target: str
) -> None:
    folder, spec, _ = built("w8a8", target)
    for path in spec.graphs.values():
        onnx.checker.check_model(str(folder / path), full_check=True)
        proto = onnx.load(str(folder / path), load_external_data=False)
        assert {entry.domain for entry in proto.opset_import} == {""}
        assert {node.domain for node in proto.graph.node} == {""}
        assert str(folder).encode() not in (folder / path).read_bytes()
        spans = []
        for tensor in proto.graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if not entries:
                assert len(tensor.raw_data) < INLINE_BYTES
                continue
            assert entries["location"] == Path(path).name + ".data"
            spans.append((int(entries["offset"]), int(entries["length"])))
        ends = [start + length for start, length in spans]
        assert all(end <= start for end, (start, _) in zip(ends, spans[1:], strict=False))
        assert ends[-1] == (folder / (path + ".data")).stat().st_size


def test_interfaces_are_the_contracts(built: Callable[..., Any]) -> None:
    folder, spec, _ = built("float", "rtx")
    vision = ir.load(folder / spec.graphs["vision"]).graph
    assert [list(v.shape) for v in vision.inputs] == [[1, 3, 24, 24]]
    assert [list(v.shape) for v in vision.outputs] == [[9, 384]]
    decoder = ir.load(folder / spec.graphs["decoder"]).graph
    outputs = {str(v.name): [str(d) for d in v.shape] for v in decoder.outputs}
    assert outputs["logits"] == ["1", "1", "333"]
    assert outputs["present_key_1"] == ["1", "S", "2", "64"]


def _damaged(checkpoint: Checkpoint, folder: Path, name: str, change: Callable[[Any], None]) -> Any:
    """A copy of the checkpoint with one tensor changed."""
    shutil.copytree(checkpoint.directory, folder)
    shard = folder / "model-00001.safetensors"
    tensors = load_file(shard)
    array = np.array(tensors[name])
    change(array)
    save_file({**tensors, name: array}, shard, metadata={"format": "pt"})
    return Checkpoint(folder)


def _put(value: float) -> Callable[[Any], None]:
    def change(array: Any) -> None:
        array.flat[3] = value

    return change


GAIN = "model.language_model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("value", "target", "message"),
    [
        (np.nan, "ort", rf"{GAIN}: element \(3,\) is nan, expected finite"),
        (np.inf, "rtx", rf"{GAIN}: element \(3,\) is inf, expected finite"),
        (7e4, "jetpack6", rf"{GAIN}: largest magnitude 70000 overflows float16"),
    ],
)
def test_a_number_that_does_not_fit_names_its_tensor(
    built: Callable[..., Any], tmp_path: Path, value: float, target: str, message: str
) -> None:
    _, _, checkpoint = built("float", "ort")
    changed = _damaged(checkpoint, tmp_path / "checkpoint", GAIN, _put(value))
    with pytest.raises(ExportError, match=message):
        build(changed, named_target(target), tmp_path / "out", None, silent)
    left = sorted(path.name for path in (tmp_path / "out" / target).iterdir())
    assert left == ["vision.onnx", "vision.onnx.data"]  # whole; the decoder left nothing


def test_a_zero_scale_is_refused(built: Callable[..., Any], tmp_path: Path) -> None:
    _, _, checkpoint = built("w8a8", "ort")
    name = "model.language_model.layers.0.mlp.up_proj.weight_scale"
    changed = _damaged(checkpoint, tmp_path / "checkpoint", name, _put(0.0))
    with pytest.raises(ExportError, match=rf"{name}: not positive and finite.*Q-04"):
        build(changed, named_target("ort"), tmp_path / "out", None, silent)


def test_a_full_disk_leaves_nothing_half_written(
    built: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, checkpoint = built("float", "ort")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ExportError, match=r"vision\.onnx: not written .*No space left"):
        build(checkpoint, named_target("ort"), tmp_path, None, silent)
    assert _files(tmp_path) == {}


def test_config_and_weights_must_belong_together(built: Callable[..., Any], tmp_path: Path) -> None:
    _, _, checkpoint = built("float", "ort")
    changed = Checkpoint(checkpoint.directory)
    changed.config = {**changed.config, "text_config": dict(changed.config["text_config"])}
    changed.config["text_config"]["vocab_size"] = 400
    with pytest.raises(
        ExportError, match=r"embed_tokens.weight: shape \[333, 384\], expected \[400"
    ):
        build(changed, named_target("ort"), tmp_path, None, silent)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vision_feature_layer", 9, "hidden states 0 to 3"),
        ("vision_feature_select_strategy", "cls", "expected default or full"),
        ("projector_hidden_act", "mish", "activation 'mish', expected gelu"),
    ],
)
def test_options_beyond_the_family_are_refused(
    built: Callable[..., Any], tmp_path: Path, key: str, value: object, message: str
) -> None:
    _, _, checkpoint = built("float", "ort")
    changed = Checkpoint(checkpoint.directory)
    changed.config = {**changed.config, key: value}
    with pytest.raises(ExportError, match=message):
        build(changed, named_target("ort"), tmp_path, None, silent)


def test_unknown_names_list_the_known_ones(built: Callable[..., Any], tmp_path: Path) -> None:
    _, _, checkpoint = built("float", "ort")
    changed = Checkpoint(checkpoint.directory)
    changed.config = {**changed.config, "model_type": "qwen9"}
    with pytest.raises(UnsupportedModelError, match=r"model_type 'qwen9'.*Supported: llava"):
        build(changed, named_target("ort"), tmp_path, None, silent)
    with pytest.raises(ExportError, match=r"target 'gpu' is unknown. Known: ort, .*jetpack6"):
        named_target("gpu")
    with pytest.raises(ExportError, match="max_context 161: the model takes 2 to 160"):
        build(checkpoint, named_target("ort"), tmp_path, 161, silent)


def test_specs_of_the_manifest(built: Callable[..., Any]) -> None:
    _, _, checkpoint = built("float", "ort")
    model = model_spec(checkpoint, 100)
    assert (model.layers, model.kv_heads, model.head_dim, model.max_context) == (2, 2, 64, 100)
    assert (model.image_token, model.image_token_id, model.feature_size) == ("<image>", 7, 384)
    assert model.eos_token_ids == (2,)
    image = image_spec(checkpoint)
    assert (image.resize, image.crop) == (("shortest_edge", 24), (24, 24))
    assert (image.kind, image.rows) == ("whole", 9)
    assert image.pixels.rescale == pytest.approx(1 / 255, rel=1e-12)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (
            '{"image_processor": {"size": {"height": 8, "width": 8}, "do_center_crop": false}}',
            "takes",
        ),
        (
            '{"image_processor": {"size": {"shortest_edge": 24}, "do_center_crop": false}}',
            "any size",
        ),
        ('{"image_processor": {"crop_size": {"longest": 8}}}', "crop_size is"),
        ('{"image_processor": {"crop_size": 24, "image_mean": [0.5]}}', "image_mean is"),
        ("{}", "neither processor_config.json"),
    ],
)
def test_image_settings_that_do_not_fit_the_tower(
    built: Callable[..., Any], tmp_path: Path, processor: str, message: str
) -> None:
    _, _, checkpoint = built("float", "ort")
    shutil.copytree(checkpoint.directory, tmp_path / "c")
    (tmp_path / "c" / "processor_config.json").write_text(processor)
    with pytest.raises(ExportError, match=message):
        image_spec(Checkpoint(tmp_path / "c"))
