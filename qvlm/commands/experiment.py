"""Data, draws and questions of commands that try many quantizations."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qvlm.commands.command import rows_in
from qvlm.progress import reporter

if TYPE_CHECKING:
    from qvlm.capture import Sample
    from qvlm.data import Question
    from qvlm.source import Loaded, Source


def add_experiment_arguments(parser: argparse.ArgumentParser, samples: int, draws: int) -> None:
    """Data and results file of commands that try many quantizations."""
    parser.add_argument("--calib", help="folder with samples.jsonl or images (shipped samples)")
    parser.add_argument(
        "--samples", type=int, default=samples, help=f"calibration samples ({samples})"
    )
    parser.add_argument("--draws", type=int, default=draws, help=f"calibration draws ({draws})")
    parser.add_argument("--seed", type=int, default=0, help="of the first draw (0)")
    parser.add_argument("--eval", help="folder with samples.jsonl (shipped held-out questions)")
    parser.add_argument("--eval-samples", type=int, default=200, help="questions (200)")
    parser.add_argument(
        "--results", type=Path, help="JSON file of finished rows; an interrupted run continues"
    )


def rows_kept(arguments: argparse.Namespace) -> str:
    """What an interrupt leaves of an experiment."""
    if arguments.results is None:
        return "Nothing is kept without --results FILE."
    return rows_in(arguments.results)


@dataclass(frozen=True)
class Experiment:
    """What such a command works on: samples of each draw; questions and their samples."""

    source: Source
    loaded: Loaded
    draws: list[list[Sample]]
    questions: list[Question]
    samples: list[Sample]


def experiment(arguments: argparse.Namespace) -> Experiment:
    from qvlm.data import calibration, evaluation, refuse_overlap
    from qvlm.errors import CalibrationError
    from qvlm.quantize import build_samples
    from qvlm.source import load, open_source, require_float
    from qvlm.trials.results import check_folder

    check_folder(arguments.results)
    if arguments.draws < 1:
        raise CalibrationError(f"{arguments.draws} draws, expected at least 1")
    source, progress = open_source(arguments.source), reporter()
    require_float(source)
    questions = evaluation(arguments.eval, arguments.eval_samples, arguments.seed)
    seeds = range(arguments.seed, arguments.seed + arguments.draws)
    drawn = [calibration(arguments.calib, arguments.samples, seed) for seed in seeds]
    refuse_overlap((question for draw in drawn for question in draw), questions)
    _refuse_one_draw(drawn, arguments.samples)
    loaded = load(source, progress)
    draws = [build_samples(loaded, source.adapter, draw, progress) for draw in drawn]
    asked = build_samples(loaded, source.adapter, questions, progress)
    return Experiment(source, loaded, draws, questions, asked)


def _refuse_one_draw(drawn: list[list[Question]], wanted: int) -> None:
    """CalibrationError if two draws are the same samples: their spread would say nothing."""
    from qvlm.errors import CalibrationError

    for later, draw in enumerate(drawn):
        for earlier in range(later):
            if draw == drawn[earlier]:
                hint = f"--samples below {wanted}, " if wanted > 1 else ""
                raise CalibrationError(
                    f"draws {earlier + 1} and {later + 1} are the same {len(draw)} samples. Give --draws {later}, "
                    f"{hint}or more questions to draw from."
                )
