"""qvlm evaluate."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qvlm.checkpoint import Checkpoint
from qvlm.commands.command import Command, Json, cell, say, table
from qvlm.commands.sizes import size_rows, size_table
from qvlm.progress import reporter

if TYPE_CHECKING:
    from qvlm.source import Loaded


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="quantized checkpoint, or a float model")
    parser.add_argument("--eval", help="folder with samples.jsonl (shipped held-out questions)")
    parser.add_argument("--samples", type=int, default=200, help="questions (200)")
    parser.add_argument("--seed", type=int, default=0, help="draws the questions (0)")
    parser.add_argument("--against", metavar="SRC", help="float model to measure divergence from")


def _evaluate(arguments: argparse.Namespace) -> Json:
    from qvlm.data import evaluation
    from qvlm.evaluate import answers, divergence

    loaded, sizes = _open(arguments.directory)
    questions = evaluation(arguments.eval, arguments.samples, arguments.seed)
    progress = reporter()
    scores = {"model": answers(loaded, questions, progress)}
    result: Json = {"samples": len(questions)}
    if arguments.against is not None:
        reference, _ = _open(arguments.against)
        scores["against"] = answers(reference, questions, progress, stage="answer (against)")
        result["divergence"] = asdict(divergence(reference, loaded, questions, progress))
    for name, score in scores.items():
        result[name] = {"exact_match": score.exact_match, "per_task": score.per_task}
    if sizes:
        result["sizes"] = sizes
        say(arguments, size_table(sizes))
    tasks = sorted(scores["model"].per_task)
    rows = [("exact match", *(score.exact_match for score in scores.values()))]
    rows += [(task, *(score.per_task[task] for score in scores.values())) for task in tasks]
    say(arguments, table(rows, ("task", *scores)))
    for name, value in result.get("divergence", {}).items():
        say(arguments, f"{name}: {cell(value)}")
    return result


def _open(name: str) -> tuple[Loaded, list[Json]]:
    """A quantized checkpoint (with its sizes) or a float source."""
    from qvlm.evaluate import load_quantized
    from qvlm.source import load, open_source

    if (Path(name) / "quantization.json").is_file():
        return load_quantized(name), size_rows(Checkpoint(name))
    return load(open_source(name), reporter()), []


EVALUATE = Command("exact match, divergence, sizes", _evaluate_arguments, _evaluate)
