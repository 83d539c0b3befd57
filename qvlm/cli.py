"""The command line: qvlm quantize, evaluate, compare ... (COMMANDS). Parses, prints, turns errors into one line.

Exit codes: 0 done, 1 failed (one line on stderr), 2 wrong usage. ``--json`` prints one JSON object as the last line
of stdout. Progress goes to stderr. torch is imported when a command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvlm import __version__
from qvlm.budget import (
    add_budget_arguments,
    add_sensitivity_argument,
    budget_of,
    sensitivity_file,
)
from qvlm.checkpoint import Checkpoint, dump_json
from qvlm.errors import QvlmError
from qvlm.progress import reporter
from qvlm.recipe import RECIPES, Recipe, load_recipe

if TYPE_CHECKING:
    from qvlm.capture import Sample
    from qvlm.data import Question
    from qvlm.source import Loaded, Source

Json = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """A subcommand: its arguments, and what it does; ``run`` prints for people unless --json and returns the object."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Json]


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Columns padded to equal width; numbers to the right."""
    cells = [list(header)] + [[_cell(value) for value in row] for row in rows]
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


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def say(arguments: argparse.Namespace, text: str) -> None:
    """Print for people; nothing with --json."""
    if not arguments.json:
        print(text)


# -- quantize


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="model directory, hub id or 'demo'")
    parser.add_argument("output", metavar="OUT", type=Path, help="checkpoint directory to write")
    add_recipe_arguments(parser)
    add_budget_arguments(parser)
    add_sensitivity_argument(parser)
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """--recipe --method --calib --samples --seed, the same in every command that quantizes."""
    names = ", ".join(RECIPES)
    parser.add_argument("--recipe", default="w4a16", help=f"{names}, or a JSON file (w4a16)")
    parser.add_argument("--method", help="overrides the recipe's method")
    parser.add_argument("--calib", help="folder with samples.jsonl or images (shipped samples)")
    parser.add_argument("--samples", type=int, help="calibration samples (64)")
    parser.add_argument("--seed", type=int, help="draws the calibration samples (0)")


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe the arguments name, with what they override."""
    recipe = load_recipe(arguments.recipe)
    given = {key: getattr(arguments, key) for key in ("method", "samples", "seed")}
    return replace(recipe, **{key: value for key, value in given.items() if value is not None})


def _quantize(arguments: argparse.Namespace) -> Json:
    from qvlm.quantize import plan, quantize
    from qvlm.source import open_source

    recipe = recipe_of(arguments)
    source = open_source(arguments.source)
    if (budget := budget_of(arguments)) is not None:
        from qvlm.sensitivity_run import Settings, recipe_within

        file = sensitivity_file(arguments, arguments.output)
        settings = Settings(calib=arguments.calib)
        recipe = recipe_within(source, recipe, budget, file, settings, reporter()).recipe
    planned = plan(source, recipe)
    if arguments.dry_run:
        rows = [
            (
                c.component,
                c.layers,
                c.linears,
                ", ".join(f"{count} {name}" for name, count in c.formats.items()),
                c.bits_per_weight,
                c.nbytes,
            )
            for c in planned.components
        ]
        header = ("component", "layers", "linears", "formats", "bits/weight", "bytes")
        say(arguments, table(rows, header))
        say(arguments, f"embeddings, norms and the rest: {planned.other_bytes} bytes at 16 bit")
        say(arguments, f"whole model: {planned.bits_per_weight:.3f} bits per weight")
        say(arguments, f"peak memory, estimated: {planned.peak_bytes / 1e9:.2f} GB")
        return planned.to_json()
    output = quantize(
        source,
        arguments.output,
        recipe,
        arguments.calib,
        resume=arguments.resume,
        progress=reporter(),
    )
    sizes = _size_rows(Checkpoint(output))
    say(arguments, _size_table(sizes))
    say(arguments, f"written: {output}")
    return {"output": str(output), "recipe": recipe.to_json(), "sizes": sizes}


# -- evaluate


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
        say(arguments, _size_table(sizes))
    tasks = sorted(scores["model"].per_task)
    rows = [("exact match", *(score.exact_match for score in scores.values()))]
    rows += [(task, *(score.per_task[task] for score in scores.values())) for task in tasks]
    say(arguments, table(rows, ("task", *scores)))
    for name, value in result.get("divergence", {}).items():
        say(arguments, f"{name}: {_cell(value)}")
    return result


def _open(name: str) -> tuple[Loaded, list[Json]]:
    """A quantized checkpoint (with its sizes) or a float source."""
    from qvlm.evaluate import load_quantized
    from qvlm.source import load, open_source

    if (Path(name) / "quantization.json").is_file():
        return load_quantized(name), _size_rows(Checkpoint(name))
    return load(open_source(name), reporter()), []


# -- show


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
    sizes = _size_rows(checkpoint)
    rows = [tuple(row.values()) for row in linears]
    say(arguments, table(rows, ("component", "linear", "format", "shape", "bits/weight", "bytes")))
    say(arguments, "\n" + _size_table(sizes))
    say(arguments, f"\nmethod: {json.dumps(checkpoint.method_report, sort_keys=True)}")
    return {
        "recipe": checkpoint.recipe.to_json(),
        "method": checkpoint.method_report,
        "linears": linears,
        "sizes": sizes,
    }


def _size_rows(checkpoint: Checkpoint) -> list[Json]:
    from qvlm.evaluate import sizes

    return [
        {**asdict(size), "bits_per_weight": round(size.bits_per_weight, 4)}
        for size in sizes(checkpoint)
    ]


def _size_table(sizes: Sequence[Json]) -> str:
    rows = [(s["component"], s["parameters"], s["nbytes"], s["bits_per_weight"]) for s in sizes]
    return table(rows, ("component", "weights", "bytes", "bits/weight"))


# -- compare


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
    _experiment_arguments(parser, samples=64, draws=3)


def _experiment_arguments(parser: argparse.ArgumentParser, samples: int, draws: int) -> None:
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


@dataclass(frozen=True)
class _Experiment:
    """What such a command works on: samples of each draw; questions and their samples."""

    source: Source
    loaded: Loaded
    draws: list[list[Sample]]
    questions: list[Question]
    samples: list[Sample]


def _experiment(arguments: argparse.Namespace) -> _Experiment:
    from qvlm.data import calibration, evaluation, refuse_overlap
    from qvlm.errors import CalibrationError
    from qvlm.quantize import build_samples
    from qvlm.source import load, open_source, require_float

    if arguments.draws < 1:
        raise CalibrationError(f"{arguments.draws} draws, expected at least 1")
    source, progress = open_source(arguments.source), reporter()
    require_float(source)
    questions = evaluation(arguments.eval, arguments.eval_samples, arguments.seed)
    seeds = range(arguments.seed, arguments.seed + arguments.draws)
    drawn = [calibration(arguments.calib, arguments.samples, seed) for seed in seeds]
    refuse_overlap((question for draw in drawn for question in draw), questions)
    loaded = load(source, progress)
    draws = [build_samples(loaded, source.adapter, draw, progress) for draw in drawn]
    asked = build_samples(loaded, source.adapter, questions, progress)
    return _Experiment(source, loaded, draws, questions, asked)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _compare(arguments: argparse.Namespace) -> Json:
    from qvlm.compare import HEADER, Case, compare, recipes, table_rows, task_rows
    from qvlm.evaluate import scorer
    from qvlm.judge import Judge

    wanted = recipes(arguments.formats, arguments.methods)
    given = _experiment(arguments)
    model = given.loaded.model
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
        _note,
    )
    outcome = compare(case, wanted)
    say(arguments, table(table_rows(outcome.rows), HEADER))
    header, lines = task_rows(outcome.rows)
    say(arguments, "\nexact match per task\n" + table(lines, header))
    for row in outcome.refused:
        say(arguments, f"{row['format']} {row['method']}: refused, {row['reason']}")
    return asdict(outcome)


# -- convert-eval


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


# -- ablate


def _ablate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="model directory, hub id or 'demo'")
    parser.add_argument(
        "--formats", nargs="+", default=["w4a16", "w8a8", "w4a4", "w6a6"], help="recipe names"
    )
    _experiment_arguments(parser, samples=16, draws=1)


def _ablate(arguments: argparse.Namespace) -> Json:
    from qvlm.ablation import Case, ablate
    from qvlm.judge import Judge

    recipes = {name: load_recipe(name) for name in arguments.formats}
    keys = ("source", "calib", "samples", "seed", "eval", "eval_samples")
    identity = {key: getattr(arguments, key) for key in keys}
    given = _experiment(arguments)
    model = given.loaded.model
    case = Case(
        model,
        given.source.adapter,
        given.draws,
        Judge(model, given.samples),
        arguments.results,
        identity,
        _note,
    )
    rows = ablate(case, recipes)
    _say_ablation(arguments, rows)
    return {"identity": identity, "rows": rows}


def _say_ablation(arguments: argparse.Namespace, rows: Sequence[Json]) -> None:
    cells = [
        (
            row.get("format", "float"),
            row.get("draw", ""),
            row["kind"] if "partition" not in row else f"q-vlm {row['partition']}",
            {True: "yes", False: "no"}.get(row.get("visual_encoder", ""), ""),
            "+".join(str(size) for size in row.get("blocks", [])),
            row["kl"],
            row["exact_match"],
        )
        for row in rows
        if row["kind"] != "ded"
    ]
    header = ("format", "draw", "method", "visual encoder", "blocks", "KL", "exact match")
    say(arguments, table(cells, header))
    for row in rows:
        if row["kind"] == "ded":
            pairs = [tuple(pair.values()) for pair in row["pairs"]]
            say(arguments, f"\n{row['format']}: DED of consecutive decoder layers")
            say(arguments, table(pairs, tuple(row["pairs"][0]) if pairs else ()))
            for name, values in row["correlations"].items():
                shown = ", ".join(f"{k} {_cell(v)}" for k, v in values.items())
                say(arguments, f"{name}: {shown}")


# -- sensitivity


def _sensitivity_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="model directory, hub id or 'demo'")
    parser.add_argument(
        "--formats", nargs="+", default=["w4a16", "w4a16-g64", "w8a8"], help="to try"
    )
    parser.add_argument("--method", default="gptq", help="quantizes each candidate (gptq)")
    parser.add_argument("--calib", help="folder with samples.jsonl or images (shipped samples)")
    parser.add_argument(
        "--samples", type=int, default=128, help="calibration samples, a quarter measures (128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration samples (0)")
    parser.add_argument(
        "--int4-blocks",
        type=int,
        default=2,
        metavar="N",
        help="least INT4 blocks along a weight's inputs: 2 for TensorRT, 1 for ONNX Runtime (2)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("sensitivity.json"),
        help="JSON file of finished rows; an interrupted run continues (sensitivity.json)",
    )
    add_budget_arguments(parser)
    parser.add_argument(
        "--write-recipe",
        type=Path,
        default=Path("recipe.json"),
        metavar="FILE",
        help="where the recipe within the budget goes (recipe.json)",
    )


def _sensitivity(arguments: argparse.Namespace) -> Json:
    from qvlm.sensitivity_run import SensitivityRun, Settings

    settings = Settings(
        tuple(arguments.formats),
        arguments.method,
        arguments.calib,
        arguments.samples,
        arguments.seed,
        arguments.int4_blocks,
    )
    run = SensitivityRun(arguments.source, settings, arguments.output, reporter())
    rows = run.rows(lambda line: print(line, file=sys.stderr, flush=True))
    for kind in ("component", "layer"):
        lines = [
            (r["component"], r["name"], r["format"], r["kl"], r["exact_match"], r["bytes"])
            for r in rows
            if r["kind"] == kind
        ]
        say(arguments, table(lines, (kind, "name", "format", "KL", "exact match", "bytes")) + "\n")
    findings = run.findings()
    verdicts = {True: "agrees", False: "differs", None: "-"}
    judged = [(f.rule, f.found, verdicts[f.agrees]) for f in findings]
    say(arguments, table(judged, ("rule", "this model", "")))
    result: Json = {"rows": rows, "rules": [asdict(f) for f in findings]}
    budget = budget_of(arguments)
    if budget is not None:
        found = run.solve(budget)
        dump_json(arguments.write_recipe, found["recipe"])
        _say_solution(arguments, found)
        result["solution"] = found
    return result


def _say_solution(arguments: argparse.Namespace, found: Json) -> None:
    rules = [(rule["pattern"], rule["format"]) for rule in found["recipe"]["rules"]]
    say(arguments, "\n" + table(rules, ("pattern", "format")))
    say(arguments, f"{found['bits_per_weight']:.3f} bits per weight, {found['bytes']} bytes in all")
    say(
        arguments,
        f"KL on held-out samples: predicted {found['predicted_kl']:.4g} as a sum, measured "
        f"{found['measured_kl']:.4g}; no recipe within the budget predicts less than "
        f"{found['predicted_kl'] - found['optimality_gap']:.4g}",
    )
    say(arguments, f"written: {arguments.write_recipe}")


COMMANDS: dict[str, Command] = {
    "quantize": Command("quantize a model", _quantize_arguments, _quantize),
    "evaluate": Command("exact match, divergence, sizes", _evaluate_arguments, _evaluate),
    "compare": Command("methods x formats x draws on one table", _compare_arguments, _compare),
    "ablate": Command("what each part of q-vlm is worth", _ablate_arguments, _ablate),
    "sensitivity": Command(
        "bits by component: what each layer costs", _sensitivity_arguments, _sensitivity
    ),
    "show": Command("linears, bits and bytes of a checkpoint", _show_arguments, _show),
    "convert-eval": Command(
        "a benchmark's files to an --eval folder", _convert_arguments, _convert
    ),
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
        print("qvlm: interrupted. Finished work is kept; continue with --resume.", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(result, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
