"""qvlm-run: ask a model folder about images.

Exit 0 answered, 1 failed (one line on stderr), 2 usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qvlm_runtime.backend import BACKENDS, EXACT, FAST
from qvlm_runtime.errors import PromptError, RuntimeFault
from qvlm_runtime.loading import load
from qvlm_runtime.stream import Generation


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qvlm-run",
        description="Ask a folder written by qvlm-export about images.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", metavar="OUT", help="folder written by qvlm-export")
    add("prompt", metavar="PROMPT", help="the question")
    add("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    add("--target", help="default: one with engines for this GPU, ort, or the only one")
    add("--backend", choices=BACKENDS, help="default: engines built for this GPU, else ort")
    add("--max-new-tokens", type=int, metavar="N", help="default: 256, or what the cache holds")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    add("--top-k", type=int, default=0, metavar="K", help="0 keeps all tokens (default)")
    add("--top-p", type=float, default=1.0, metavar="P", help="1 keeps all tokens (default)")
    add("--min-p", type=float, default=0.0, metavar="P", help="0 keeps all tokens (default)")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is off (default)")
    add("--presence-penalty", type=float, default=0.0, metavar="R", help="0 is off (default)")
    add("--json-schema", type=Path, metavar="FILE", help="the answer keeps to it (extra [json])")
    add("--seed", type=int, help="for temperature above 0; default: fresh entropy")
    add("--stop", action="append", default=[], metavar="TEXT", help="may be repeated")
    add("--timeout", type=float, metavar="S", help="end the answer after that many seconds")
    add("--prefill-chunk", type=int, metavar="N", help="run the prompt N tokens at a time")
    add("--threads", type=int, metavar="N", help="default: the engine's choice")
    add("--exact", action="store_true", help="float32 activations in INT4 products (slower)")
    add(
        "--prepared",
        metavar="DIR",
        help="where the engine keeps its form of the graphs (faster load)",
    )
    add("--no-verify", action="store_true", help="do not compare the files' sha256")
    add("--stream", action="store_true", help="print the text while it is made")
    add("--json", action="store_true", help="one JSON object as the last line")
    return parser


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: not readable ({error})") from error


def _answer(args: argparse.Namespace) -> Generation:
    level = EXACT if args.exact else FAST
    with load(
        args.folder,
        args.target,
        backend=args.backend,
        threads=args.threads,
        accuracy_level=level,
        verify=not args.no_verify,
        prepared=args.prepared,
    ) as model:
        stream = model.stream(
            args.prompt,
            args.image,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            presence_penalty=args.presence_penalty,
            json_schema=None if args.json_schema is None else _text(args.json_schema),
            seed=args.seed,
            stop=args.stop,
            timeout=args.timeout,
            prefill_chunk=args.prefill_chunk,
        )
        for piece in stream:
            if args.stream:
                print(piece, end="", flush=True)
        if args.stream:
            print()
        return stream.generation


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvlm-run; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        generation = _answer(args)
        if args.json:
            print(json.dumps(dataclasses.asdict(generation), ensure_ascii=False), flush=True)
        elif not args.stream:
            print(generation.text, flush=True)
    except RuntimeFault as fault:
        print(f"qvlm-run: {fault}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qvlm-run: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader has gone; what is left in stdout's buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
