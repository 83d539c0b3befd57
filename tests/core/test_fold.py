"""Proves that folding a channel scale changes no output of the model, wherever an architecture folds one, and that no
linear is left out without a reason.

Run: python -m pytest tests/core/test_fold.py
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from tiny_blocks import tiny_context, tiny_samples
from tiny_models import tiny_llava

from qvlm.errors import RecipeError
from qvlm.fold import Heads, Point, fold_scale, fold_scales, points, unfolded
from qvlm.methods import TRANSFORMS, Context, State
from qvlm.models import ADAPTERS
from qvlm.plan import resolve
from qvlm.recipe import COMPONENTS, RECIPES, LayerRule, Recipe, component_recipe, named_format
from qvlm.transform import chosen, transform
from qvlm.trials.job import Job

ADAPTER = ADAPTERS["llava"]
EVERYTHING = component_recipe("w8a8", "w8a8", "w8a8", "w8a8")


def all_points(model: torch.nn.Module, component: str) -> list[Point]:
    return points(model, ADAPTER, component, ADAPTER.linears(model, component))


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_function_is_unchanged(component: str) -> None:
    model = tiny_llava().double()
    (sample,) = tiny_samples(model, 1)
    inputs = sample.model_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    before = model(**inputs).logits
    found = all_points(model, component)
    assert len(found) == {"vision": 2 * 3, "projector": 0, "text": 2 * 4, "head": 1}[component]
    generator = torch.Generator().manual_seed(0)
    for point in found:
        weights = [model.get_submodule(point.source), *map(model.get_submodule, point.targets)]
        old = [module.weight.clone() for module in weights]
        channels = len(old[0])
        fold_scale(model, point, torch.exp2(4 * torch.randn(channels, generator=generator)))
        assert all((o != m.weight).any() for o, m in zip(old, weights, strict=True))
    # Everything in float64: some thousand roundings of 2^-53, enlarged by scales of up to 2^12.
    difference = (model(**inputs).logits - before).norm() / before.norm()
    assert difference < 1000 * 2.0**12 * 2.0**-53


def test_a_scale_of_one_changes_no_bit() -> None:
    model = tiny_llava()
    before = copy.deepcopy(model.state_dict())
    for component in COMPONENTS:
        for point in all_points(model, component):
            fold_scale(model, point, torch.ones(len(model.get_submodule(point.source).weight)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_query_heads_share_the_scale_of_their_value_head() -> None:
    point = Point("text", 0, "v", ("o",), "o", Heads(shared=3, width=2))
    scale = torch.arange(4.0)  # two value heads of two channels
    assert point.spread(scale).tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    columns = torch.arange(12.0)
    expected = [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
    assert point.gathered(columns).tolist() == expected


def test_every_linear_has_a_pair_or_a_reason() -> None:
    model = tiny_llava()
    without: dict[str, str] = {}
    for component in COMPONENTS:
        linears = ADAPTER.linears(model, component)
        without.update(unfolded(ADAPTER, linears, all_points(model, component)))
    assert sorted(name.rpartition("model.")[2] for name in without) == [
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
        "vision_tower.encoder.layers.0.mlp.fc2",
        "vision_tower.encoder.layers.1.mlp.fc2",
    ]
    assert "no scale pair is known for it" not in without.values()
    assert "residual stream" in without["model.multi_modal_projector.linear_1"]
    assert unfolded(replace(ADAPTER, unfolded={}), ["a"], []) == {
        "a": "no scale pair is known for it"
    }


def test_pairs_without_a_quantized_linear_are_left_out() -> None:
    model = tiny_llava()
    name = "model.language_model.layers.1.mlp.gate_proj"
    (point,) = points(model, ADAPTER, "text", [name])
    assert point.source == "model.language_model.layers.1.post_attention_layernorm"
    assert point.targets == (name, name.replace("gate", "up"))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_cannot_be_undone_is_refused(bad: float) -> None:
    model = tiny_llava()
    (point,) = all_points(model, "head")
    with pytest.raises(ValueError, match="not positive and finite"):
        fold_scales(model, [point], {point.source: torch.full((384,), bad)})


def test_transforms_come_from_the_recipe_and_the_method() -> None:
    for recipe, message in (
        (replace(EVERYTHING, transforms=("spin",)), "transform 'spin' is unknown. Known: "),
        (replace(EVERYTHING, transforms=("smoothquant",) * 2), "given twice"),
        (replace(EVERYTHING, method="gptq").with_options(alpha=1), "unknown option 'alpha'"),
        (replace(EVERYTHING, method="smoothquant").with_options(alpha=2), "option alpha: 2"),
    ):
        with pytest.raises(RecipeError, match=message):
            resolve(tiny_llava(), ADAPTER, recipe)
    follow = replace(EVERYTHING, method="gptq", transforms=("smoothquant",))
    resolve(tiny_llava(), ADAPTER, follow.with_options(alpha=1, damping=0.02))
    assert Recipe.from_json(follow.to_json()) == follow
    assert "transforms" not in RECIPES["w8a8"].to_json()
    assert chosen(Recipe((), "awq")) == ("awq",) and chosen(RECIPES["float"]) == ()
    assert chosen(replace(RECIPES["float"], method="awq")) == ()
    with pytest.raises(RecipeError, match="transforms 'rotate', expected a list"):
        Recipe.from_json({**EVERYTHING.to_json(), "transforms": "rotate"})


def test_transforms_follow_each_other_in_the_recipes_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's own first, then the method's; each finds what it does on what the one before left."""
    calls: list[str] = []

    class Recorder:
        options: ClassVar[dict[str, object]] = {}

        def __init__(self, name: str) -> None:
            self.name = name

        def find(self, context: Context, progress: object) -> State:
            calls.append(f"find {self.name}")
            return {}

        def apply(self, context: Context, state: State) -> dict[str, object]:
            calls.append(f"apply {self.name}")
            return {}

    for name in ("smoothquant", "rotate", "awq"):
        monkeypatch.setitem(TRANSFORMS, name, Recorder(name))
    recipe = replace(EVERYTHING, method="awq", transforms=("smoothquant", "rotate"))
    transform(Context(torch.nn.Identity(), ADAPTER, [], recipe, {}))
    order = ("smoothquant", "rotate", "awq")
    assert calls == [f"{verb} {name}" for name in order for verb in ("find", "apply")]


def test_a_job_leaves_the_float_model_as_it_was() -> None:
    rules = (LayerRule("text.*", named_format("w8a8")),)
    context = tiny_context(Recipe(rules, method="smoothquant"), 1)
    before = copy.deepcopy(context.model.state_dict())
    job = Job.begin(context)
    name = "model.language_model.layers.0.input_layernorm.weight"
    assert torch.equal(context.model.state_dict()[name], before[name])
    assert not torch.equal(job.model.state_dict()[name], before[name])
    assert torch.equal(job.context.model.state_dict()[name], job.model.state_dict()[name])
