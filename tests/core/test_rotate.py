"""Proves rotations: Q against Kronecker products and orthogonal, the rotated model's outputs unchanged in float64 with
every weight of the stream moved, outliers gone, less lost at static INT8; what does not fold is refused.

Run: python -m pytest tests/core/test_rotate.py
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_blocks import tiny_context, tiny_samples
from tiny_families import FAMILIES, questions, tied, write_source
from tiny_models import tiny_llava
from tiny_source import tiny_questions

from qvlm.capture import capture_stream
from qvlm.checkpoint import Checkpoint
from qvlm.errors import CalibrationError, RecipeError
from qvlm.fold import value_points
from qvlm.methods import METHODS, TRANSFORMS
from qvlm.methods.rotate import rotate_residual, rotate_values
from qvlm.models import ADAPTERS
from qvlm.plan import resolve
from qvlm.progress import silent
from qvlm.quantize import build_samples, quantize
from qvlm.recipe import LayerRule, Recipe, component_recipe, named_format
from qvlm.rotation import Rotation, factors, random_signs
from qvlm.source import load, open_source
from qvlm.transform import chosen as transforms_of
from qvlm.trials.job import Job
from qvlm.untie import untied

ADAPTER = ADAPTERS["llava"]


def rotation(size: int, seed: int = 0) -> Rotation:
    return Rotation(random_signs(size, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("size", [1, 2, 3, 64, 80, 96, 128, 384, 4096 // 8])
def test_the_matrix_is_the_kronecker_product_and_orthogonal(size: int) -> None:
    found = rotation(size)
    dense = np.ones((1, 1))
    for factor in factors(size):
        dense = np.kron(dense, factor.numpy())
    dense = found.signs.numpy()[:, None] * dense
    x = np.random.default_rng(size).normal(size=(5, size))
    # sums of ``size`` float64 products of order one
    tolerance = size * 2.0**-52
    assert np.abs(found.columns(torch.tensor(x)).numpy() - x @ dense).max() <= tolerance * 4
    assert np.abs(found.rows(torch.tensor(x.T)).numpy() - dense.T @ x.T).max() <= tolerance * 4
    assert np.abs(dense.T @ dense - np.eye(size)).max() <= tolerance
    assert np.abs(dense).max() <= (2 / size) ** 0.5 + tolerance or size == 1


@pytest.mark.parametrize("kind", ["residual", "text", "vision"])
def test_the_function_is_unchanged(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Norms and softmax of the model would round to it.
    monkeypatch.setattr(torch, "float32", torch.float64)
    model = tiny_llava().double()
    (sample,) = tiny_samples(model, 1)
    inputs = sample.model_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    before, weights = model(**inputs).logits, copy.deepcopy(model.state_dict())
    if kind == "residual":
        rotate_residual(model, ADAPTER, rotation(384))
    else:
        found = value_points(model, ADAPTER, kind)
        assert len(found) == 2
        for layer, point in enumerate(found):
            rotate_values(model, point, rotation({"text": 64, "vision": 32}[kind], layer))
    # Some thousand float64 roundings.
    assert (model(**inputs).logits - before).norm() <= 1000 * 2.0**-53 * before.norm()
    moved = {name for name, tensor in model.state_dict().items() if (tensor != weights[name]).any()}
    text = "model.language_model"
    layers = [f"{text}.layers.{i}" for i in range(2)]
    names = {
        "vision": [
            f"model.vision_tower.encoder.layers.{i}.self_attn.{name}"
            for i in range(2)
            for name in ("v_proj.weight", "v_proj.bias", "out_proj.weight")
        ],
        "text": [
            f"{layer}.self_attn.{name}"
            for layer in layers
            for name in ("v_proj.weight", "v_proj.bias", "o_proj.weight")
        ],
        "residual": [
            f"{text}.embed_tokens.weight",
            f"{text}.norm.weight",
            "lm_head.weight",
            *(f"model.multi_modal_projector.linear_2.{p}" for p in ("weight", "bias")),
            *(
                f"{layer}.{n}_layernorm.weight"
                for layer in layers
                for n in ("input", "post_attention")
            ),
            *(f"{layer}.self_attn.{p}_proj.weight" for layer in layers for p in "qkvo"),
            *(f"{layer}.self_attn.o_proj.bias" for layer in layers),
            *(f"{layer}.mlp.{p}_proj.weight" for layer in layers for p in ("gate", "up", "down")),
        ],
    }
    assert moved == set(names[kind])


@pytest.mark.parametrize("family", [name for name in FAMILIES if ADAPTERS[name].residual])
def test_the_residual_stream_of_every_family_passes_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tied models, too, once their head has a copy; with all that enters the stream beside tokens and features."""
    adapter = ADAPTERS[family]
    source = open_source(str(write_source(family, tmp_path / "source", **tied(family, 400))))
    loaded = load(source)
    samples = build_samples(loaded, adapter, questions(family))
    monkeypatch.setattr(torch, "float32", torch.float64)
    model = untied(loaded.model, adapter, replace(recipe("w4a16"), untie=True)).double()
    for sample in samples:
        assert sample.pixel_values is not None
        inputs = {**sample.model_inputs(), "pixel_values": sample.pixel_values.double()}
        before = model(**inputs).logits
        rotate_residual(model, adapter, rotation(384))
        assert (model(**inputs).logits - before).norm() <= 1000 * 2.0**-53 * before.norm()


def recipe(format_name: str, *transforms: str) -> Recipe:
    return Recipe((LayerRule("text.*", named_format(format_name)),), transforms=transforms)


def test_outliers_of_the_stream_are_gone_and_less_is_lost() -> None:
    errors, peaks = {}, {}
    for transforms in ((), ("rotate",)):
        context = tiny_context(recipe("w8a8-static", *transforms), 2)
        embedding = context.model.get_parameter("model.language_model.embed_tokens.weight")
        embedding[:, 7] += 300
        job = Job.begin(context)
        peaks[transforms] = max(
            float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).max())
            for x in capture_stream(job.model, ADAPTER, "text", context.samples[:1]).inputs
        )
        job.run_component("text", METHODS["rtn"], {})
        inputs = context.samples[0].model_inputs()
        with torch.no_grad():
            moved = job.model(**inputs).logits - context.model(**inputs).logits
        errors[transforms] = float(moved.square().mean())
    # A single channel holds a token: sqrt(384) times its root mean square, sqrt(2) once it is spread, and what is not
    # the outlier adds to that.
    assert peaks[()] > 15 and peaks[("rotate",)] < 5
    assert errors[("rotate",)] < 0.5 * errors[()]


def test_the_seed_decides() -> None:
    context = tiny_context(recipe("w8a8", "rotate"), 1)
    transform = TRANSFORMS["rotate"]
    first, again = transform.find(context, silent), transform.find(context, silent)
    other = transform.find(replace(context, recipe=replace(context.recipe, seed=1)), silent)
    assert sorted(first) == ["residual", "values/text", "values/vision"]
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert any(not np.array_equal(first[key], other[key]) for key in first)
    values = context.recipe.with_options(rotations=["values"])
    assert "residual" not in transform.find(replace(context, recipe=values), silent)


def test_what_does_not_fold_is_refused() -> None:
    model = tiny_llava()
    chosen = recipe("w8a8", "rotate")
    with pytest.raises(RecipeError, match=r"no rotation passes the residual stream of llava"):
        resolve(model, replace(ADAPTER, residual=None), chosen)
    with pytest.raises(RecipeError, match="option rotations: 'values', expected auto or a list"):
        resolve(model, ADAPTER, chosen.with_options(rotations="values"))
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    with pytest.raises(RecipeError, match=r"lm_head shares the embedding's weight"):
        resolve(model, ADAPTER, chosen)
    resolve(model, ADAPTER, chosen.with_options(rotations=["values"]))


def test_a_method_that_begins_with_it_rotates_what_the_model_permits() -> None:
    model = tiny_llava()
    begun = component_recipe("w4a16", "float", "float", method="fused")

    def found(recipe: Recipe) -> list[str]:
        context = replace(tiny_context(recipe, 1), model=model)
        resolve(model, ADAPTER, recipe)
        return sorted(
            key for name in transforms_of(recipe) for key in TRANSFORMS[name].find(context, silent)
        )

    assert found(begun) == ["residual", "values/text", "values/vision"]
    assert found(begun.with_options(rotations=["values"])) == ["values/text", "values/vision"]
    assert found(begun.with_options(rotations=[])) == []
    assert found(component_recipe("float", "float", "float", method="fused")) == []
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    assert found(begun) == ["values/text", "values/vision"]
    # Named by the recipe it has to be possible whole.
    with pytest.raises(RecipeError, match=r"lm_head shares the embedding's weight"):
        resolve(model, ADAPTER, replace(begun, transforms=("rotate",)))


def test_transforms_follow_each_other_and_survive_an_interrupt(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = component_recipe("w8a8", "w8a8", "w8a8", method="smoothquant", transforms=("rotate",))
    questions = tiny_questions(1)
    whole = quantize(str(tiny_source), tmp_path / "a", chosen, questions=questions, goldens=1)

    def unplugged(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qvlm.quantize._Run.quantize_components", unplugged)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(tiny_source), tmp_path / "b", chosen, questions=questions, goldens=1)
    for name in ("rotate", "smoothquant"):
        monkeypatch.setattr(TRANSFORMS[name], "find", unplugged)
    arguments = {"questions": questions, "goldens": 1, "resume": True}
    resumed = quantize(str(tiny_source), tmp_path / "b", chosen, **arguments)  # type: ignore[arg-type]
    for path in whole.iterdir():
        assert (resumed / path.name).read_bytes() == path.read_bytes(), path.name
    report = Checkpoint(whole).method_report["transforms"]
    assert report["rotate"] == {"residual": 384, "values_text": 2, "values_vision": 2}
    assert list(report["smoothquant"]) == ["spread", "unfolded"]


def test_a_transform_that_moves_logits_is_found(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(ADAPTER.residual, entries=())  # type: ignore[type-var]
    monkeypatch.setitem(ADAPTERS, "llava", replace(ADAPTER, residual=broken))
    with pytest.raises(
        CalibrationError, match=r"transforms rotate: golden 0 has logits that moved"
    ):
        quantize(
            str(tiny_source),
            tmp_path / "out",
            recipe("w8a8", "rotate"),
            questions=tiny_questions(1),
            goldens=1,
        )
