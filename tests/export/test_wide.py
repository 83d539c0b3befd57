"""Proves that layers which float16 does not hold are computed in float32: the answers of a model whose
activations pass 10^6, through every format and cache form, where the plain float16 graph gives
infinities; the same integer products in as many kernels; and that an overflow where float16 has to
stay is refused.

Run: python -m pytest tests/export/test_wide.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen
import torch
from tiny_models import tiny_llava
from tiny_source import tiny_processor, tiny_questions

from qvlm.checkpoint import MAGNITUDES, Checkpoint
from qvlm.errors import ExportError, VerificationError
from qvlm.progress import silent
from qvlm.quantize import quantize
from qvlm.recipe import RECIPES
from qvlm_export import build as building
from qvlm_export import rtx
from qvlm_export.build import build, image_spec, model_spec
from qvlm_export.builder import profiles
from qvlm_export.cli import main
from qvlm_export.conform import check_graph
from qvlm_export.facts import graph_facts
from qvlm_export.float_range import HEADROOM, overflow
from qvlm_export.kernels import check_kernels
from qvlm_export.targets import Target, Variant, named_target
from qvlm_export.verify import verify_target
from qvlm_export.weights import FLOAT16_MAX
from qvlm_export.wide import Overflow

TEXT = "model.language_model.layers"
APPEND = named_target("rtx", Variant(overflow="float32"))
SCATTER = named_target("rtx", Variant(overflow="float32", cache="scatter"))


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """recipe name -> the checkpoint of a tiny model whose first layers make its streams leave float16:
    1.7e6 in the decoder, 1.2e5 in the tower.
    """
    folder = tmp_path_factory.mktemp("loud")
    model, made = tiny_llava(), dict[str, Checkpoint]()
    with torch.no_grad():
        text = model.model.language_model.layers[0].mlp
        text.down_proj.weight *= 300
        text.up_proj.weight *= 3000
        tower = model.model.vision_tower.encoder.layers[0].mlp
        tower.fc1.weight *= 300
        tower.fc2.weight *= 100
        model.model.multi_modal_projector.linear_1.weight *= 0.0005
    model.save_pretrained(folder / "source")
    tiny_processor().save_pretrained(folder / "source")

    def checkpoint(recipe: str) -> Checkpoint:
        if recipe not in made:
            made[recipe] = Checkpoint(
                quantize(
                    str(folder / "source"),
                    folder / recipe,
                    replace(RECIPES[recipe], method="rtn"),
                    questions=tiny_questions(),
                    goldens=2,
                )
            )
        return made[recipe]

    return checkpoint


def recorded(checkpoint: Path, copy: Path, rows: dict[tuple[str, str], float]) -> Checkpoint:
    """A copy of a checkpoint that says these magnitudes."""
    shutil.copytree(checkpoint, copy)
    table = json.loads((copy / MAGNITUDES).read_text())
    for (module, side), value in rows.items():
        table.setdefault(module, {})[side] = value
    (copy / MAGNITUDES).write_text(json.dumps(table))
    return Checkpoint(copy)


@pytest.mark.parametrize(
    ("recipe", "target"),
    [("w4a16", APPEND), ("w8a8", SCATTER), ("float", APPEND)],
    ids=["INT4", "INT8 in place", "float"],
)
def test_a_model_that_leaves_float16_answers_as_torch_does(
    loud: Callable[..., Checkpoint], tmp_path: Path, recipe: str, target: Target
) -> None:
    checkpoint = loud(recipe)
    assert overflow(checkpoint, target).below(f"{TEXT}.0")
    spec = build(checkpoint, target, tmp_path, None, silent)
    assert all(row.passed for row in verify_target(tmp_path, spec, checkpoint, silent).rows)
    for path in spec.graphs.values():
        assert [finding.line() for finding in check_graph(tmp_path / path, target)] == []
    plain = build(checkpoint, replace(target, dtype="bfloat16"), tmp_path / "b", None, silent)
    for stem, path in spec.graphs.items():  # no integer product is lost to float32
        facts, other = (
            graph_facts(p) for p in (tmp_path / path, tmp_path / "b" / plain.graphs[stem])
        )
        assert facts.products == other.products


def test_without_it_float16_gives_infinities(
    loud: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is right, and the test above tests something."""
    with pytest.raises(ExportError, match=r"reaches 1\.7\d*e\+06 .*--overflow float32, .*bfloat16"):
        build(loud("float"), named_target("rtx"), tmp_path, None, silent)
    monkeypatch.setattr(building, "overflow", lambda *_: Overflow())
    spec = build(loud("float"), named_target("rtx"), tmp_path, None, silent)
    with pytest.raises(VerificationError, match=r"inf|nan"):
        verify_target(tmp_path, spec, loud("float"), silent)


def test_a_range_within_float16_changes_no_graph(built: Callable[..., Any], tmp_path: Path) -> None:
    folder, spec, checkpoint = built("w4a16", "rtx")
    build(checkpoint, APPEND, tmp_path, None, silent)
    for path in spec.graphs.values():
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes()


@pytest.mark.parametrize(
    ("module", "side"),
    [
        (f"{TEXT}.1.self_attn.v_proj", "output"),
        (f"{TEXT}.1.self_attn.o_proj", "input"),
        ("model.multi_modal_projector.linear_2", "output"),
        ("model.vision_tower.encoder.layers.0.self_attn.k_proj", "output"),
    ],
)
def test_what_has_to_stay_float16_is_refused_by_name(
    tiny_checkpoint: Path, tmp_path: Path, module: str, side: str
) -> None:
    checkpoint = recorded(tiny_checkpoint, tmp_path / "c", {(module, side): 1e5})
    with pytest.raises(ExportError, match=rf"{module} {side} reaches 100000 .*--dtype bfloat16"):
        build(checkpoint, APPEND, tmp_path, None, silent)


def test_static_integers_read_float16(tiny_case: Callable[..., Any], tmp_path: Path) -> None:
    source = tiny_case("w8a8-static").directory
    (source / MAGNITUDES).write_text("{}")
    checkpoint = recorded(source, tmp_path / "c", {("model.multi_modal_projector", "input"): 1e5,
                          ("model.vision_tower.encoder.layers.1", "output"): 1e5})  # fmt: skip
    with pytest.raises(ExportError, match=r"layers\.1 output reaches 100000 .* static INT8"):
        build(checkpoint, APPEND, tmp_path, None, silent)


@pytest.mark.parametrize(
    "rows",
    [
        {(f"{TEXT}.0.mlp.down_proj", "input"): 1e5},
        {(f"{TEXT}.1.input_layernorm", "output"): 1e5},
        {(f"{TEXT}.0.mlp.gate_proj", "output"): 1e5, (f"{TEXT}.0.self_attn.o_proj", "output"): 1e5},
        {("model.vision_tower.encoder.layers.1.layer_norm2", "output"): 1e5},
        {("model.multi_modal_projector.linear_1", "output"): 1e5},
    ],
    ids=["product of gates", "norm", "attention and gate", "layer norm", "projector"],
)
@pytest.mark.parametrize("recipe", ["w4a16", "w8a8"])
def test_any_module_may_be_the_one(
    tiny_case: Callable[..., Any], tmp_path: Path, recipe: str, rows: dict[tuple[str, str], float]
) -> None:
    """Of a model that float16 holds: what is float32 in it changes no answer."""
    source = tiny_case(recipe).directory
    (source / MAGNITUDES).write_text("{}")
    checkpoint = recorded(source, tmp_path / "c", rows)
    spec = build(checkpoint, APPEND, tmp_path, None, silent)
    assert all(row.passed for row in verify_target(tmp_path, spec, checkpoint, silent).rows)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_families_with_parts_of_their_own(tmp_path: Path, family: str) -> None:
    """Gated towers, windows, norms of queries, deepstack."""
    source = tiny_qwen.write_tiny_source(tmp_path / "source", family)
    out = tmp_path / "checkpoint"
    recipe = replace(RECIPES["w4a16"], method="rtn")
    quantize(str(source), out, recipe, questions=tiny_qwen.tiny_questions(2), goldens=2)
    rows = {
        (f"{name}", side): FLOAT16_MAX / HEADROOM + 1
        for name in Checkpoint(out).magnitudes()
        if name.endswith((".mlp", ".blocks.0", f"{TEXT}.0"))
        for side in ("input", "output")
    }
    assert len(rows) > 8
    checkpoint = recorded(out, tmp_path / "c", rows)
    spec = build(checkpoint, APPEND, tmp_path, None, silent)
    assert all(row.passed for row in verify_target(tmp_path, spec, checkpoint, silent).rows)
    found = [f for path in spec.graphs.values() for f in check_graph(tmp_path / path, APPEND)]
    assert [finding.line() for finding in found if finding.level != "info"] == []


def test_the_command_takes_it(
    loud: Callable[..., Checkpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(loud("w4a16").directory), str(tmp_path / "out"), "--target", "jetpack6"]
    assert main(words) == 1
    assert "--overflow float32" in capsys.readouterr().err
    assert main([*words, "--overflow", "float32"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())["targets"]["jetpack6"]
    assert report["largest activations"][0]["largest"] > 1e6
    # The report lists what is float32: everything recorded above the limit and nothing else.
    magnitudes = json.loads((loud("w4a16").directory / MAGNITUDES).read_text())
    above = {
        (module, side)
        for module, sides in magnitudes.items()
        for side, value in sides.items()
        if value > FLOAT16_MAX / HEADROOM
    }
    assert {(row["module"], row["side"]) for row in report["float32"]} == above != set()
    page = (tmp_path / "out/report.html").read_text()
    kept = page.index("float32 in this target's graphs") if "target's" in page else -1
    assert kept > 0 and all(module in page[kept:] for module, _ in above)


@pytest.mark.rtx
@pytest.mark.parametrize("recipe", ["w4a16", "w8a8", "float"])
def test_it_costs_one_kernel_at_most(
    loud: Callable[..., Checkpoint], tmp_path: Path, recipe: str
) -> None:
    """Of prefill and of decode, over the bfloat16 graph, which has the plain float16 graph's nodes."""
    pytest.importorskip("tensorrt_rtx_bindings")
    checkpoint, counts = loud(recipe), []
    shapes = profiles("decoder", model_spec(checkpoint), image_spec(checkpoint))
    for target in (replace(APPEND, dtype="bfloat16"), APPEND):
        spec = build(checkpoint, target, tmp_path / target.dtype, None, silent)
        path = tmp_path / target.dtype / spec.graphs["decoder"]
        _, kernels = rtx.compile_graph(path, shapes, 86)
        check_kernels(kernels, graph_facts(path), recipe)
        counts.append([sum(k.profile == i for k in kernels) for i in (0, 1)])
    plain, wide = counts
    assert all(n <= m + 1 for n, m in zip(wide, plain, strict=True)), counts
