"""qvlm-bench: time, memory and energy of model folders on this machine.

Writes bench.json (schema: result.py) and bench.html. Exit 0 measured, 1 failed (one line on
stderr), 2 usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qvlm_runtime.backend import BACKENDS, EXACT, FAST
from qvlm_runtime.bench import result
from qvlm_runtime.bench.floors import Limits, measure_limits
from qvlm_runtime.bench.foreign import Foreign, read_foreign
from qvlm_runtime.bench.machine import Machine
from qvlm_runtime.bench.measure import Samples, Session, ratios
from qvlm_runtime.bench.page import to_html
from qvlm_runtime.bench.plan import Plan, read_plan
from qvlm_runtime.bench.power import PowerReader, choose
from qvlm_runtime.bench.power.choose import SENSORS
from qvlm_runtime.bench.weights import graph_weights
from qvlm_runtime.bench.worker import WorkerSubject
from qvlm_runtime.errors import PromptError, RuntimeFault
from qvlm_runtime.manifest import read_manifest
from qvlm_runtime.vision import layout

_PLAN_FLAGS = {
    "prompt_tokens": (
        "--prompt-tokens",
        int,
        "text tokens of the prompts, the template's included",
    ),
    "images": ("--images", int, "images of a prompt"),
    "output_tokens": ("--output-tokens", int, "tokens of an answer"),
    "threads": ("--threads", int, "numbers of threads; 0 is the engine's choice"),
    "contexts": ("--contexts", int, "cached tokens at which decode is timed"),
}
_PLAN_NUMBERS = {
    "rounds": ("--rounds", int, "at least so many rounds"),
    "max_rounds": ("--max-rounds", int, "at most so many"),
    "spread": ("--spread", float, "stop when every half-interval is this share of its median"),
    "steps": ("--steps", int, "decode steps per context and round"),
    "warmup": ("--warmup", int, "rounds thrown away first"),
    "energy_seconds": ("--energy-seconds", float, "how long a part runs for its energy"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qvlm-bench",
        description="Measure folders written by qvlm-export on this machine. Several folders are "
        "loaded at once and run in turn, round by round.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folders", metavar="OUT", nargs="+", help="folders written by qvlm-export")
    add("--ratio", action="store_true", help="speed of each folder against the first, with spread")
    add(
        "--plan",
        type=Path,
        metavar="FILE",
        help="matrix and repetitions, JSON or YAML; flags go before it",
    )
    for name, (flag, kind, text) in _PLAN_FLAGS.items():
        add(flag, dest=name, type=_numbers(kind), metavar="N[,N…]", help=text)
    for name, (flag, number, text) in _PLAN_NUMBERS.items():
        add(flag, dest=name, type=number, metavar="N", help=text)
    add("--image-size", type=_numbers(int, "x"), metavar="WxH", help="frames; default 640x480")
    add("--target", help="default: one with engines for this GPU, ort, or the only one")
    add("--backend", choices=BACKENDS, help="default: engines built for this GPU, else ort")
    add("--exact", action="store_true", help="float32 activations in INT4 products (slower)")
    add(
        "--prepared",
        metavar="DIR",
        help="where the engine keeps its form of the graphs (faster load)",
    )
    power = ("auto", "none", *SENSORS)
    add("--power", choices=power, default="auto", help="where energy is read (default: auto)")
    add("--no-floors", action="store_true", help="do not measure the machine's own limits")
    add("--with", dest="foreign", type=Path, action="append", default=[], metavar="FILE",
        help="results of llama-bench or TensorRT-Edge-LLM, as extra bars; may be repeated")  # fmt: skip
    add(
        "--output",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="for bench.json and bench.html",
    )
    add("--json", action="store_true", help="bench.json's content as the last line")
    return parser


def _numbers(kind: Any, sign: str = ",") -> Any:
    def numbers(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(sign))

    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvlm-bench; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        names = (*_PLAN_FLAGS, *_PLAN_NUMBERS, "image_size")
        plan = read_plan(args.plan, {name: getattr(args, name) for name in names})
        if args.ratio and len(args.folders) < 2:
            raise PromptError("--ratio: one folder given, expected at least two.")
        foreign = [one for path in args.foreign for one in read_foreign(path)]
        _make_folder(args.output)
        data = _measure(args, plan, foreign)
        _write(args.output, data)
    except RuntimeFault as fault:
        print(f"qvlm-bench: {fault}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qvlm-bench: interrupted, nothing was written", file=sys.stderr)
        return 1
    _summary(data)
    print(f"{args.output / 'bench.json'}  {args.output / 'bench.html'}")
    if args.json:
        print(json.dumps(data))
    return 0


def _say(text: str) -> None:
    print(f"qvlm-bench: {text}", file=sys.stderr, flush=True)


def _measure(args: argparse.Namespace, plan: Plan, foreign: Sequence[Foreign]) -> dict[str, Any]:
    machine = Machine()
    readers, reasons = choose(args.power)
    try:
        return _all_threads(args, plan, foreign, machine, readers, reasons)
    finally:
        for reader in readers:
            reader.close()


def _all_threads(
    args: argparse.Namespace,
    plan: Plan,
    foreign: Sequence[Foreign],
    machine: Machine,
    readers: Sequence[PowerReader],
    reasons: dict[str, str],
) -> dict[str, Any]:
    """The whole of bench.json: one session per number of threads."""
    description, subjects = machine.describe(), list[dict[str, Any]]()
    for folder in args.folders:
        read_manifest(Path(folder))  # a folder that is none is told before anything is measured
    limits: dict[int, Limits] = {}
    ratio_rows, rounds_of = list[dict[str, Any]](), dict[str, Any]()
    for threads in plan.threads:
        if not args.no_floors:
            _say("measuring the machine's read bandwidth and matrix product")
            limits[threads] = measure_limits(threads or description["cores"])
        openers = [
            partial(
                WorkerSubject,
                Path(folder),
                target=args.target,
                backend=args.backend,
                threads=threads or None,
                accuracy_level=EXACT if args.exact else FAST,
                prepared=args.prepared,
                image_size=plan.image_size,
            )
            for folder in args.folders
        ]
        samples, rounds = Session(plan, openers, machine.snapshot, readers, _say).run()
        _distinguish(samples)
        peak = result.device_peak([one.after.gpus for one in rounds])
        for folder, one in zip(args.folders, samples, strict=True):
            fact = _facts(Path(folder), one.target, plan.image_size)
            limit = machine.memory_limit()
            subjects.append(result.subject(one, threads, fact, limits.get(threads), limit, peak))
        ratio_rows += ratios(samples) if args.ratio else []
        rounds_of[str(threads)] = [asdict(one) for one in rounds]
    return {
        "schema": result.SCHEMA,
        "version": _version(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": description,
        "plan": asdict(plan),
        "power": {
            "sources": [
                {"source": r.source, "rails": list(r.rails), "total": list(r.total)}
                for r in readers
            ],
            "not_available": reasons,
        },
        "limits": {str(threads): asdict(one) for threads, one in limits.items()},
        "subjects": subjects,
        "ratios": ratio_rows,
        "rounds": rounds_of,
        "imported": [asdict(one) for one in foreign],
    }


def _facts(folder: Path, target: str, image_size: tuple[int, int]) -> result.Facts:
    """What the folder says about itself."""
    manifest = read_manifest(folder)
    spec = manifest.targets[target]
    graphs = {name: graph_weights(folder / spec.graphs[name]) for name in ("decoder", "vision")}
    width, height = image_size
    rows = layout(manifest.image, height, width).rows
    return result.Facts(manifest.model, spec.dtype, graphs["decoder"], graphs["vision"], rows)


def _distinguish(samples: Sequence[Samples]) -> None:
    """A folder that was given twice gets a number behind its name."""
    seen: dict[str, int] = {}
    for one in samples:
        seen[one.name] = seen.get(one.name, 0) + 1
        if seen[one.name] > 1:
            one.name = f"{one.name} ({seen[one.name]})"


def _version() -> str:
    try:
        return version("qvlm")
    except PackageNotFoundError:
        return "not installed"


def _make_folder(folder: Path) -> None:
    """Before anything is measured: a result that cannot be written is an hour lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".bench.json.part").touch()
    except OSError as error:
        raise PromptError(
            f"{folder}: cannot be written ({error}). Give another --output."
        ) from error
    (folder / ".bench.json.part").unlink()


def _write(folder: Path, data: dict[str, Any]) -> None:
    """Both files, each replaced in one step."""
    texts = {"bench.json": json.dumps(data, indent=2) + "\n", "bench.html": to_html(data)}
    for name, text in texts.items():
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, folder / name)


def _summary(data: dict[str, Any]) -> None:
    """The figures on a terminal: a line each."""
    for subject in data["subjects"]:
        print(f"{subject['name']} (threads: {subject['threads'] or 'engine default'})")
        load, memory = subject["load"], subject["memory"]
        print(
            f"  load {load['seconds']['median']:.2f} s, resident {load['resident_bytes'] / 1e6:.0f} MB, "
            f"peak of the run {memory['host_peak_bytes'] / 1e6:.0f} MB"
        )
        for case in subject["cases"]:
            parts = ", ".join(
                f"{part} {1e3 * case['first_token'][part]['median']:.2f}"
                for part in ("preprocess", "vision", "prefill", "other")
            )
            whole = 1e3 * case["first_token"]["whole"]["median"]
            print(f"  first token {whole:.2f} ms ({parts}), {case['total_prompt_tokens']} tokens")
        for row in subject["contexts"]:
            share = f", {row['floor']['share']:.2f} of the floor" if row["floor"] else ""
            print(f"  decode at {row['context']}: {row['tokens_per_second']:.1f} tokens/s{share}")
        for part in ("token", "image"):
            if part in subject["energy"]:
                print(f"  {subject['energy'][part]['joules']:.3g} J per {part}")
    for row in data["ratios"]:
        one = row["figure"]
        print(
            f"{row['name']} against {row['against']}, {row['series']}: {one['median']:.3f} "
            f"[{one['low']:.3f}, {one['high']:.3f}] ({100 * one['coverage']:.0f} %)"
        )


if __name__ == "__main__":
    sys.exit(main())
