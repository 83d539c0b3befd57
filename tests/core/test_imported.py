"""Proves that checkpoints others quantized are imported as they are: integers and scales equal those that an
independent packer wrote, the imported model is the dequantized one, and what cannot be kept is refused in one line.

Run: python -m pytest tests/core/test_imported.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_imported import DYNAMIC, KINDS, compressed, write_imported, write_source
from tiny_source import tiny_questions

from qvlm.checkpoint import Checkpoint
from qvlm.errors import QvlmError
from qvlm.plan import plan
from qvlm.progress import silent
from qvlm.quantize import quantize
from qvlm.recipe import RECIPES, Recipe, component_recipe
from qvlm.source import load, open_source
from qvlm.trials.sensitivity_run import SensitivityRun, Settings

FLOAT = RECIPES["float"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("imported") / "source")


def run(folder: Path, out: Path, recipe: Recipe = FLOAT) -> Checkpoint:
    return Checkpoint(quantize(str(folder), out, recipe, questions=tiny_questions(1), goldens=1))


@pytest.mark.parametrize("kind", KINDS)
def test_integers_and_scales_are_those_that_were_packed(
    source: Path, tmp_path: Path, kind: str
) -> None:
    grids = write_imported(source, tmp_path / "in", kind)
    assert len(grids) == 7
    checkpoint = run(tmp_path / "in", tmp_path / "out")
    assert set(checkpoint.linears) == set(grids)
    for name, (integers, scale) in grids.items():
        linear = checkpoint.linear(name)
        assert linear is not None
        assert linear.format.name == KINDS[kind][2]
        assert np.array_equal(linear.integers, integers)
        assert np.array_equal(linear.scale, scale.astype(np.float32))
        assert f"{name}.bias" in checkpoint or "self_attn" not in name


def test_the_float_side_is_the_dequantized_model_and_both_kinds_of_names_are_read(
    source: Path, tmp_path: Path
) -> None:
    grids = write_imported(source, tmp_path / "in", "gptq")
    write_imported(source, tmp_path / "modern", "gptq", modern_names=True)
    floats, modern = (load(open_source(str(tmp_path / n))) for n in ("in", "modern"))
    for name, (integers, scale) in grids.items():
        value = integers.astype(np.float64) * np.repeat(scale.astype(np.float64), 128, 1)
        # An integer below 2^4 times a float16 scale (11 bits) is exact in float32.
        assert np.array_equal(floats.model.get_parameter(f"{name}.weight").numpy(), value)
    states = floats.model.state_dict(), modern.model.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert set(modern.imported) == set(grids)
    golden = run(tmp_path / "in", tmp_path / "out").goldens()[0]
    assert np.array_equal(golden.outputs["float"]["logits"], golden.outputs["quant"]["logits"])


def test_int8_inputs_are_rounded_in_the_quantized_goldens_only(
    source: Path, tmp_path: Path
) -> None:
    write_imported(source, tmp_path / "in", "w8a8")
    golden = run(tmp_path / "in", tmp_path / "out").goldens()[0]
    assert not np.array_equal(golden.outputs["float"]["logits"], golden.outputs["quant"]["logits"])


def test_the_rest_follows_the_recipe_and_the_plan_says_so(source: Path, tmp_path: Path) -> None:
    grids = write_imported(source, tmp_path / "in", "awq")
    recipe = component_recipe("w4a16", "w8a8", "w8a8", method="gptq")
    planned = {
        c.component: c.formats for c in plan(open_source(str(tmp_path / "in")), recipe).components
    }
    assert planned["text"] == {"w4a16-g64": 7}
    assert set(planned["vision"]) == {"w8a8"}
    checkpoint = run(tmp_path / "in", tmp_path / "out", recipe)
    kinds = {name: entry["format"] for name, entry in checkpoint.linears.items()}
    assert {kinds[name] for name in grids} == {"w4a16-g64"}
    assert {kind for name, kind in kinds.items() if name not in grids} == {"w8a8"}
    for name, (integers, _) in grids.items():
        linear = checkpoint.linear(name)
        assert linear is not None and np.array_equal(linear.integers, integers)


def tensor(folder: Path, suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the first stored tensor whose name ends so."""
    tensors = load_file(folder / "model.safetensors")
    name = min(n for n in tensors if n.endswith(suffix))
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def renamed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if ".0.mlp.up_proj." in n]:
        tensors[name.replace("up_proj", "experts.up_proj")] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CONFIG_REFUSALS = {
    "three bits": ("gptq", {"bits": 3}, "with 3 bits, expected 4"),
    "eight bits": ("gptq", {"bits": 8}, "with 8 bits, expected 4"),
    "one group a row": ("gptq", {"group_size": -1}, "in groups of -1, expected 32, 64 or 128"),
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, "as 'marlin', expected gptq"),
    "gemv": ("awq", {"version": "gemv"}, "as version 'gemv', expected gemm"),
    "fp8": ("awq", {"quant_method": "fp8"}, r"\(fp8\), read are gptq, awq"),
    "cache": ("w4a16", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    "float8": ("w8a8", {"format": "float-quantized"}, "format 'float-quantized', expected"),
    "no groups": ("w8a8", {"config_groups": {}}, "without config_groups"),
    "no entry": ("w8a8", {"config_groups": {"group_0": 8}}, "another kind of value than expected"),
    "no number": ("gptq", {"group_size": [128]}, "another kind of value than expected"),
    "static": (
        "w8a8",
        compressed("int-quantized", None, **{**DYNAMIC, "dynamic": False}),
        "inputs are not dynamic",
    ),
    "w4a8": ("w4a16", compressed("pack-quantized", 64, **DYNAMIC), "packed weights with quantized"),
}
TENSOR_REFUSALS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "gptq zero": ("gptq", lambda f: tensor(f, ".qzeros", lambda t: t + 1), "zero points other"),
    "awq zero": ("awq", lambda f: tensor(f, ".qzeros", lambda t: t + 1), "zero points other"),
    "act-order": ("gptq", lambda f: tensor(f, ".g_idx", lambda t: t.flip(0)), "reordered"),
    "experts": ("gptq", renamed, "is none of the linears .* .fused experts"),
    "shape": ("awq", lambda f: tensor(f, ".qweight", lambda t: t[1:]), "qweight of shape"),
    "scale": (
        "w4a16",
        lambda f: tensor(f, ".weight_scale", lambda t: t * 1e-4),
        "no normal positive float16",
    ),
}


@pytest.mark.parametrize("name", CONFIG_REFUSALS)
def test_a_quantization_that_cannot_be_kept_is_one_line(
    source: Path, tmp_path: Path, name: str
) -> None:
    kind, changes, message = CONFIG_REFUSALS[name]
    shutil.copytree(source, tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    stored = {**json.loads(path.read_text()), "quantization_config": {**KINDS[kind][1], **changes}}
    path.write_text(json.dumps(stored))
    with pytest.raises(QvlmError, match=message) as caught:
        open_source(str(tmp_path / "in"))
    assert "\n" not in str(caught.value)
    assert "float checkpoint" in str(caught.value)


@pytest.mark.parametrize("name", TENSOR_REFUSALS)
def test_integers_that_cannot_be_kept_are_one_line(source: Path, tmp_path: Path, name: str) -> None:
    kind, change, message = TENSOR_REFUSALS[name]
    write_imported(source, tmp_path / "in", kind)
    change(tmp_path / "in")
    with pytest.raises(QvlmError, match=message) as caught:
        run(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_transform_may_not_change_stored_integers(source: Path, tmp_path: Path) -> None:
    write_imported(source, tmp_path / "in", "w8a8")
    recipe = component_recipe("w4a16", "w8a8", "w8a8", transforms=("rotate",))
    with pytest.raises(QvlmError, match="change weights that are integers already"):
        run(tmp_path / "in", tmp_path / "out", recipe)
    # A method that would rotate by itself does not, unless it is asked to.
    unasked = replace(recipe, method="fused", transforms=())
    assert plan(open_source(str(tmp_path / "in")), unasked).method == "fused"
    with pytest.raises(QvlmError, match="change weights that are integers already"):
        plan(open_source(str(tmp_path / "in")), unasked.with_options(rotations=["values"]))


def test_trials_of_formats_want_float_weights(source: Path, tmp_path: Path) -> None:
    write_imported(source, tmp_path / "in", "gptq")
    with pytest.raises(QvlmError, match=r"already quantized \(gptq\), and trials") as caught:
        SensitivityRun(str(tmp_path / "in"), Settings(), None, silent)
    assert "\n" not in str(caught.value)
