"""Proves the harness: the syntax of methods and formats, rows that are what a run by hand gives, resuming without
measuring twice, refusals, and the command with shipped and with a user's questions.

Run: python -m pytest tests/core/test_compare.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_source import picture, tiny_questions

from qvlm import cli
from qvlm.checkpoint import Checkpoint
from qvlm.data import calibration
from qvlm.errors import CalibrationError, RecipeError
from qvlm.evaluate import load_quantized, scorer, sizes
from qvlm.quantize import build_samples, quantize
from qvlm.recipe import RECIPES, LayerRule, Recipe, component_recipe, named_format
from qvlm.source import load, open_source
from qvlm.trials import compare
from qvlm.trials.compare import Case, parse_format, parse_method, recipes, spread, table_rows
from qvlm.trials.job import Job
from qvlm.trials.judge import Judge
from qvlm.trials.results import Results

QUESTIONS = [replace(q, answer=q.answer or "cat") for q in tiny_questions(5)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rtn", (("rtn",), {})),
        ("rotate+awq+gptq:damping=0.02", (("rotate", "awq", "gptq"), {"damping": 0.02})),
        ("fused:refine=false", (("fused",), {"refine": False})),
        ("q-vlm:depth=2, partition=layer", (("q-vlm",), {"depth": 2, "partition": "layer"})),
        (
            "x:a=[1.0,0.98],b=null,c=w4a16-g64",
            (("x",), {"a": [1.0, 0.98], "b": None, "c": "w4a16-g64"}),
        ),
        ('x:a="b,c=d",e={"f": 1}', (("x",), {"a": "b,c=d", "e": {"f": 1}})),
        ('x:a="b+c"', (("x",), {"a": "b+c"})),
    ],
)
def test_methods_carry_options(text: str, expected: Any) -> None:
    assert parse_method(text) == expected


@pytest.mark.parametrize(
    "text", ["x:", "x:a", "x:a=", "x:a=1 b=2", "x:a=1,", "x:=1", "x:a=[1", "+x", "y+"]
)
def test_unreadable_methods_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"expected .* Write name, name:option=value") as caught:
        parse_method(text)
    assert "\n" not in str(caught.value)


def test_a_format_is_a_recipe_or_the_decoders_number_format() -> None:
    assert parse_format("w4a16") == RECIPES["w4a16"]
    three = parse_format("w3a16")
    found = {
        part: three.format_of(part, "x").name for part in ("text", "vision", "projector", "head")
    }
    assert found == {"text": "w3a16", "vision": "w8a8", "projector": "w8a8", "head": "float"}
    with pytest.raises(RecipeError, match=r"neither known .*w8a8-split.*w3a16"):
        parse_format("w5a5")
    with pytest.raises(
        RecipeError, match="transform 'spin' is unknown"
    ):  # before anything is loaded
        recipes(["w4a16"], ["spin+gptq"])
    (rotated,) = recipes(["w4a16"], ["rotate+gptq:damping=0.02"])["w4a16"].values()
    assert (rotated.method, rotated.transforms) == ("gptq", ("rotate",))
    assert rotated.options == {"damping": 0.02}
    with pytest.raises(RecipeError, match="method 'nope' is unknown"):
        recipes(["w4a16"], ["nope"])
    with pytest.raises(RecipeError, match="unknown option 'nope'"):
        recipes(["w4a16"], ["gptq:nope=1"])


@pytest.fixture
def case(tiny_source: Path, tmp_path: Path) -> Case:
    source = open_source(str(tiny_source))
    loaded = load(source)
    draws = [
        build_samples(loaded, source.adapter, [replace(q, prompt=f"{q.prompt} {d}") for q in tiny_questions(2)])
        for d in range(2)
    ]  # fmt: skip
    asked = build_samples(loaded, source.adapter, QUESTIONS)
    return Case(
        source, loaded.model, draws, QUESTIONS, asked, Judge(loaded.model, asked),
        None, tmp_path / "rows.json", [].append,
    )  # fmt: skip


def decoder_only(*methods: str) -> dict[str, dict[str, Recipe]]:
    """Recipes of w4a16 on the decoder alone, which is quicker."""
    found = recipes(["w4a16"], methods)["w4a16"]
    rules = component_recipe("w4a16", "float", "float").rules
    return {"w4a16": {name: replace(recipe, rules=rules) for name, recipe in found.items()}}


def test_rows_and_resume(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = decoder_only("rtn", "gptq:damping=0.02")
    outcome = compare.compare(case, wanted)
    names = [(r["format"], r["method"], r["draw"]) for r in outcome.rows]
    assert names == [
        ("float", "float", 0),
        *(("w4a16", method, draw) for method in ("rtn", "gptq:damping=0.02") for draw in (0, 1)),
    ]
    assert outcome.refused == []
    floats, rtn, again, *gptq = outcome.rows
    assert floats["kl"] == 0.0 and floats["bits_per_weight"] == 16.0
    assert rtn["kl"] == again["kl"] > 0  # round to nearest sees no sample
    assert gptq[0]["kl"] != gptq[1]["kl"]  # another draw
    for row in outcome.rows:
        assert set(row["per_task"]) == {"a", "b"}
        # Three of five questions are of task a.
        mean = (3 * row["per_task"]["a"] + 2 * row["per_task"]["b"]) / 5
        assert row["exact_match"] == pytest.approx(mean)
        assert len(row["image_error"]) == len(row["text_error"]) == 2
        assert row["perplexity"] > 1 and row["seconds"] >= 0
    # Interrupted after four rows: the last comes again and is the same, nothing is measured twice.
    path = case.results
    assert path is not None
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "rows": data["rows"][:4]}))
    runs: list[str] = []
    quantized = compare.quantized
    monkeypatch.setattr(
        compare, "quantized", lambda c: (runs.append(c.recipe.method), quantized(c))[1]
    )
    resumed = compare.compare(case, wanted)
    assert runs == ["gptq"]
    assert [_steady(r) for r in resumed.rows] == [_steady(r) for r in outcome.rows]
    # Fewer draws are found; another option or other samples under the same name are other rows.
    monkeypatch.setattr(
        compare, "quantized", lambda c: (runs.append(c.recipe.method), Job(c, c.model, {}))[1]
    )
    compare.compare(replace(case, draws=case.draws[:1]), wanted)
    assert len(runs) == 1
    compare.compare(case, decoder_only("gptq:damping=0.03"))
    assert len(runs) == 3
    compare.compare(replace(case, draws=case.draws[::-1]), wanted)
    assert len(runs) == 7
    # Rows of another version of a method are not found.
    sources = compare._source_digests()
    assert {"affine.py", "recipe.py", "methods/fused.py", "trials/judge.py"} <= sources.keys()
    changed = {**sources, "methods/rtn.py": "changed"}
    monkeypatch.setattr(compare, "_source_digests", lambda: changed)
    compare.compare(case, decoder_only("rtn"))
    assert len(runs) == 9
    other = replace(case, questions=[replace(q, task="c") for q in QUESTIONS])
    assert set(compare.compare(other, {}).rows[0]["per_task"]) == {"c"}


def _steady(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("seconds", "peak_mb")}


@pytest.mark.parametrize("embedded", [False, True], ids=["linears", "embeddings too"])
def test_a_row_is_the_checkpoint_that_quantize_writes(
    case: Case, tmp_path: Path, embedded: bool
) -> None:
    """Size and answers of the in-memory row against the driver's own result."""
    recipe = replace(RECIPES["w4a16"], method="rtn")
    if embedded:
        formats = {"embedding.*patch*": "w4a16-g64", "embedding.*": "w8a16"}
        rules = [LayerRule(pattern, named_format(name)) for pattern, name in formats.items()]
        recipe = replace(recipe, rules=(*rules, *recipe.rules))
    row = compare.compare(case, {"w4a16": {"rtn": recipe}}).rows[1]
    output = quantize(case.source, tmp_path / "out", recipe, questions=tiny_questions(2), goldens=1)
    total = sizes(Checkpoint(output))[-1]
    assert row["bits_per_weight"] == pytest.approx(total.bits_per_weight, abs=1e-9)
    reloaded = load_quantized(output)
    found = case.judge.measure(reloaded.model)
    assert (row["kl"], row["exact_match"]) == (found["kl"], found["exact_match"])


def test_generated_answers_are_scored_where_asked(case: Case) -> None:
    """A model that answers nothing, and one question that accepts it."""
    loaded = load(case.source)
    head = loaded.model.get_submodule("lm_head")
    head.register_forward_hook(
        lambda m, a, out: (
            1e4 * torch.nn.functional.one_hot(torch.tensor(2), out.shape[-1]) + 0 * out
        )
    )
    accepted = [replace(q, also=(" .",) if i == 3 else ()) for i, q in enumerate(QUESTIONS)]
    score = scorer(loaded, accepted)
    assert score(loaded.model) == [False, False, False, True, False]
    silent = replace(case, model=loaded.model, questions=accepted, score=score)
    assert compare.compare(silent, {}).rows[0]["exact_match"] == 1 / 5


def test_a_refused_combination_is_reported_and_the_rest_goes_on(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = compare.quantized

    def picky(context: Any) -> Any:
        if context.recipe.method == "gptq":
            raise RecipeError("gptq: does not take this")
        return quantized(context)

    monkeypatch.setattr(compare, "quantized", picky)
    outcome = compare.compare(case, recipes(["w4a16"], ["gptq", "rtn"]))
    assert [r["method"] for r in outcome.rows] == ["float", "rtn", "rtn"]
    reason = "gptq: does not take this"
    assert outcome.refused == [{"method": "gptq", "format": "w4a16", "reason": reason}]
    with pytest.raises(RecipeError, match="nothing to compare: gptq: does not take this"):
        compare.compare(case, recipes(["w8a8"], ["gptq"]))


def test_the_table_gives_mean_and_spread() -> None:
    assert spread([1.0, 3.0], ".2f") == "2.00 ± 1.41"
    assert spread([0.001, 0.003], ".3e") == "2.000e-03 ± 1.4e-03"
    assert spread([2.0], ".2f") == "2.00"
    assert spread([None, 1.0], ".2f") == "-"
    row = {
        "format": "f", "method": "m", "kl": 0.5, "kl_trimmed": 0.25, "exact_match": 0.75, "perplexity": 1.5,
        "image_error": [0.1, 0.3], "text_error": [], "bits_per_weight": 4.5, "seconds": 2.0,
        "peak_mb": None, "per_task": {"a": 1.0},
    }  # fmt: skip
    (cells,) = table_rows([row])
    assert cells == (
        "f", "m", "5.000e-01", "2.500e-01", "0.7500", "1.50000", "2.000e-01", "-", "4.500", "2.0", "-",
    )  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """Calibration and evaluation folders without a common question."""
    for name, first in (("calib", 0), ("eval", 10)):
        path = tmp_path / name
        path.mkdir()
        lines = []
        for i in range(first, first + 3):
            picture(i).save(path / f"{i}.png")
            lines.append({"image": f"{i}.png", "prompt": "What?", "answer": ["cat", "dog"]})
        (path / "samples.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return str(tmp_path / "calib"), str(tmp_path / "eval")


def test_the_command(
    tiny_source: Path, folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calib, asked = folders
    command = ["compare", str(tiny_source), "--calib", calib, "--eval", asked, "--samples", "2"]
    command += ["--draws", "1", "--methods", "rtn", "--results", str(tmp_path / "rows.json")]
    assert cli.main([*command, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    wanted = {
        "method",
        "format",
        "draw",
        "kl",
        "kl_trimmed",
        "kl_median",
        "exact_match",
        "bits_per_weight",
        "seconds",
        "peak_mb",
    }
    assert all(wanted <= set(row) for row in result["rows"]) and len(result["rows"]) == 2
    odd = tmp_path / "odd.json"
    rules = [{"pattern": p, "format": "w8a8"} for p in ("txt.*", "text.*")]
    odd.write_text(json.dumps({"schema": 1, "rules": rules}))
    assert cli.main([*command, "--formats", str(odd)]) == 0
    assert f"no linear or embedding matches recipe {odd}'s 'txt.*'" in capsys.readouterr().err
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["format", "method", "KL"]
    assert [line.split()[:2] for line in lines[1:3]] == [["float", "float"], ["w4a16", "rtn"]]
    assert "exact match per task" in lines


def test_draws_that_are_one_draw_are_refused(
    tiny_source: Path, folders: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    calib, asked = folders
    command = ["compare", str(tiny_source), "--calib", calib, "--eval", asked, "--samples"]
    assert cli.main([*command, "3", "--draws", "2"]) == 1
    captured = capsys.readouterr()
    assert "draws 1 and 2 are the same 3 samples" in captured.err and captured.err.count("\n") == 1
    # Three draws of two out of three cannot all differ for every seed: any two are looked at.
    for seed in range(9):
        drawn = [calibration(calib, 2, s) for s in range(seed, seed + 3)]
        twins = [(i, j) for j in range(3) for i in range(j) if drawn[i] == drawn[j]]
        if twins and (0, 1) not in twins:
            break
    first, second = twins[0]
    assert cli.main([*command, "2", "--draws", "3", "--seed", str(seed)]) == 1
    assert f"draws {first + 1} and {second + 1} are the same" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"rows": {}}', '{"rows": [1]}', "{}"])
def test_a_damaged_results_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"identity": {"a": 1}, **json.loads(content)}))
    with pytest.raises(CalibrationError, match=r"rows.json: no rows of an experiment"):
        Results(path, {"a": 1})
    with pytest.raises(CalibrationError, match="there is no folder"):
        Results(tmp_path / "none" / "rows.json", {})


def test_seen_questions_and_no_draw_are_refused(
    tiny_source: Path, folders: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    calib, _ = folders
    command = ["compare", str(tiny_source), "--calib", calib, "--eval", calib, "--samples", "3"]
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert "is in the calibration set too" in captured.err and captured.err.count("\n") == 1
    assert cli.main([*command, "--draws", "0"]) == 1
    assert "0 draws, expected at least 1" in capsys.readouterr().err
