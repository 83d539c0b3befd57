"""Proves that the allocation is the optimum (against brute force), keeps the budget, and tells how far a thinned front
may be from it; and that the rules of a recipe give every layer the format that was chosen.

Run: python -m pytest tests/core/test_allocation.py -q
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from fnmatch import fnmatchcase
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm.errors import RecipeError
from qvlm.recipe import Recipe
from qvlm.trials.allocation import Allocation, Choice, allocate, lagrangian_bound
from qvlm.trials.budget import (
    Budget,
    check_budget,
    choices,
    parse_bits,
    parse_bytes,
    patterns,
    rules,
    solve,
)
from qvlm.trials.sensitivity import Unit

Units = dict[str, list[Choice]]

CHOICE = st.builds(
    Choice, st.just("f"), st.integers(1, 12), st.floats(0, 4, allow_nan=False, width=32)
)
UNITS = st.lists(st.lists(CHOICE, min_size=1, max_size=3), min_size=1, max_size=6).map(
    lambda rows: {str(i): row for i, row in enumerate(rows)}
)


def brute_force(units: Units, budget: int) -> float | None:
    """The least divergence over all combinations, None if none fits."""
    fitting = [
        sum(c.kl for c in picked)
        for picked in product(*units.values())
        if sum(c.nbytes for c in picked) <= budget
    ]
    return min(fitting, default=None)


def check(units: Units, found: Allocation, budget: int) -> None:
    assert list(found.choices) == list(units)
    assert all(found.choices[name] in units[name] for name in units)
    assert found.nbytes == sum(c.nbytes for c in found.choices.values()) <= budget
    assert found.kl == sum(c.kl for c in found.choices.values())


# Sums of at most six float32 numbers in float64 are exact to a few units of the last place: the two
# may add them in another order.
ROUNDING = 6 * 6 * 4 * 2.0**-52


@settings(max_examples=150, deadline=None)
@given(UNITS, st.integers(1, 72))
def test_allocation_is_the_optimum(units: Units, budget: int) -> None:
    best = brute_force(units, budget)
    if best is None:
        with pytest.raises(RecipeError, match="smallest formats take"):
            allocate(units, budget)
        return
    found = allocate(units, budget)
    check(units, found, budget)
    assert abs(found.kl - best) <= ROUNDING
    assert found.bound == found.kl
    assert lagrangian_bound(units, budget) <= best + ROUNDING


@settings(max_examples=100, deadline=None)
@given(UNITS, st.integers(1, 72), st.integers(1, 4))
def test_a_thinned_front_keeps_the_budget_and_knows_its_gap(
    units: Units, budget: int, limit: int
) -> None:
    best = brute_force(units, budget)
    if best is None:
        return
    found = allocate(units, budget, limit)
    check(units, found, budget)
    assert found.bound - ROUNDING <= best <= found.kl + ROUNDING


def test_a_model_of_sixty_layers_is_solved_exactly() -> None:
    """As many layers as a 7B model has, of two shapes: the front stays small, so the bound is the result."""
    rng = np.random.default_rng(0)
    units = {}
    for i in range(60):
        scale, size = float(rng.lognormal(-6, 1)), 4_000_000 if i < 28 else 1_000_000
        sizes = {"w4a16": 4.125, "w4a16-g64": 4.25, "w8a8": 8.01, "float": 16.0}
        losses = (1.0, 0.9, 0.02, 0.0)
        units[str(i)] = [
            Choice(f, int(size * bits / 8), scale * loss)
            for (f, bits), loss in zip(sizes.items(), losses, strict=True)
        ]
    budget = int((28 * 4_000_000 + 32 * 1_000_000) * 5 / 8)
    found = allocate(units, budget)
    check(units, found, budget)
    assert found.bound == found.kl
    assert lagrangian_bound(units, budget) <= found.kl


def test_ties_take_the_fewer_bytes() -> None:
    units = {"a": [Choice("float", 16, 0.0), Choice("w8a8", 8, 0.0), Choice("w4a16", 4, 1.0)]}
    assert allocate(units, 100).choices["a"].format == "w8a8"


# -- budgets and recipes


def layer(component: str, index: int, formats: tuple[str, ...] = ("w4a16", "w8a8")) -> Unit:
    name = f"model.{component}.layers.{index}"
    return Unit(component, name, {f"{name}.fc": (128, 256)}, formats)


def test_patterns_group_digits_within_a_ten() -> None:
    keys = [f"text.layers.{i}" for i in (0, 1, 2, 7, 9, 10, 11, 13)]
    found = patterns(keys)
    assert found == [
        "text.layers.[0-2]",
        "text.layers.7",
        "text.layers.9",
        "text.layers.1[0-1]",
        "text.layers.13",
    ]
    for i in range(25):
        matched = any(fnmatchcase(f"text.layers.{i}.fc", f"{p}.*") for p in found)
        assert matched == (f"text.layers.{i}" in keys), i
    assert patterns(["projector.model.proj"]) == ["projector.model.proj"]


def test_rules_give_every_unit_its_format() -> None:
    units = [layer("text", i) for i in range(12)] + [layer("vision", i) for i in range(3)]
    units.append(Unit("embedding", "model.tokens", {"model.tokens": (64, 32)}, ("w8a16",)))
    formats = {u.key: "w4a16" for u in units}
    formats |= {units[i].key: "w8a8" for i in (0, 1, 11)}
    formats |= {units[2].key: "float", units[13].key: "float", units[-1].key: "w8a16"}
    recipe = Recipe(rules(units, formats))
    for unit in units:
        for name in unit.shapes:
            assert recipe.format_of(unit.component, name).name == formats[unit.key], name
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert len(recipe.rules) == 7  # 3 for text's exceptions, 1 for vision's, 2 usual ones, 1 table


def row(unit: Unit, format_name: str, kl: float) -> dict[str, object]:
    key = {"kind": "layer", "component": unit.component, "name": unit.name}
    return {**key, "format": format_name, "kl": kl, "parameters": unit.parameters}


def test_a_format_that_overflows_is_no_choice() -> None:
    unit = layer("text", 0)
    rows = [row(unit, "w4a16", float("nan")), row(unit, "w8a8", 0.01)]
    parameters = unit.parameters
    found = solve([unit], rows, parameters, Budget(bits_per_weight=9), Recipe((), "gptq"))
    assert found.kl == 0.01
    with pytest.raises(RecipeError, match="smallest formats make"):
        solve([unit], rows, parameters, Budget(bits_per_weight=5), Recipe((), "gptq"))


def test_the_budget_is_of_the_whole_model() -> None:
    """Two layers, 1000 weights that stay float: the second layer is the one worth 8 bits."""
    units = [layer("text", 0), layer("text", 1)]
    rows = [
        row(unit, name, kl)
        for unit, four in zip(units, (0.1, 0.9), strict=True)
        for name, kl in (("w4a16", four), ("w8a8", 0.01))
    ]
    parameters = sum(unit.parameters for unit in units) + 1000
    four, eight = (units[0].nbytes(name) for name in ("w4a16", "w8a8"))
    assert four == 128 * 256 // 2 + 2 * 128 * 2 and eight == 128 * 256 + 2 * 128
    exact = four + eight + 2000
    found = solve(units, rows, parameters, Budget(memory=exact), Recipe((), "gptq"))
    assert found.nbytes == exact and found.kl == pytest.approx(0.11)
    assert found.recipe.format_of("text", "model.text.layers.0.fc").name == "w4a16"
    assert found.recipe.format_of("text", "model.text.layers.1.fc").name == "w8a8"
    bits = 8 * exact / parameters
    same = solve(units, rows, parameters, Budget(bits_per_weight=bits), Recipe((), "gptq"))
    assert same == found
    assert found.to_json()["optimality_gap"] == 0.0
    with pytest.raises(RecipeError, match="2000 of them float in any recipe"):
        solve(units, rows, parameters, Budget(memory=2 * four + 1999), Recipe(()))
    # The same is known without a row.
    check_budget(units, parameters, Budget(memory=2 * four + 2000))
    with pytest.raises(RecipeError, match="2000 of them float in any recipe"):
        check_budget(units, parameters, Budget(memory=2 * four + 1999))


def test_formats_without_an_engine_are_never_allocated() -> None:
    unit = layer("text", 0, ("w3a16", "w8a8"))
    rows = [row(unit, "w3a16", 0.0), row(unit, "w8a8", 0.5)]
    assert [c.format for c in choices([unit], rows)[unit.key]] == ["float", "w8a8"]


def test_sensitivities_of_another_model_are_refused() -> None:
    unit = layer("text", 0)
    rows = [row(unit, "w4a16", 0.1), {**row(unit, "w8a8", 0.1), "parameters": 5}]
    for measured in ([], rows):
        with pytest.raises(RecipeError, match="Measure this model"):
            choices([unit], measured)


@pytest.mark.parametrize(
    ("text", "expected"), [("12", 12), ("900MB", 900_000_000), ("1.5 GB", 1_500_000_000)]
)
def test_parse_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-3", "4 GiB", "many"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="expected bytes as in 900MB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0", "four"])
def test_bits_that_are_no_budget_are_refused(text: str) -> None:
    assert parse_bits("4.5") == 4.5
    with pytest.raises(ArgumentTypeError, match="expected a positive number of bits"):
        parse_bits(text)
