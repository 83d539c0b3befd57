"""qvlm show."""

from __future__ import annotations

import argparse
import json

from qvlm.checkpoint import Checkpoint
from qvlm.commands.command import Command, Json, say, table
from qvlm.commands.sizes import size_rows, size_table


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="quantized checkpoint")


def _show(arguments: argparse.Namespace) -> Json:
    checkpoint = Checkpoint(arguments.directory)
    linears = []
    for name, entry in checkpoint.linears.items():
        linear = checkpoint.linear(name)
        assert linear is not None
        out, columns = linear.integers.shape
        bits = 8 * linear.nbytes() / linear.integers.size
        linears.append(
            {
                "component": entry["component"],
                "name": name,
                "format": entry["format"],
                "shape": [out, columns],
                "bits_per_weight": bits,
                "bytes": linear.nbytes(),
            }
        )
    sizes = size_rows(checkpoint)
    rows = [tuple(row.values()) for row in linears]
    say(arguments, table(rows, ("component", "linear", "format", "shape", "bits/weight", "bytes")))
    say(arguments, "\n" + size_table(sizes))
    say(arguments, f"\nmethod: {json.dumps(checkpoint.method_report, sort_keys=True)}")
    return {
        "recipe": checkpoint.recipe.to_json(),
        "method": checkpoint.method_report,
        "linears": linears,
        "sizes": sizes,
    }


SHOW = Command("linears, bits and bytes of a checkpoint", _show_arguments, _show)
