"""qvlm quantize."""

from __future__ import annotations

import argparse
from pathlib import Path

from qvlm.checkpoint import Checkpoint
from qvlm.commands.command import Command, Json, note_unmatched, say, table
from qvlm.commands.recipe import add_recipe_arguments, recipe_of
from qvlm.commands.sizes import size_rows, size_table
from qvlm.progress import reporter
from qvlm.trials.budget import (
    add_budget_arguments,
    add_sensitivity_argument,
    budget_of,
    sensitivity_file,
)
from qvlm.workdir import WorkDirectory


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="model directory, hub id or 'demo'")
    parser.add_argument("output", metavar="OUT", type=Path, help="checkpoint directory to write")
    add_recipe_arguments(parser)
    add_budget_arguments(parser)
    add_sensitivity_argument(parser)
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def _quantize(arguments: argparse.Namespace) -> Json:
    from qvlm.quantize import plan, quantize
    from qvlm.source import open_source

    recipe = recipe_of(arguments)
    if not arguments.dry_run:
        WorkDirectory(arguments.output, arguments.resume)  # refuses before anything is measured
    source = open_source(arguments.source)
    if (budget := budget_of(arguments)) is not None:
        from qvlm.trials.sensitivity_run import Settings, recipe_within

        file = sensitivity_file(arguments, arguments.output)
        file.parent.mkdir(parents=True, exist_ok=True)
        settings = Settings(calib=arguments.calib)
        recipe = recipe_within(source, recipe, budget, file, settings, reporter()).recipe
    planned = plan(source, recipe)
    note_unmatched(planned.unmatched)
    if arguments.dry_run:
        rows = [
            (
                c.component,
                c.layers,
                c.linears,
                ", ".join(f"{count} {name}" for name, count in c.formats.items()),
                c.bits_per_weight,
                c.nbytes,
            )
            for c in planned.components
        ]
        header = ("component", "layers", "linears", "formats", "bits/weight", "bytes")
        say(arguments, table(rows, header))
        say(arguments, f"embeddings, norms and the rest: {planned.other_bytes} bytes at 16 bit")
        say(arguments, f"whole model: {planned.bits_per_weight:.3f} bits per weight")
        say(arguments, f"peak memory, estimated: {planned.peak_bytes / 1e9:.2f} GB")
        return planned.to_json()
    output = quantize(
        source,
        arguments.output,
        recipe,
        arguments.calib,
        resume=arguments.resume,
        progress=reporter(),
    )
    sizes = size_rows(Checkpoint(output))
    say(arguments, size_table(sizes))
    say(arguments, f"written: {output}")
    return {"output": str(output), "recipe": recipe.to_json(), "sizes": sizes}


def _kept(arguments: argparse.Namespace) -> str:
    return "Finished work is kept; continue with --resume."


QUANTIZE = Command("quantize a model", _quantize_arguments, _quantize, _kept)
