"""Sensitivities of a model on disk, and recipes from them: opens the source, keeps the file, calls the arithmetic.

The file of finished rows names what they belong to: weights, samples, method, formats and the package's version. A
run with other settings refuses it; ``recipe_within`` takes a complete file as it is, whatever it was measured with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from qvlm.checkpoint import load_json
from qvlm.data import calibration
from qvlm.embedding import TABLE_FORMATS
from qvlm.errors import RecipeError
from qvlm.plan import check_method, resolve
from qvlm.progress import Progress, silent
from qvlm.quantize import build_samples, identity
from qvlm.recipe import FORMATS, Recipe, named_format
from qvlm.source import Source, load, open_source, require_float, skeleton
from qvlm.trials import practice
from qvlm.trials.budget import Budget, Solution, check_budget, choices, solve
from qvlm.trials.results import Results, rows_of
from qvlm.trials.sensitivity import Case, Unit, measure, measure_recipe, units
from qvlm.untie import untied

Json = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is tried, by which method, on which calibration samples. int4_blocks: the target's least. untie: of the
    recipe that is looked for.
    """

    formats: tuple[str, ...] = ("w4a16", "w4a16-g64", "w8a8")
    method: str = "gptq"
    calib: str | None = None
    samples: int = 128
    seed: int = 0
    int4_blocks: int = 2
    untie: bool = False

    @property
    def recipe(self) -> Recipe:
        """Method and calibration without rules; RecipeError for an unknown method or format, or a float one."""
        for name in self.formats:
            if named_format(name).weights is None or name in TABLE_FORMATS:
                known = [n for n, f in FORMATS.items() if f.weights and n not in TABLE_FORMATS]
                raise RecipeError(
                    f"format {name!r} is none of a linear. Known: {', '.join(known)}."
                )
        recipe = Recipe((), self.method, self.samples, self.seed, untie=self.untie)
        check_method(recipe)
        return recipe


class SensitivityRun:
    """One measurement: ``rows`` does the work, the others read it."""

    def __init__(
        self, source: str | Source, settings: Settings, path: Path | None, progress: Progress
    ) -> None:
        self.settings, recipe = settings, settings.recipe
        self.source = open_source(source) if isinstance(source, str) else source
        require_float(self.source)
        questions = calibration(settings.calib, settings.samples, settings.seed)
        loaded = load(self.source, progress)
        samples = build_samples(loaded, self.source.adapter, questions, progress)
        self.case = Case(
            untied(loaded.model, self.source.adapter, recipe),
            self.source.adapter,
            samples,
            recipe,
            settings.formats,
            settings.int4_blocks,
        )
        self.results = Results(
            path,
            {**_plain(settings), "digest": identity(self.source, recipe, samples, 0)},
        )

    def rows(self, say: Say = lambda line: None) -> list[Json]:
        """The rows of ``sensitivity.measure``; those already in the file are not measured again."""
        return measure(self.case, self.results, say)

    def findings(self) -> list[practice.Finding]:
        """The published rules against the rows."""
        return practice.check(self.results.rows)

    def check(self, budget: Budget) -> None:
        """As ``budget.check_budget``: before ``rows``, which takes long."""
        check_budget(self._units(), _parameters(self.case.model), budget)

    def _units(self) -> list[Unit]:
        case = self.case
        return units(case.model, case.adapter, case.formats, case.min_blocks)

    def solve(self, budget: Budget) -> Json:
        """The recipe within the budget, with ``measured_kl`` and ``measured_exact_match`` of the whole recipe."""
        case = self.case
        solution = solve(
            self._units(),
            self.results.rows,
            _parameters(case.model),
            budget,
            case.recipe,
        )
        formats = resolve(case.model, case.adapter, solution.recipe)
        measured = measure_recipe(case, solution.recipe, formats)
        return {
            **solution.to_json(),
            "measured_kl": measured["kl"],
            "measured_exact_match": measured["exact_match"],
        }


def recipe_within(
    source: str | Source,
    recipe: Recipe,
    budget: Budget,
    file: Path,
    settings: Settings = Settings(),
    progress: Progress = silent,
    say: Say = lambda line: None,
) -> Solution:
    """``recipe``'s method and calibration under the rules that the budget and the sensitivities in ``file`` give.

    Without a complete file they are measured first, by ``settings``. RecipeError as ``budget.solve``.
    """
    source = open_source(source) if isinstance(source, str) else source
    require_float(source)
    model = untied(skeleton(source.directory), source.adapter, recipe)
    settings = replace(settings, untie=recipe.untie)
    stored = load_json(file) if file.exists() else {}
    rows = rows_of(file, stored) if stored else []
    known = stored.get("identity", _plain(settings))
    if not _measured_by_us(known, rows):
        raise RecipeError(f"{file}: not a file of `qvlm sensitivity`. Give one, or a new name.")
    blocks = max(settings.int4_blocks, known["int4_blocks"])
    mine = units(model, source.adapter, known["formats"], blocks)
    if not _complete(mine, rows):
        mine = units(model, source.adapter, settings.formats, settings.int4_blocks)
        check_budget(mine, _parameters(model), budget)
        run = SensitivityRun(source, settings, file, progress)
        rows = run.rows(say)
    return solve(mine, rows, _parameters(model), budget, recipe)


def _measured_by_us(identity: object, rows: list[Json]) -> bool:
    """Do both have what the allocation reads?"""
    kinds = {"kind": str, "component": str, "name": str, "format": str, "parameters": int}
    return (
        isinstance(identity, dict)
        and isinstance(identity.get("int4_blocks"), int)
        and isinstance(formats := identity.get("formats"), list)
        and all(isinstance(name, str) and name in FORMATS for name in formats)
        and not any(name in TABLE_FORMATS or FORMATS[name].weights is None for name in formats)
        and all(isinstance(row.get(key), kind) for row in rows for key, kind in kinds.items())
        and all(isinstance(row.get("kl"), int | float) for row in rows)
    )


def _plain(settings: Settings) -> Json:
    return {**asdict(settings), "formats": list(settings.formats)}


def _complete(mine: list[Unit], rows: list[Json]) -> bool:
    try:
        choices(mine, rows)
    except RecipeError:
        return False
    return True


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
