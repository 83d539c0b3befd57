"""Proves that every damaged or unsuitable source is refused by one line naming file, finding and way out.

Run: python -m pytest tests/core/test_source.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvlm.errors import CheckpointError, UnsupportedModelError
from qvlm.generate import stop_tokens
from qvlm.source import build_model, load, open_source, skeleton

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_source, tmp_path / "model"))


def edit_config(source: Path, **changes: object) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(source: Path) -> None:
    data = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(data[:-10])


def shard(source: Path, name: str) -> None:
    names = list(load_file(source / WEIGHTS))
    (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda s: (s / "config.json").unlink(), r"config.json: not found"),
    "config not JSON": (lambda s: (s / "config.json").write_text("{"), "not readable as JSON"),
    "no weights": (lambda s: (s / WEIGHTS).unlink(), f"neither {WEIGHTS} nor {INDEX}"),
    "truncated": (truncate, r"model.safetensors: \d+ bytes, expected \d+: truncated"),
    "empty file": (
        lambda s: (s / WEIGHTS).write_bytes(b""),
        r"truncated or not safetensors \(0 bytes\)",
    ),
    "header cut": (
        lambda s: (s / WEIGHTS).write_bytes((s / WEIGHTS).read_bytes()[:100]),
        "truncated or not safetensors",
    ),
    "header not JSON": (
        lambda s: (s / WEIGHTS).write_bytes(b"\x04" + bytes(7) + b"abcd"),
        "header is not JSON",
    ),
    "header without offsets": (
        lambda s: (s / WEIGHTS).write_bytes(b"\x08" + bytes(7) + b'{"a":{}}'),
        "header without data_offsets",
    ),
    "shard absent": (lambda s: shard(s, "model-2.safetensors"), "model-2.safetensors: listed in"),
    "shard outside": (lambda s: shard(s, "../x.safetensors"), "not a plain file name"),
    "index empty": (lambda s: (s / INDEX).write_text('{"weight_map": {}}'), "no weight_map"),
    "remote code": (
        lambda s: edit_config(s, auto_map={"AutoModel": "modeling.Evil"}),
        r"config.json: asks to run Python code from the checkpoint",
    ),
    "remote code in the processor": (
        lambda s: (s / "preprocessor_config.json").write_text('{"auto_map": {}}'),
        r"preprocessor_config.json: asks to run Python code",
    ),
    "quantized": (
        lambda s: edit_config(s, quantization_config={"quant_method": "awq"}),
        r"already quantized \(awq\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_line(source: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(source)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(str(source))
    assert "\n" not in str(caught.value)


def test_an_unknown_family_lists_the_known_ones(source: Path) -> None:
    edit_config(source, model_type="moondream9")
    with pytest.raises(
        UnsupportedModelError, match=r"'moondream9' is not supported. Supported: llava"
    ):
        open_source(str(source))


@pytest.mark.parametrize("name", ["nowhere", "/no/such/directory", "a/b/c"])
def test_a_name_that_is_nothing(name: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"not a directory. Give a Hugging Face model directory"
    ):
        open_source(name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_name_their_tensor(source: Path, value: float) -> None:
    tensors = load_file(source / WEIGHTS)
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 4] = value
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight has 1 NaN or Inf values"):
        load(open_source(str(source)))


def test_a_tensor_that_no_shard_holds_is_named(source: Path) -> None:
    tensors = load_file(source / WEIGHTS)
    gone = next(n for n in tensors if n.endswith("o_proj.weight"))
    del tensors[gone]
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"o_proj.weight is in none of the shards \(1 missing\)"
    ):
        load(open_source(str(source)))


def test_a_tensor_of_another_shape_is_refused(source: Path) -> None:
    edit_config(
        source,
        text_config={
            **json.loads((source / "config.json").read_text())["text_config"],
            "vocab_size": 340,
        },
    )
    with pytest.raises(CheckpointError, match="transformers cannot load it") as caught:
        load(open_source(str(source)))
    assert "\n" not in str(caught.value)


def test_a_processor_that_cannot_be_made(source: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (source / name).unlink()
    with pytest.raises(
        CheckpointError, match="tokenizer or image processor not loadable"
    ) as caught:
        load(open_source(str(source)))
    assert "\n" not in str(caught.value)


def test_a_sharded_source_opens(source: Path) -> None:
    tensors = load_file(source / WEIGHTS)
    (source / WEIGHTS).unlink()
    names = list(tensors)
    parts = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, held in parts.items():
        save_file({n: tensors[n] for n in held}, source / file, metadata={"format": "pt"})
    index = {n: file for file, held in parts.items() for n in held}
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    opened = open_source(str(source))
    assert opened.shards == ("a.safetensors", "b.safetensors")
    assert load(opened).model.dtype == torch.float32


def test_the_skeleton_has_names_and_shapes_without_memory(tiny_source: Path) -> None:
    model = skeleton(tiny_source)
    loaded = load(open_source(str(tiny_source))).model
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert shapes == {n: p.shape for n, p in loaded.named_parameters()}
    assert all(p.is_meta for p in model.parameters())


def test_a_model_built_from_tensors_computes_the_same(source: Path) -> None:
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    loaded = load(open_source(str(source))).model
    tensors = {n: t.clone() for n, t in loaded.state_dict().items()}
    built = build_model(source, tensors)
    assert stop_tokens(built) == stop_tokens(loaded) == {2, 5}
    ids = torch.tensor([[1, 20, 30]])
    assert torch.equal(built(input_ids=ids).logits, loaded(input_ids=ids).logits)
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not stored"):
        build_model(source, tensors)
