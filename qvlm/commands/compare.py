"""qvlm compare."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from qvlm.commands.command import Command, Json, note, note_unmatched, say, table
from qvlm.commands.experiment import add_experiment_arguments, experiment, rows_kept
from qvlm.commands.recipe import add_untie_argument


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="model directory, hub id or 'demo'")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=["w4a16"],
        help="recipes, or number formats of the decoder (vision and projector then w8a8) (w4a16)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["rtn", "gptq"],
        help="name or name:option=value,option=value, values JSON or a word; transforms before it: "
        "rotate+gptq (rtn gptq)",
    )
    add_untie_argument(parser)
    add_experiment_arguments(parser, samples=64, draws=3)


def _compare(arguments: argparse.Namespace) -> Json:
    from qvlm.evaluate import scorer
    from qvlm.plan import unmatched
    from qvlm.trials.compare import (
        HEADER,
        Case,
        compare,
        parse_format,
        recipes,
        table_rows,
        task_rows,
    )
    from qvlm.trials.judge import Judge

    wanted = recipes(arguments.formats, arguments.methods, arguments.untie)
    given = experiment(arguments)
    model = given.loaded.model
    for name in dict.fromkeys(arguments.formats):
        missed = unmatched(model, given.source.adapter, parse_format(name))
        note_unmatched(missed, f"recipe {name}")
    case = Case(
        given.source,
        model,
        given.draws,
        given.questions,
        given.samples,
        Judge(model, given.samples),
        # A user's questions may accept several answers: those are generated and matched.
        scorer(given.loaded, given.questions) if arguments.eval not in (None, "demo") else None,
        arguments.results,
        note,
    )
    outcome = compare(case, wanted)
    say(arguments, table(table_rows(outcome.rows), HEADER))
    header, lines = task_rows(outcome.rows)
    say(arguments, "\nexact match per task\n" + table(lines, header))
    for row in outcome.refused:
        say(arguments, f"{row['format']} {row['method']}: refused, {row['reason']}")
    return asdict(outcome)


COMPARE = Command("methods x formats x draws on one table", _compare_arguments, _compare, rows_kept)
