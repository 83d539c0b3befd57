"""From measured sensitivities and a budget to a plain recipe, its rules written as a person would write them.

The budget is of the whole model: integers and scales of everything quantized, and what stays float (norms, biases,
embeddings and head unless they are quantized) at 16 bit.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvlm.errors import RecipeError
from qvlm.recipe import EMBEDDING, LayerRule, Recipe, named_format
from qvlm.trials.allocation import Allocation, Choice, allocate

if TYPE_CHECKING:
    from qvlm.trials.sensitivity import Unit

Json = dict[str, Any]

_NUMBERED = re.compile(r"^(.*\.)(\d+)$")
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(B|kB|MB|GB)?\s*$")
_BYTES = {None: 1, "B": 1, "kB": 1000, "MB": 1_000_000, "GB": 1_000_000_000}


@dataclass(frozen=True)
class Budget:
    """At most this many bits per weight of the whole model, or bytes of it; exactly one is given."""

    bits_per_weight: float | None = None
    memory: int | None = None

    def nbytes(self, parameters: int) -> int:
        """Bytes for a model of so many parameters."""
        if self.memory is not None:
            return self.memory
        assert self.bits_per_weight is not None
        return int(self.bits_per_weight * parameters / 8)


def parse_bytes(text: str) -> int:
    """ "900MB", "1.5GB" or plain bytes; ArgumentTypeError otherwise, which argparse prints."""
    found = _SIZE.match(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}, expected bytes as in 900MB or 1.5GB")
    return int(float(found[1]) * _BYTES[found[2]])


def parse_bits(text: str) -> float:
    """A positive number; ArgumentTypeError otherwise, which argparse prints."""
    try:
        bits = float(text)
    except ValueError:
        bits = math.nan
    if not (math.isfinite(bits) and bits > 0):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive number of bits")
    return bits


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """--max-bits-per-weight --max-memory: of the whole model, scales and float parts included."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--max-bits-per-weight",
        type=parse_bits,
        metavar="X",
        help="whole model: the best recipe within, by measured sensitivities",
    )
    group.add_argument(
        "--max-memory", type=parse_bytes, metavar="BYTES", help="the same in bytes: 900MB, 1.5GB"
    )


def add_sensitivity_argument(parser: argparse.ArgumentParser) -> None:
    """--sensitivity, for commands that need a budget's recipe and do not measure by themselves."""
    parser.add_argument(
        "--sensitivity",
        type=Path,
        metavar="FILE",
        help="of `qvlm sensitivity`, for a budget; measured first if absent (OUT.sensitivity.json)",
    )


def budget_of(arguments: argparse.Namespace) -> Budget | None:
    """The budget the arguments give, if any."""
    if arguments.max_bits_per_weight is None and arguments.max_memory is None:
        return None
    return Budget(arguments.max_bits_per_weight, arguments.max_memory)


def sensitivity_file(arguments: argparse.Namespace, output: Path) -> Path:
    """Where the sensitivities are or go."""
    given: Path | None = arguments.sensitivity
    return given or output.parent / f"{output.name}.sensitivity.json"


@dataclass(frozen=True)
class Solution:
    """A recipe within a budget. kl: predicted, the sum of single divergences; no recipe within predicts below bound."""

    recipe: Recipe
    nbytes: int
    bits_per_weight: float
    kl: float
    bound: float

    def to_json(self) -> Json:
        """A JSON object; ``optimality_gap`` is kl - bound, 0 where the search was exact."""
        return {
            "recipe": self.recipe.to_json(),
            "bytes": self.nbytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "predicted_kl": self.kl,
            "optimality_gap": self.kl - self.bound,
        }


def choices(units: Sequence[Unit], rows: Sequence[Json]) -> dict[str, list[Choice]]:
    """Unit -> its formats with bytes and measured divergence, float included; formats without an engine are left out.

    RecipeError if a format of a unit was not measured, or on weights of another size.
    """
    measured = {
        (row["component"], row["name"], row["format"]): row
        for row in rows
        if row["kind"] == "layer"
    }
    found: dict[str, list[Choice]] = {}
    for unit in units:
        found[unit.key] = [Choice("float", unit.nbytes("float"), 0.0)]
        for name in unit.formats:
            row = measured.get((unit.component, unit.name, name))
            if row is None or row["parameters"] != unit.parameters:
                raise RecipeError(
                    f"sensitivities: none for {unit.key} at {name}. Measure this model in these formats first."
                )
            # A format that overflows measures no number: it is no choice.
            if named_format(name).deployable and math.isfinite(row["kl"]):
                found[unit.key].append(Choice(name, unit.nbytes(name), row["kl"]))
    return found


def solve(
    units: Sequence[Unit], rows: Sequence[Json], parameters: int, budget: Budget, recipe: Recipe
) -> Solution:
    """The recipe of least predicted divergence within the budget; method, samples, seed and options are ``recipe``'s.

    parameters: all of the model's. RecipeError if even the smallest formats do not fit.
    """
    allocation, fixed = _within(choices(units, rows), units, parameters, budget)
    formats = {name: choice.format for name, choice in allocation.choices.items()}
    total = fixed + allocation.nbytes
    return Solution(
        replace(recipe, rules=rules(units, formats)),
        total,
        8 * total / parameters,
        allocation.kl,
        allocation.bound,
    )


def check_budget(units: Sequence[Unit], parameters: int, budget: Budget) -> None:
    """RecipeError if even the smallest formats do not fit, which is known before anything is measured."""
    free = {
        unit.key: [
            Choice(name, unit.nbytes(name), 0.0)
            for name in ("float", *unit.formats)
            if named_format(name).deployable
        ]
        for unit in units
    }
    _within(free, units, parameters, budget)


def _within(
    found: Mapping[str, Sequence[Choice]], units: Sequence[Unit], parameters: int, budget: Budget
) -> tuple[Allocation, int]:
    """The allocation, and the bytes that stay float in any recipe."""
    fixed = 2 * (parameters - sum(unit.parameters for unit in units))
    whole = budget.nbytes(parameters)
    least = fixed + sum(min(choice.nbytes for choice in one) for one in found.values())
    if whole < least:
        raise RecipeError(
            f"budget: {whole} bytes, the smallest formats make {least}, {fixed} of them float in any recipe. "
            "Raise the budget or add a smaller format."
        )
    return allocate(found, whole - fixed), fixed


def rules(units: Sequence[Unit], formats: Mapping[str, str]) -> tuple[LayerRule, ...]:
    """Rules that give every unit its format: exceptions by runs of layers, then a component's usual format."""
    by_component: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        by_component[unit.component].append(unit)
    found: list[LayerRule] = []
    for component, mine in by_component.items():
        # An embedding, and a linear that is a layer of its own (a head, a projection), is named itself.
        single = [u for u in mine if component == EMBEDDING or u.name in u.shapes]
        found += [LayerRule(u.key, named_format(formats[u.key])) for u in single]
        mine = [u for u in mine if u not in single]
        if not mine:
            continue
        usual = Counter(formats[unit.key] for unit in mine).most_common(1)[0][0]
        others: dict[str, list[str]] = defaultdict(list)
        for unit in mine:
            if formats[unit.key] != usual:
                others[formats[unit.key]].append(unit.key)
        for name, keys in others.items():
            found += [LayerRule(f"{p}.*", named_format(name)) for p in patterns(keys)]
        found.append(LayerRule(f"{component}.*", named_format(usual)))
    return tuple(found)


def patterns(keys: Sequence[str]) -> list[str]:
    """fnmatch patterns of numbered names: layers.3, layers.4, layers.12 become layers.[3-4], layers.12."""
    runs: list[list[Any]] = []  # prefix with the tens, first and last digit
    for key in keys:
        match = _NUMBERED.match(key)
        if match is None:
            runs.append([key, None, None])
            continue
        stem, digit = match[1] + match[2][:-1], int(match[2][-1])
        if runs and runs[-1][0] == stem and runs[-1][2] == digit - 1:
            runs[-1][2] = digit
        else:
            runs.append([stem, digit, digit])
    return [
        stem if first is None else f"{stem}{first}" if first == last else f"{stem}[{first}-{last}]"
        for stem, first, last in runs
    ]
