"""qvlm ablate."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qvlm.commands.command import Command, Json, cell, note, say, table
from qvlm.commands.experiment import add_experiment_arguments, experiment, rows_kept
from qvlm.recipe import load_recipe


def _ablate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="model directory, hub id or 'demo'")
    parser.add_argument(
        "--formats", nargs="+", default=["w4a16", "w8a8", "w4a4", "w6a6"], help="recipe names"
    )
    add_experiment_arguments(parser, samples=16, draws=1)


def _ablate(arguments: argparse.Namespace) -> Json:
    from qvlm.trials.ablation import Case, ablate
    from qvlm.trials.judge import Judge

    recipes = {name: load_recipe(name) for name in arguments.formats}
    keys = ("source", "calib", "samples", "seed", "eval", "eval_samples")
    identity = {key: getattr(arguments, key) for key in keys}
    given = experiment(arguments)
    model = given.loaded.model
    case = Case(
        model,
        given.source.adapter,
        given.draws,
        Judge(model, given.samples),
        arguments.results,
        identity,
        note,
    )
    rows = ablate(case, recipes)
    _say_ablation(arguments, rows)
    return {"identity": identity, "rows": rows}


def _say_ablation(arguments: argparse.Namespace, rows: Sequence[Json]) -> None:
    cells = [
        (
            row.get("format", "float"),
            row.get("draw", ""),
            row["kind"] if "partition" not in row else f"q-vlm {row['partition']}",
            {True: "yes", False: "no"}.get(row.get("visual_encoder", ""), ""),
            "+".join(str(size) for size in row.get("blocks", [])),
            row["kl"],
            row["exact_match"],
        )
        for row in rows
        if row["kind"] != "ded"
    ]
    header = ("format", "draw", "method", "visual encoder", "blocks", "KL", "exact match")
    say(arguments, table(cells, header))
    for row in rows:
        if row["kind"] == "ded":
            pairs = [tuple(pair.values()) for pair in row["pairs"]]
            say(arguments, f"\n{row['format']}: DED of consecutive decoder layers")
            say(arguments, table(pairs, tuple(row["pairs"][0]) if pairs else ()))
            for name, values in row["correlations"].items():
                shown = ", ".join(f"{k} {cell(v)}" for k, v in values.items())
                say(arguments, f"{name}: {shown}")


ABLATE = Command("what each part of q-vlm is worth", _ablate_arguments, _ablate, rows_kept)
