"""What the commands of ``qvlm-export`` share: their shape, and the option that several have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Exit code, and the object that --json prints.
Answer = tuple[int, dict[str, Any]]
Command = tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], Answer]]


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with --json."""
    parser = argparse.ArgumentParser(
        prog=f"qvlm-export{name and ' ' + name}", description=description
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser


def add_compare(parser: argparse.ArgumentParser) -> None:
    """--compare."""
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="rows of `qvlm compare` to draw in the report"
    )


def comparison(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that --compare names; [] without it."""
    from qvlm_export.report import read_comparison

    return read_comparison(args.compare) if args.compare else []
