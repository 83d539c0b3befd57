"""What a subcommand of ``qvlm`` is, and how all of them print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def nothing_kept(arguments: argparse.Namespace) -> str:
    """Of a command whose work is lost when it is interrupted."""
    return "Nothing is kept."


@dataclass(frozen=True)
class Command:
    """A subcommand: its arguments, and what it does; ``run`` prints for people unless --json and returns the object.

    kept: what an interrupt leaves, and how to go on.
    """

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Json]
    kept: Callable[[argparse.Namespace], str] = nothing_kept


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Columns padded to equal width; numbers to the right."""
    cells = [list(header)] + [[cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def say(arguments: argparse.Namespace, text: str) -> None:
    """Print for people; nothing with --json."""
    if not arguments.json:
        print(text)


def note(line: str) -> None:
    """A line for people beside the results."""
    print(line, file=sys.stderr, flush=True)


def note_unmatched(patterns: Sequence[str], recipe: str = "the recipe") -> None:
    """A note per pattern of a recipe that matches nothing."""
    for pattern in patterns:
        note(f"note: no linear or embedding matches {recipe}'s {pattern!r}")


def rows_in(path: Path) -> str:
    """What an interrupt says of the file of finished rows."""
    if not path.exists():
        return "No row was finished."
    return f"Finished rows are in {path}; the same command continues."
