"""Arguments of every command that quantizes."""

from __future__ import annotations

import argparse
from dataclasses import replace

from qvlm.recipe import RECIPES, Recipe, load_recipe


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """--recipe --method --calib --samples --seed --untie, the same in every command that quantizes."""
    names = ", ".join(RECIPES)
    parser.add_argument("--recipe", default="w4a16", help=f"{names}, or a JSON file (w4a16)")
    parser.add_argument("--method", help="overrides the recipe's method")
    parser.add_argument("--calib", help="folder with samples.jsonl or images (shipped samples)")
    parser.add_argument("--samples", type=int, help="calibration samples (64)")
    parser.add_argument("--seed", type=int, help="draws the calibration samples (0)")
    add_untie_argument(parser)


def add_untie_argument(parser: argparse.ArgumentParser) -> None:
    """--untie, which sets the recipe's ``untie``."""
    parser.add_argument(
        "--untie",
        action="store_true",
        help="a head tied to the token table gets its own copy, which may be quantized and rotated",
    )


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe the arguments name, with what they override."""
    recipe = load_recipe(arguments.recipe)
    given = {key: getattr(arguments, key) for key in ("method", "samples", "seed")}
    given["untie"] = arguments.untie or None
    return replace(recipe, **{key: value for key, value in given.items() if value is not None})
