"""Proves that recipes and formats survive JSON, that the first matching rule wins, and that bad ones are refused.

Run: python -m pytest tests/test_recipe.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qvlm.errors import RecipeError
from qvlm.plan import check_method
from qvlm.recipe import (
    FORMATS,
    RECIPES,
    ActivationScheme,
    LayerRule,
    Recipe,
    WeightScheme,
    load_recipe,
)


@pytest.mark.parametrize("name", list(RECIPES))
def test_json_round_trip(name: str) -> None:
    recipe = RECIPES[name].with_options(depth=3, h0=None)
    for one in (recipe, replace(recipe, untie=True, transforms=("rotate",))):
        assert Recipe.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_first_matching_rule_wins_and_no_match_is_float() -> None:
    recipe = Recipe(
        (LayerRule("text.*.down_proj", FORMATS["w8a8"]), LayerRule("text.*", FORMATS["w4a16"]))
    )
    assert recipe.format_of("text", "layers.0.mlp.down_proj").name == "w8a8"
    assert recipe.format_of("text", "layers.0.mlp.up_proj").name == "w4a16"
    assert recipe.format_of("vision", "layers.0.mlp.fc1").name == "float"


def test_simulated_formats_are_labelled() -> None:
    assert RECIPES["w4a16"].deployable
    assert not RECIPES["w4a4"].deployable


def test_group_size_that_does_not_divide_names_layer_and_way_out() -> None:
    with pytest.raises(
        RecipeError,
        match=r"fc2: group_size 128 does not divide in_features 4304\. Use group_size 16",
    ):
        WeightScheme(4, "group", 128).groups(4304, "vision.blocks.0.mlp.fc2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2, expected 1"),
        ({"rulez": []}, "unknown key 'rulez'"),
        ({"rules": [{"pattern": "*", "format": "w5a5"}]}, "format 'w5a5' is unknown"),
        ({"rules": [{"pattern": "*"}]}, "must be a list"),
        ({"untie": "yes"}, "untie 'yes', expected true or false"),
    ],
)
def test_bad_recipe_file_is_one_clear_line(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**RECIPES["w4a16"].to_json(), **change}))
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_neither_name_nor_file() -> None:
    with pytest.raises(RecipeError, match="neither a known name"):
        load_recipe("w4a17")


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightScheme(1, "channel", None),
        lambda: WeightScheme(2, "group", 128, symmetric=False, signed_scales=True),
        lambda: WeightScheme(9, "channel", None),
        lambda: WeightScheme(4, "group", None),
        lambda: WeightScheme(4, "channel", 128),
        lambda: ActivationScheme(8, "token", symmetric=False),
    ],
)
def test_impossible_schemes_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(RecipeError):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": "many"}, "samples 'many', expected a whole number, 1 or more"),
        ({"samples": 6.7}, "samples 6.7"),
        ({"samples": True}, "samples True"),
        ({"samples": -3}, "samples -3"),
        ({"seed": None}, "seed None, expected a whole number, 0 or more"),
        ({"options": ["depth"]}, "expected an object of names and values"),
        ({"rules": [{"pattern": 3, "format": "w4a16"}]}, "pattern 3, expected text"),
        (
            {"rules": [{"pattern": "*", "format": "w4a16", "group_size": 64}]},
            "unknown key 'group_size'",
        ),
    ],
)
def test_values_of_another_kind_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_json({**RECIPES["w4a16"].to_json(), **change})


@pytest.mark.parametrize(
    ("method", "option", "value", "message"),
    [
        ("gptq", "act_order", "False", "expected true or false"),
        ("gptq", "columns", 1.5, "expected a whole number"),
        ("gptq", "damping", "much", "expected a number"),
        ("fused", "sweeps", 1.5, "expected a whole number"),
        ("fused", "shrinkage", float("nan"), "expected a number"),
        ("q-vlm", "visual_encoder", "False", "expected true or false"),
    ],
)
def test_option_of_another_kind_is_refused(
    method: str, option: str, value: Any, message: str
) -> None:
    recipe = replace(RECIPES["w4a16"], method=method, options={option: value})
    with pytest.raises(RecipeError, match=f"option {option}: .*{message}"):
        check_method(recipe)
