"""qvlm convert-eval."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from qvlm.commands.command import Command, Json, say


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("layout", choices=["scienceqa"], help="of the questions to convert")
    parser.add_argument("file", metavar="FILE", type=Path, help="scienceqa: problems.json")
    parser.add_argument("--images", type=Path, required=True, help="the data set's image folder")
    parser.add_argument("output", metavar="OUT", type=Path, help="folder to write, for --eval")
    parser.add_argument("--split", default="test", help="train, val or test (test)")


def _convert(arguments: argparse.Namespace) -> Json:
    from qvlm.scienceqa import convert

    result = convert(arguments.file, arguments.images, arguments.output, arguments.split)
    say(arguments, f"written: {arguments.output} ({result.questions} questions)")
    say(arguments, f"left out, without an image: {result.without_image}")
    return {"output": str(arguments.output), **asdict(result)}


CONVERT_EVAL = Command("a benchmark's files to an --eval folder", _convert_arguments, _convert)
