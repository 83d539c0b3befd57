"""Equivalent changes of the float model before a method sees it: what ``transforms`` in a recipe names.

A transform changes float tensors (norm gains and biases, weights of linears and embeddings) so that the model
computes the same function and its integers lose less. What it decided is a few small arrays (scales, signs); applying
them is deterministic, so an interrupted run is resumed from the arrays and no changed weight is kept on disk. Some
methods begin with one (``methods.BEGINNINGS``); any method can follow any transform:

    {"method": "gptq", "transforms": ["rotate", "awq"], ...}

The contract is ``qvlm.methods.method.Transform``; this file knows the order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from qvlm.errors import RecipeError
from qvlm.methods import BEGINNINGS, TRANSFORMS
from qvlm.methods.method import Context, State
from qvlm.models.adapter import Adapter
from qvlm.progress import Progress, silent
from qvlm.recipe import Recipe


def chosen(recipe: Recipe) -> tuple[str, ...]:
    """Names of the transforms a recipe asks for, in order: its own, then those that its method begins with, unless its
    rules leave everything float. Without rules it is an experiment's, which gives formats itself.
    """
    own = recipe.transforms
    if recipe.rules and all(rule.format.weights is None for rule in recipe.rules):
        return own
    begins = [name for name in BEGINNINGS.get(recipe.method, ()) if name not in own]
    if recipe.options.get("rotations") == []:  # how a recipe leaves a method's rotation out
        begins = [name for name in begins if name != "rotate"]
    return (*own, *begins)


def fitted(recipe: Recipe, imported: Collection[str]) -> Recipe:
    """The recipe for a model of which these linears are integers already: without the rotations that its method would
    begin with unasked, as they change weights.
    """
    asked = "rotate" in recipe.transforms or "rotations" in recipe.options
    if imported and not asked and "rotate" in BEGINNINGS.get(recipe.method, ()):
        return recipe.with_options(rotations=[])
    return recipe


def check(model: nn.Module, adapter: Adapter, recipe: Recipe) -> None:
    """RecipeError for a repeated transform, or one that this model or these options do not allow."""
    names = chosen(recipe)
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"transform {name!r} is given twice. Give it once.")
    for name in names:
        TRANSFORMS[name].check(model, adapter, recipe)


def transform(
    context: Context,
    load: Callable[[str], State | None] = lambda name: None,
    save: Callable[[str, State], None] = lambda name, state: None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Change ``context.model`` in place by every transform of its recipe; what each reports, by name.

    load and save keep each transform's decisions by name, so that none is made twice.
    """
    report: dict[str, Any] = {}
    for name in chosen(context.recipe):
        state = load(name)
        if state is None:
            state = TRANSFORMS[name].find(context, progress)
            save(name, state)
        report[name] = TRANSFORMS[name].apply(context, state)
    return report
