"""Proves that a tied head with a copy of its own changes nothing by itself: the same logits bit for bit, the same float
goldens, the same bytes from an interrupted run; that plan, checkpoint and experiments then see a head that was never
tied; that a model without a tied head is left alone.

Run: python -m pytest tests/core/test_untie.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import questions, tied, write_source
from tiny_imported import write_imported
from tiny_source import picture, tiny_questions

from qvlm import cli
from qvlm.checkpoint import Checkpoint
from qvlm.errors import RecipeError
from qvlm.evaluate import load_quantized
from qvlm.plan import plan
from qvlm.quantize import build_samples, quantize
from qvlm.recipe import FORMATS, RECIPES, LayerRule, Recipe, component_recipe
from qvlm.source import load, open_source
from qvlm.trials import compare
from qvlm.trials.judge import Judge
from qvlm.untie import untied

TABLE = "model.language_model.embed_tokens"
WHOLE = component_recipe("w4a16", "w8a8", "w8a8", "w8a8", transforms=("rotate",), untie=True)
ROWS = replace(WHOLE, rules=(*WHOLE.rules, LayerRule(f"embedding.{TABLE}", FORMATS["w8a16"])))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied LLaVA. Read only."""
    return write_source("llava", tmp_path_factory.mktemp("tied") / "source", **tied("llava", 334))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of four questions."""
    (tmp_path / "data").mkdir()
    lines = []
    for i in range(4):
        picture(i).save(tmp_path / "data" / f"{i}.png")
        lines.append({"image": f"{i}.png", "prompt": "What?", "answer": "cat"})
    (tmp_path / "data/samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "data"


@pytest.mark.parametrize("family", ["llava", "internvl", "smolvlm", "qwen2_vl", "blip-2"])
def test_a_copy_changes_no_logit_and_shares_the_rest(family: str, tmp_path: Path) -> None:
    opened = open_source(str(write_source(family, tmp_path / "source", **tied(family, 334))))
    adapter, loaded = opened.adapter, load(opened)
    model: Any = loaded.model
    own: Any = untied(model, adapter, WHOLE)
    assert adapter.tied(model) and not adapter.tied(own)
    head = f"{adapter.head}.weight"
    for name, parameter in own.named_parameters():
        assert (parameter is model.get_parameter(name)) == (name != head), name
    assert not own.config.tie_word_embeddings and model.config.tie_word_embeddings
    assert not own.config.get_text_config().tie_word_embeddings
    for sample in build_samples(loaded, adapter, questions(family)):
        inputs = sample.model_inputs()
        assert torch.equal(own(**inputs).logits, model(**inputs).logits)
    assert untied(own, adapter, WHOLE) is own
    assert untied(model, adapter, replace(WHOLE, untie=False)) is model


def test_a_checkpoint_holds_both_and_opens_as_what_was_made(
    source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "recipe.json", tmp_path / "out"
    recipe.write_text(json.dumps({**ROWS.to_json(), "untie": False, "samples": 2}))
    command = ["quantize", str(source), str(out), "--recipe", str(recipe), "--calib", str(folder)]
    assert cli.main([*command, "--untie", "--json"]) == 0
    sizes = {row["component"]: row for row in json.loads(capsys.readouterr().out)["sizes"]}
    checkpoint = Checkpoint(out)
    assert checkpoint.recipe == replace(ROWS, samples=2)
    stored = checkpoint.config
    assert stored["tie_word_embeddings"] is stored["text_config"]["tie_word_embeddings"] is False
    planned = plan(open_source(str(source)), ROWS)
    rows = {row.component: row for row in planned.components}
    for component in ("head", "embedding"):
        # A byte a weight, and a scale a row.
        assert sizes[component]["nbytes"] == rows[component].nbytes == 334 * 384 + 2 * 334
    total = sum(row.nbytes for row in planned.components) + planned.other_bytes
    assert sizes["total"]["nbytes"] == total
    model: Any = load_quantized(out).model
    golden = checkpoint.goldens()[0]
    ids = torch.from_numpy(golden.inputs["input_ids"])[None]
    pixels = torch.from_numpy(golden.inputs["pixel_values"])
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=pixels).logits[0, -1].numpy()
    # The goldens come from a cached forward, whose sums have another order (test_embedding.py).
    expected = golden.outputs["quant"]["logits"][0]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    command = ["evaluate", str(out), "--against", str(source), "--eval", str(folder), "--json"]
    assert cli.main(command) == 0
    assert 0 < json.loads(capsys.readouterr().out)["divergence"]["kl"] < np.inf
    assert cli.main(["show", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["linears"]
    ours = {row["component"]: row["name"] for row in shown}
    assert ours["head"] == "lm_head" and ours["embedding"] == TABLE


def test_a_float_head_is_stored_and_counted(source: Path, tmp_path: Path) -> None:
    """Named recipes leave every head float: then the copy costs its 16 bits."""
    recipe = replace(RECIPES["w8a8"], untie=True)
    out = quantize(str(source), tmp_path / "out", recipe, questions=tiny_questions(1), goldens=1)
    checkpoint = Checkpoint(out)
    assert checkpoint.float_linears == {"lm_head": "head"}
    table = checkpoint.float_tensor(f"{TABLE}.weight")
    assert np.array_equal(checkpoint.float_tensor("lm_head.weight"), table)
    opened = open_source(str(source))
    more = plan(opened, recipe).other_bytes - plan(opened, RECIPES["w8a8"]).other_bytes
    assert more == 2 * 334 * 384


def test_the_float_goldens_are_the_tied_models(source: Path, tmp_path: Path) -> None:
    """With a rotation behind it, whose check against the original would not pass otherwise, and without."""
    sides = {}
    plain = replace(RECIPES["w8a8"], transforms=())
    recipes = {
        "tied": plain,
        "untied": replace(plain, untie=True),
        "rotated": replace(plain, untie=True, transforms=("rotate",)),
    }
    for name, recipe in recipes.items():
        out = quantize(str(source), tmp_path / name, recipe, questions=tiny_questions(1), goldens=1)
        (golden,) = Checkpoint(out).goldens()
        sides[name] = {**golden.inputs, **golden.outputs["float"]}
    for key, expected in sides["tied"].items():
        assert np.array_equal(sides["untied"][key], expected), key
        if key not in ("image_features", "value"):  # which have another basis
            assert np.array_equal(sides["rotated"][key], expected), key


def test_a_resumed_run_is_the_uninterrupted_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(ROWS, method="gptq")
    arguments: dict[str, Any] = {"questions": tiny_questions(2), "goldens": 1}
    whole = quantize(str(source), tmp_path / "a", recipe, **arguments)

    def unplugged(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qvlm.quantize._Run.write", unplugged)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(source), tmp_path / "b", recipe, **arguments)
    resumed = quantize(str(source), tmp_path / "b", recipe, resume=True, **arguments)
    assert contents(resumed) == contents(whole)


def test_a_model_whose_head_is_not_tied_stays_as_it_is(tiny_source: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"questions": tiny_questions(1), "goldens": 1}
    found = [
        contents(quantize(str(tiny_source), tmp_path / str(untie), recipe, **arguments))
        for untie, recipe in ((u, replace(RECIPES["w8a8"], untie=u)) for u in (False, True))
    ]
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"recipe.json"}


def test_what_a_tied_head_forbids_says_the_way_out(source: Path) -> None:
    opened = open_source(str(source))
    for recipe in (
        component_recipe("float", "float", "float", "w8a8"),
        Recipe((LayerRule(f"embedding.{TABLE}", FORMATS["w8a16"]),)),
        replace(RECIPES["w8a8"], transforms=("rotate",)),
    ):
        with pytest.raises(
            RecipeError, match=r'untie them \("untie": true in the recipe, or --untie\)'
        ):
            plan(opened, recipe)
        plan(opened, replace(recipe, untie=True))


def test_compare_quantizes_a_copy_and_leaves_the_model(source: Path) -> None:
    opened = open_source(str(source))
    loaded = load(opened)
    asked = [replace(q, answer=q.answer or "cat") for q in tiny_questions(2)]
    samples = build_samples(loaded, opened.adapter, asked)
    judge = Judge(loaded.model, samples)
    case = compare.Case(
        opened, loaded.model, [samples], asked, samples, judge, None, None, [].append
    )
    wanted = compare.recipes(["w4a16"], ["rotate+rtn"], untie=True)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    floats, row = compare.compare(case, wanted).rows
    assert floats["kl"] == 0 and row["kl"] > 0
    assert row["bits_per_weight"] == plan(opened, wanted["w4a16"]["rotate+rtn"]).bits_per_weight
    assert opened.adapter.tied(loaded.model)
    assert all(torch.equal(t, before[name]) for name, t in loaded.model.state_dict().items())
    with pytest.raises(RecipeError, match="lm_head shares the embedding's weight"):
        compare.compare(case, compare.recipes(["w4a16"], ["rotate+rtn"]))


def test_sensitivity_measures_the_head_and_the_table(
    source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.json"
    command = ["sensitivity", str(source), "--untie", "--method", "rtn", "--calib", str(folder)]
    # The budget is too small for a float head.
    command += ["--formats", "w8a8", "--output", str(tmp_path / "rows.json"), "--json"]
    command += ["--max-bits-per-weight", "8.5", "--write-recipe", str(recipe)]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(r["component"], r["name"]): r for r in found["rows"] if r["kind"] == "layer"}
    assert rows[("head", "lm_head")]["parameters"] == rows[("embedding", TABLE)]["parameters"]
    written = Recipe.from_json(json.loads(recipe.read_text()))
    assert written.untie and written.format_of("head", "lm_head").name == "w8a8"
    planned = plan(open_source(str(source)), written)
    assert (
        sum(c.nbytes for c in planned.components) + planned.other_bytes
        == (found["solution"]["bytes"])
    )
    # The finished file serves a budget of another command, which has to untie as well.
    budget = ["quantize", str(source), str(tmp_path / "out"), "--max-bits-per-weight", "8.5"]
    budget += ["--sensitivity", str(tmp_path / "rows.json"), "--dry-run", "--json"]
    assert cli.main([*budget, "--untie"]) == 0
    head = json.loads(capsys.readouterr().out)["components"][3]
    assert head["component"] == "head" and head["formats"] == {"w8a8": 1}


def test_integers_that_others_made_are_kept_beside_a_quantized_head(
    source: Path, tmp_path: Path
) -> None:
    grids = write_imported(source, tmp_path / "in", "awq")
    recipe = component_recipe("w4a16", "float", "float", "w8a8", untie=True)
    arguments: dict[str, Any] = {"questions": tiny_questions(1), "goldens": 1}
    checkpoint = Checkpoint(quantize(str(tmp_path / "in"), tmp_path / "out", recipe, **arguments))
    assert set(checkpoint.linears) == {*grids, "lm_head"}
    for name, (integers, _) in grids.items():
        linear = checkpoint.linear(name)
        assert linear is not None and np.array_equal(linear.integers, integers)
