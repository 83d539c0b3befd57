"""The command line: qvlm quantize, evaluate, compare ... (COMMANDS). Parses, prints, turns errors into one line.

Exit codes: 0 done, 1 failed (one line on stderr), 2 wrong usage. ``--json`` prints one JSON object as the last line
of stdout. Progress goes to stderr. torch is imported when a command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from qvlm import __version__
from qvlm.commands.ablate import ABLATE
from qvlm.commands.command import Command
from qvlm.commands.compare import COMPARE
from qvlm.commands.convert_eval import CONVERT_EVAL
from qvlm.commands.evaluate import EVALUATE
from qvlm.commands.quantize import QUANTIZE
from qvlm.commands.sensitivity import SENSITIVITY
from qvlm.commands.show import SHOW
from qvlm.errors import QvlmError

COMMANDS: dict[str, Command] = {
    "quantize": QUANTIZE,
    "evaluate": EVALUATE,
    "compare": COMPARE,
    "ablate": ABLATE,
    "sensitivity": SENSITIVITY,
    "show": SHOW,
    "convert-eval": CONVERT_EVAL,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qvlm", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        child = subparsers.add_parser(name, help=command.help)
        command.arguments(child)
        child.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        result = COMMANDS[arguments.command].run(arguments)
    except (QvlmError, OSError) as error:
        # An OSError here is the machine's: a full disk, a directory that may not be written.
        print(f"qvlm: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"qvlm: interrupted. {COMMANDS[arguments.command].kept(arguments)}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(result, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
