"""Proves the measurement: a row is the divergence of that unit alone, the model is float again afterwards, interrupted
runs continue, held-out samples do not calibrate, and a budget gives a recipe whose bytes are what a plan of it says.

Run: python -m pytest tests/core/test_sensitivity.py -q
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, write_source
from tiny_models import tiny_llava
from tiny_source import picture, tiny_processor, tiny_questions

from qvlm import cli, embedding, fakequant
from qvlm.errors import CalibrationError
from qvlm.methods import Context
from qvlm.methods.rtn import round_to_nearest
from qvlm.models import ADAPTERS
from qvlm.plan import plan, unmatched
from qvlm.quantize import build_samples
from qvlm.recipe import FORMATS, Recipe, load_recipe
from qvlm.source import Loaded, open_source, skeleton
from qvlm.trials import practice, sensitivity
from qvlm.trials.budget import rules
from qvlm.trials.job import Job
from qvlm.trials.judge import Judge
from qvlm.trials.results import Results
from qvlm.trials.sensitivity import Case, measure, units

ADAPTER = ADAPTERS["llava"]
LAYER = "model.language_model.layers.1"


def quiet(line: str) -> None:
    """Progress nobody reads."""


@pytest.fixture(scope="module")
def case() -> Case:
    model = tiny_llava().requires_grad_(False)
    samples = build_samples(Loaded(model, tiny_processor()), ADAPTER, tiny_questions(8))
    return Case(model, ADAPTER, samples, Recipe((), "rtn"), ("w4a16-g64", "w8a8"), 2)


@pytest.fixture(scope="module")
def rows(case: Case) -> list[dict[str, Any]]:
    return measure(case, Results(None, {}), quiet)


def find(rows: list[dict[str, Any]], kind: str, name: str, format_name: str) -> dict[str, Any]:
    found = [r for r in rows if (r["kind"], r["name"], r["format"]) == (kind, name, format_name)]
    assert len(found) == 1
    return found[0]


def test_a_row_is_that_unit_alone(case: Case, rows: list[dict[str, Any]]) -> None:
    """A layer and an embedding by hand on a fresh copy; round to nearest looks at no sample."""
    judge = Judge(case.model, case.split()[1])
    for format_name in ("w4a16-g64", "w8a8"):
        model = copy.deepcopy(case.model)
        linears = {n: m for n, m in ADAPTER.linears(model, "text").items() if LAYER in n}
        fakequant.apply(
            model, {n: round_to_nearest(m.weight, FORMATS[format_name]) for n, m in linears.items()}
        )
        row = find(rows, "layer", LAYER, format_name)
        assert row["kl"] == judge.measure(model)["kl"] > 0
        assert row["parameters"] == sum(m.weight.numel() for m in linears.values())
    model = copy.deepcopy(case.model)
    table = ADAPTER.embeddings[0]
    embedding.apply(model, embedding.quantize(model, {table: FORMATS["w8a16"]}, []))
    assert find(rows, "layer", table, "w8a16")["kl"] == judge.measure(model)["kl"] > 0


def test_a_table_behind_a_rotation_is_the_rotated_one(case: Case) -> None:
    """What a transform changed is measured, not the source's table in a changed model."""
    turned = replace(case, recipe=replace(case.recipe, transforms=("rotate",)), formats=("w8a8",))
    job = Job.begin(Context(case.model, ADAPTER, turned.split()[0], turned.recipe, {}))
    table = ADAPTER.embeddings[0]
    embedding.apply(job.model, embedding.quantize(job.model, {table: FORMATS["w8a16"]}, []))
    row = find(measure(turned, Results(None, {}), quiet), "layer", table, "w8a16")
    assert row["kl"] == Judge(case.model, turned.split()[1]).measure(job.model)["kl"] > 0


def test_a_component_is_all_of_its_layers(case: Case, rows: list[dict[str, Any]]) -> None:
    judge = Judge(case.model, case.split()[1])
    model = copy.deepcopy(case.model)
    linears = ADAPTER.linears(model, "text")
    fakequant.apply(
        model, {n: round_to_nearest(m.weight, FORMATS["w8a8"]) for n, m in linears.items()}
    )
    row = find(rows, "component", "text", "w8a8")
    assert row["kl"] == judge.measure(model)["kl"]
    layers = [
        r for r in rows if (r["kind"], r["component"], r["format"]) == ("layer", "text", "w8a8")
    ]
    assert row["bytes"] == sum(r["bytes"] for r in layers) and len(layers) == 2


def test_formats_that_do_not_fit_are_left_out(case: Case) -> None:
    """Vision is 96 wide, which no group divides; its 160 wide product neither."""
    found = {unit.key: unit.formats for unit in units(case.model, ADAPTER, case.formats, 2)}
    assert found["vision.model.vision_tower.encoder.layers.0"] == ("w8a8",)
    assert found[f"text.{LAYER}"] == ("w4a16-g64", "w8a8")
    assert found[f"embedding.{ADAPTER.embeddings[1]}"] == ("w4a16-g64",)
    # 640 columns are five blocks of 128, 384 are three: too few where four are needed.
    few = {unit.key: unit.formats for unit in units(case.model, ADAPTER, ("w4a16",), 4)}
    assert few[f"text.{LAYER}"] == ()
    # 333 outputs are odd (rule W-01): the head stays at INT8.
    assert found["head.lm_head"] == ("w8a8",)
    tied = tiny_llava(tie_word_embeddings=True, text_tie_word_embeddings=True)
    components = {unit.component for unit in units(tied, ADAPTER, case.formats, 2)}
    assert components == {"vision", "projector", "text", "embedding"}


def test_held_out_samples_do_not_calibrate(case: Case) -> None:
    fit, held = case.split()
    assert [id(s) for s in held] == [id(case.samples[i]) for i in (3, 7)]
    assert not {id(s) for s in fit} & {id(s) for s in held} and len(fit) == 6
    with pytest.raises(CalibrationError, match="at least 4"):
        Case(case.model, ADAPTER, case.samples[:3], case.recipe, case.formats, 2).split()


def test_an_interrupted_run_continues(
    case: Case, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"identity": {"a": 1}, "rows": rows[:7]}))
    lines: list[str] = []
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    again = measure(case, Results(path, {"a": 1}), lines.append)
    assert len(lines) == len(rows) - 7
    assert [{**r, "seconds": 0} for r in again] == [{**r, "seconds": 0} for r in rows]
    assert json.loads(path.read_text())["rows"] == json.loads(json.dumps(again))
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())


# -- published rules


def component_row(component: str, format_name: str, kl: float, nbytes: int) -> dict[str, Any]:
    key = {"kind": "component", "component": component, "name": component}
    return {**key, "format": format_name, "kl": kl, "bytes": nbytes}


def text_layers(kls: list[float]) -> list[dict[str, Any]]:
    return [
        {"kind": "layer", "component": "text", "name": str(i), "format": "w4a16", "kl": kl}
        for i, kl in enumerate(kls)
    ]


def test_rules_agree_and_differ() -> None:
    kls = {"vision": (0.1, 0.01), "projector": (0.05, 0.001), "text": (0.5, 0.02)}
    sizes = {"vision": (50, 100), "projector": (5, 10), "text": (100, 200)}
    agreeing = [
        component_row(c, name, kls[c][i], sizes[c][i])
        for c in kls
        for i, name in enumerate(("w4a16", "w8a8"))
    ]
    agreeing += text_layers([0.2, 0.2, 0.1, 0.1, 0.15, 0.1])
    assert [f.agrees for f in practice.check(agreeing)] == [True] * 5
    other = [{**r, "kl": 1 / r["kl"]} for r in agreeing]
    # 1 / KL: the decoder becomes the least sensitive, 8 bits worse than 4, the last third the worst.
    found = practice.check(other)
    assert [f.agrees for f in found] == [False, False, False, False, False], found
    # Without the four-bit rows nothing can be said.
    eight = [r for r in agreeing if r["format"] == "w8a8"]
    assert {f.agrees for f in practice.check(eight)} == {None}


# -- the command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of four questions."""
    data = tmp_path / "data"
    data.mkdir()
    lines = []
    for i in range(4):
        picture(i).save(data / f"{i}.png")
        lines.append({"image": f"{i}.png", "prompt": "What?", "answer": "cat"})
    (data / "samples.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return data


def test_files_that_are_no_results_of_ours_are_left_alone(
    tiny_source: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, recipe = tmp_path / "sensitivity.json", tmp_path / "recipe.json"
    command = ["sensitivity", str(tiny_source), "--method", "rtn", "--calib", str(data)]
    command += ["--formats", "w8a8", "--output", str(output), "--write-recipe", str(recipe)]
    recipe.write_text("edited")
    assert cli.main([*command, "--max-bits-per-weight", "9"]) == 1
    assert "recipe.json: exists" in capsys.readouterr().err and not output.exists()
    assert cli.main(command) == 0 and recipe.read_text() == "edited"
    whole = json.loads(output.read_text())
    named = whole["identity"]
    for change, said_of in (
        ({"rows": 3}, "no rows of an experiment"),
        ({"identity": {}}, "not a file of `qvlm sensitivity`"),
        ({"identity": {**named, "formats": [["x"]]}}, "not a file of"),
        ({"identity": {**named, "formats": ["float"]}}, "not a file of"),
        ({"rows": [{**whole["rows"][0], "kl": None}]}, "not a file of"),
    ):
        damaged = json.dumps({**whole, **change})
        output.write_text(damaged)
        capsys.readouterr()
        quantize = ["quantize", str(tiny_source), str(tmp_path / "out"), "--dry-run"]
        quantize += ["--max-bits-per-weight", "9", "--sensitivity", str(output)]
        assert cli.main(quantize) == 1
        said = capsys.readouterr().err
        assert f"sensitivity.json: {said_of}" in said and said.count("\n") == 1
        assert output.read_text() == damaged
    for option in ("--output", "--write-recipe"):
        assert cli.main([*command, "--max-memory", "9MB", option, str(tmp_path / "no" / "x")]) == 1
        assert "there is no folder" in capsys.readouterr().err


def test_formats_by_kind_of_token_are_tried_in_the_decoder_only(
    tiny_source: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sensitivity", str(tiny_source), "--method", "rtn", "--calib", str(data), "--json"]
    command += ["--formats", "w8a8-split", "w8a8", "--output", str(tmp_path / "rows.json")]
    assert cli.main(command) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {r["component"] for r in rows if r["format"] == "w8a8-split"} == {"text"}
    assert {"text", "vision"} <= {r["component"] for r in rows if r["format"] == "w8a8"}


def test_the_command_solves_a_budget_and_quantize_reads_its_file(
    tiny_source: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, recipe = tmp_path / "sensitivity.json", tmp_path / "recipe.json"
    command = ["sensitivity", str(tiny_source), "--method", "rtn", "--calib", str(data)]
    command += ["--formats", "w4a16-g64", "w8a8", "--output", str(output)]
    # What no recipe can keep is said before anything is measured.
    assert cli.main([*command, "--max-memory", "1000"]) == 1
    said = capsys.readouterr().err
    assert "budget: 1000 bytes, the smallest formats make" in said and "float in any" in said
    assert not output.exists()
    impossible = ["quantize", str(tiny_source), str(tmp_path / "out"), "--max-memory", "1000"]
    assert cli.main(impossible) == 1
    assert "the smallest formats make" in capsys.readouterr().err
    budget = ["--max-bits-per-weight", "6"]
    assert cli.main([*command, *budget, "--write-recipe", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    solution = found["solution"]
    assert solution["bits_per_weight"] <= 6 and solution["measured_kl"] > 0
    assert solution["optimality_gap"] == 0 and len(found["rules"]) == 5
    written = load_recipe(str(recipe))
    planned = plan(open_source(str(tiny_source)), written)
    assert planned.bits_per_weight == pytest.approx(solution["bits_per_weight"], abs=1e-4)
    assert sum(c.nbytes for c in planned.components) + planned.other_bytes == solution["bytes"]
    # Another budget in bytes, from the finished file, under the method asked for.
    quantize = ["quantize", str(tiny_source), str(tmp_path / "out"), "--method", "gptq"]
    quantize += ["--max-memory", str(solution["bytes"]), "--sensitivity", str(output), "--dry-run"]
    assert cli.main([*quantize, "--json"]) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert out["method"] == "gptq"
    assert [c["nbytes"] for c in out["components"]] == [c.nbytes for c in planned.components]
    # A file of other settings is not taken for this run's.
    assert cli.main([*command, "--seed", "1"]) == 1
    assert "results of other settings" in capsys.readouterr().err
    assert cli.main([*command, "--formats", "float"]) == 1
    assert "none of a linear" in capsys.readouterr().err
    assert sensitivity.HELD_OUT_EVERY == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budgets_rules_give_every_weight_its_format(family: str, tmp_path: Path) -> None:
    source = open_source(str(write_source(family, tmp_path / "source")))
    model = skeleton(source.directory)
    every = units(model, source.adapter, ("w4a16-g32", "w8a8"), 1)
    formats = {u.key: ("float", *u.formats)[i % (1 + len(u.formats))] for i, u in enumerate(every)}
    recipe = Recipe(rules(every, formats))
    for unit in every:
        for name in unit.shapes:
            assert recipe.format_of(unit.component, name).name == formats[unit.key], name
    assert unmatched(model, source.adapter, recipe) == ()
