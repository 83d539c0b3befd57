"""qvlm compare: methods x formats x calibration draws on one table, measured by one judge against one float model.

A method is written ``name`` or ``name:option=value,option=value`` with JSON values (a bare word is a text):
``rtn``, ``q-vlm:partition=layer,percentiles=[1.0,0.98]``. So an ablation is a row like any other. Transforms of the
float model come first, joined by plus signs: ``rotate+gptq``, ``rotate+awq+gptaq:damping=0.02``; the options are theirs
and the method's. A format is a recipe (its name or file), or the name of a number format, which then is the decoder's,
with vision and projector at INT8 (w8a8) and the head float. Each draw calibrates on other samples: the seed of draw d
is the first seed + d.

A row holds {method, format, draw, kl, kl_trimmed, kl_median, exact_match, per_task, perplexity, image_error,
text_error, bits_per_weight, seconds, peak_mb}: errors are one value per decoder layer; bits count all components,
scales included, what stays float at 16; seconds and peak_mb are those of quantizing alone (``memory``; None where the
system does not tell). The float model is the first row. Everything happens in memory, no checkpoint is written.

Each finished row goes to the results file under a digest of all that decides it: the weights' files, recipe,
calibration samples, questions, and this package's source (which holds the defaults of options). Another call finds it
there, whatever else it asks.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qvlm
from qvlm.capture import Sample
from qvlm.data import Question
from qvlm.errors import RecipeError
from qvlm.plan import check_method, plan
from qvlm.recipe import FORMATS, RECIPES, Recipe, component_recipe, load_recipe
from qvlm.source import Source, read_header
from qvlm.trials.job import context_of, quantized
from qvlm.trials.judge import Judge
from qvlm.trials.memory import peak_memory
from qvlm.trials.results import Results
from qvlm.workdir import digest

Json = dict[str, Any]

_OPTION = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*")
_WORD = re.compile(r"[A-Za-z_][\w.-]*")


# -- what to compare


def parse_method(text: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names and options of ``transform+...+method:option=value,...``, the method last; RecipeError showing the place
    that cannot be read.
    """
    joined, colon, rest = text.partition(":")
    names = tuple(joined.split("+"))
    if not all(names):
        raise _unreadable(text, joined, "names between the plus signs")
    options: dict[str, Any] = {}
    at = 0
    while colon:
        key = _OPTION.match(rest, at)
        if key is None:
            raise _unreadable(text, rest[at:], "option=value")
        options[key[1]], at = _value(text, rest, key.end())
        if at == len(rest):
            break
        if rest[at] != ",":
            raise _unreadable(text, rest[at:], "a comma or the end")
        at += 1
    return names, options


def _value(text: str, rest: str, at: int) -> tuple[Any, int]:
    try:
        value, end = json.JSONDecoder().raw_decode(rest, at)
        return value, end
    except json.JSONDecodeError:
        word = _WORD.match(rest, at)
        if word is None:
            raise _unreadable(text, rest[at:], "a JSON value or a word") from None
        return word[0], word.end()


def _unreadable(text: str, at: str, expected: str) -> RecipeError:
    return RecipeError(
        f"method {text!r}: {at!r}, expected {expected}. Write name, name:option=value,option=value "
        "or transform+name."
    )


def parse_format(name: str) -> Recipe:
    """The recipe a format stands for (see above); RecipeError for an unknown name."""
    if name in FORMATS and name not in RECIPES:
        return component_recipe(name, "w8a8", "w8a8")
    if name not in RECIPES and not Path(name).is_file():
        known = ", ".join(dict.fromkeys((*RECIPES, *FORMATS)))
        raise RecipeError(f"format {name!r}: neither known ({known}) nor a recipe file")
    return load_recipe(name)


def with_method(base: Recipe, text: str) -> Recipe:
    """``base`` with the transforms (behind its own), method and options that ``text`` names; RecipeError for an
    unknown method or option.
    """
    (*transforms, method), options = parse_method(text)
    recipe = replace(
        base, method=method, options=options, transforms=(*base.transforms, *transforms)
    )
    check_method(recipe)
    return recipe


def recipes(
    formats: Sequence[str], methods: Sequence[str], untie: bool = False
) -> dict[str, dict[str, Recipe]]:
    """format -> method -> recipe, in the order given; RecipeError as ``parse_format`` and ``with_method``.

    untie: in every recipe, not only in those whose file says so.
    """
    bases = {name: parse_format(name) for name in formats}
    if untie:
        bases = {name: replace(base, untie=True) for name, base in bases.items()}
    return {
        name: {text: with_method(base, text) for text in methods} for name, base in bases.items()
    }


# -- the rows


@dataclass(frozen=True)
class Case:
    """A float model, the calibration samples of each draw, and the questions.

    samples: the questions as ``judge`` got them. score: right or wrong for each question from generated answers; None
    takes the judge's exact match, which equals greedy decoding but knows one accepted answer only. results: the file
    of finished rows (None: none). progress gets a line per row.
    """

    source: Source
    model: nn.Module
    draws: list[list[Sample]]
    questions: Sequence[Question]
    samples: Sequence[Sample]
    judge: Judge
    score: Callable[[nn.Module], list[bool]] | None
    results: Path | None
    progress: Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """rows as above; refused: {method, format, reason} where a method does not take a format."""

    rows: list[Json]
    refused: list[Json]


def compare(case: Case, wanted: Mapping[str, Mapping[str, Recipe]]) -> Outcome:
    """The float row, then a row per format x method x draw. RecipeError before any work for an unknown name or option,
    or if no method takes any format.
    """
    for methods in wanted.values():
        for recipe in methods.values():
            context_of(case.model, case.source.adapter, [], recipe)
    results = Results(case.results, {"kind": "compare"})
    base = _base_digest(case)
    rows = [_float_row(case, results, base)]
    refused: list[Json] = []
    for format_, methods in wanted.items():
        for method, recipe in methods.items():
            try:
                rows += [
                    _row(case, results, base, (format_, method), recipe, draw)
                    for draw in range(len(case.draws))
                ]
            except RecipeError as error:
                refused.append({"method": method, "format": format_, "reason": str(error)})
                case.progress(f"{format_} {method}: refused ({error})")
    if len(rows) == 1 and refused:
        raise RecipeError(f"nothing to compare: {refused[0]['reason']}")
    return Outcome(rows, refused)


def _base_digest(case: Case) -> str:
    """Of what every row depends on: weights, questions, this package."""
    shards = [case.source.directory / shard for shard in case.source.shards]
    weights = [[path.name, path.stat().st_size, digest(read_header(path))] for path in shards]
    changed = [path.stat().st_mtime_ns for path in shards]
    asked = [[q.task, q.answer, q.also, q.options] for q in case.questions]
    return digest(
        _source_digests(), torch.__version__, case.source.config, weights, changed, asked,
        case.score is None, _samples_digest(case.samples),
    )  # fmt: skip


def _source_digests() -> dict[str, str]:
    """Of every file of the package ``qvlm``, by its path in it: methods, and the defaults of their options."""
    package = Path(qvlm.__file__).parent
    return {
        path.relative_to(package).as_posix(): digest(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }


def _samples_digest(samples: Sequence[Sample]) -> str:
    parts: list[Any] = []
    for sample in samples:
        parts += [sample.input_ids.numpy(), sample.answer_mask.numpy()]
        if sample.pixel_values is not None:
            parts.append(sample.pixel_values.numpy())
    return digest(*parts)


def _float_row(case: Case, results: Results, base: str) -> Json:
    names = {"method": "float", "format": "float", "draw": 0}
    key = {**names, "digest": base}
    found = results.find(key)
    if found is None:
        cost = {"bits_per_weight": 16.0, "seconds": 0.0, "peak_mb": 0.0}
        found = {**key, **_measure(case, case.model, case.model), **cost}
        results.add(found)
    return found


def _row(
    case: Case, results: Results, base: str, names: tuple[str, str], recipe: Recipe, draw: int
) -> Json:
    samples = case.draws[draw]
    full = replace(recipe, samples=len(samples)).to_json()
    key = {
        "method": names[1],
        "format": names[0],
        "draw": draw,
        "digest": digest(base, full, _samples_digest(samples)),
    }
    found = results.find(key)
    if found is not None:
        return found
    case.progress(f"{names[0]} {names[1]} draw {draw}: quantizing")
    context = context_of(case.model, case.source.adapter, samples, recipe)
    with peak_memory() as peak:
        started = time.perf_counter()
        job = quantized(context)
        seconds = time.perf_counter() - started
    row = {
        **key,
        **_measure(case, job.context.model, job.model),
        "bits_per_weight": plan(case.source, recipe).bits_per_weight,
        "seconds": seconds,
        "peak_mb": peak.megabytes,
    }
    results.add(row)
    case.progress(f"{names[0]} {names[1]} draw {draw}: kl {row['kl']:.3e} in {seconds:.1f} s")
    return row


def _measure(case: Case, reference: nn.Module, model: nn.Module) -> Json:
    measured, right = case.judge.measure_each(model)
    if case.score is not None:
        right = case.score(model)
    tasks: dict[str, list[bool]] = defaultdict(list)
    for question, hit in zip(case.questions, right, strict=True):
        tasks[question.task or "all"].append(hit)
    return {
        **measured,
        "exact_match": sum(right) / len(right),
        "per_task": {task: sum(hits) / len(hits) for task, hits in sorted(tasks.items())},
        **case.judge.block_errors(reference, model, case.source.adapter),
    }


# -- the table

HEADER = (
    "format", "method", "KL", "KL trimmed", "exact match", "perplexity", "image error", "text error",
    "bits/weight", "seconds", "peak MB",
)  # fmt: skip


def table_rows(rows: Sequence[Json]) -> list[tuple[object, ...]]:
    """A line per format and method under HEADER: mean ± standard deviation over the draws (if two or more). "KL
    trimmed" leaves the largest 2 % of the answer tokens out.

    Block errors are the mean over the layers.
    """
    groups: dict[tuple[str, str], list[Json]] = defaultdict(list)
    for row in rows:
        groups[(row["format"], row["method"])].append(row)
    return [
        (
            *key,
            spread([row["kl"] for row in group], ".3e"),
            spread([row["kl_trimmed"] for row in group], ".3e"),
            spread([row["exact_match"] for row in group], ".4f"),
            spread([row["perplexity"] for row in group], ".5f"),
            spread([_mean(row["image_error"]) for row in group], ".3e"),
            spread([_mean(row["text_error"]) for row in group], ".3e"),
            f"{group[0]['bits_per_weight']:.3f}",
            spread([row["seconds"] for row in group], ".1f"),
            spread([row["peak_mb"] for row in group], ".0f"),
        )
        for key, group in groups.items()
    ]


def task_rows(rows: Sequence[Json]) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Header and lines of exact match per task, mean over the draws."""
    tasks = tuple(rows[0]["per_task"])
    groups: dict[tuple[str, str], list[Json]] = defaultdict(list)
    for row in rows:
        groups[(row["format"], row["method"])].append(row)
    lines: list[tuple[object, ...]] = [
        (*key, *(statistics.fmean(row["per_task"][task] for row in group) for task in tasks))
        for key, group in groups.items()
    ]
    return ("format", "method", *tasks), lines


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float | None], form: str) -> str:
    """ "mean ± standard deviation" (n - 1), the mean alone for one value, "-" where a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    mean = f"{statistics.fmean(known):{form}}"
    return (
        f"{mean} ± {statistics.stdev(known):{form.replace('3e', '1e')}}" if len(known) > 1 else mean
    )
