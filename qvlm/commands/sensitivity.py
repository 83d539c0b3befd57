"""qvlm sensitivity."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from qvlm.checkpoint import dump_json
from qvlm.commands.command import Command, Json, note, rows_in, say, table
from qvlm.commands.recipe import add_untie_argument
from qvlm.errors import CalibrationError
from qvlm.progress import reporter
from qvlm.trials.budget import add_budget_arguments, budget_of


def _sensitivity_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="model directory, hub id or 'demo'")
    parser.add_argument(
        "--formats", nargs="+", default=["w4a16", "w4a16-g64", "w8a8"], help="to try"
    )
    parser.add_argument("--method", default="gptq", help="quantizes each candidate (gptq)")
    parser.add_argument("--calib", help="folder with samples.jsonl or images (shipped samples)")
    parser.add_argument(
        "--samples", type=int, default=128, help="calibration samples, a quarter measures (128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration samples (0)")
    parser.add_argument(
        "--int4-blocks",
        type=int,
        default=2,
        metavar="N",
        help="least INT4 blocks along a weight's inputs: 2 for TensorRT, 1 for ONNX Runtime (2)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("sensitivity.json"),
        help="JSON file of finished rows; an interrupted run continues (sensitivity.json)",
    )
    add_untie_argument(parser)
    add_budget_arguments(parser)
    parser.add_argument(
        "--write-recipe",
        type=Path,
        default=Path("recipe.json"),
        metavar="FILE",
        help="where the recipe within the budget goes (recipe.json)",
    )


def _sensitivity(arguments: argparse.Namespace) -> Json:
    from qvlm.trials.results import check_folder
    from qvlm.trials.sensitivity_run import SensitivityRun, Settings

    check_folder(arguments.output)
    if arguments.write_recipe.resolve() == arguments.output.resolve():
        raise CalibrationError(
            f"{arguments.output}: --output and --write-recipe name one file. Give the recipe another."
        )
    budget = budget_of(arguments)
    if budget is not None:
        check_folder(arguments.write_recipe)
        if arguments.write_recipe.exists():
            raise CalibrationError(
                f"{arguments.write_recipe}: exists. Give the recipe another name with --write-recipe, or remove it."
            )
    settings = Settings(
        tuple(arguments.formats),
        arguments.method,
        arguments.calib,
        arguments.samples,
        arguments.seed,
        arguments.int4_blocks,
        arguments.untie,
    )
    run = SensitivityRun(arguments.source, settings, arguments.output, reporter())
    if budget is not None:
        run.check(budget)
    rows = run.rows(note)
    for kind in ("component", "layer"):
        lines = [
            (r["component"], r["name"], r["format"], r["kl"], r["exact_match"], r["bytes"])
            for r in rows
            if r["kind"] == kind
        ]
        say(arguments, table(lines, (kind, "name", "format", "KL", "exact match", "bytes")) + "\n")
    findings = run.findings()
    verdicts = {True: "agrees", False: "differs", None: "-"}
    judged = [(f.rule, f.found, verdicts[f.agrees]) for f in findings]
    say(arguments, table(judged, ("rule", "this model", "")))
    result: Json = {"rows": rows, "rules": [asdict(f) for f in findings]}
    if budget is not None:
        found = run.solve(budget)
        dump_json(arguments.write_recipe, found["recipe"])
        _say_solution(arguments, found)
        result["solution"] = found
    return result


def _say_solution(arguments: argparse.Namespace, found: Json) -> None:
    rules = [(rule["pattern"], rule["format"]) for rule in found["recipe"]["rules"]]
    say(arguments, "\n" + table(rules, ("pattern", "format")))
    say(arguments, f"{found['bits_per_weight']:.3f} bits per weight, {found['bytes']} bytes in all")
    say(
        arguments,
        f"KL on held-out samples: predicted {found['predicted_kl']:.4g} as a sum, measured "
        f"{found['measured_kl']:.4g}; no recipe within the budget predicts less than "
        f"{found['predicted_kl'] - found['optimality_gap']:.4g}",
    )
    say(arguments, f"written: {arguments.write_recipe}")


def _kept(arguments: argparse.Namespace) -> str:
    return rows_in(arguments.output)


SENSITIVITY = Command(
    "bits by component: what each layer costs", _sensitivity_arguments, _sensitivity, _kept
)
