"""qvlm-export: a checkpoint becomes a verified model folder.

    qvlm-export SRC OUT [--target T]... [--recipe NAME|FILE] [--method M] [--calib PATH] ...
    qvlm-export verify OUT       replay the goldens through ONNX Runtime
    qvlm-export check OUT|FILE   TensorRT's rules, without TensorRT
    qvlm-export build OUT        engines: with TensorRT on this device, or for rtx on any machine
    qvlm-export report OUT       draw report.html again, with a comparison's rows
    qvlm-export targets          the table of targets

Exit 0 done, 1 failed (one line on stderr), 2 usage.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qvlm.commands.recipe import add_untie_argument, recipe_of
from qvlm.errors import ExportError, QvlmError
from qvlm.progress import reporter
from qvlm.recipe import RECIPES, Recipe
from qvlm.trials.budget import (
    add_budget_arguments,
    add_sensitivity_argument,
    budget_of,
    sensitivity_file,
)
from qvlm_export.image_limits import ImageLimits
from qvlm_export.targets import TARGETS, Variant
from qvlm_runtime.errors import RuntimeFault
from qvlm_runtime.manifest import CACHE_FORMS, DTYPES

Answer = tuple[int, dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvlm-export; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words and words[0] in _COMMANDS else ""
    parser, run = _COMMANDS[name]() if name else _export_parser()
    args = parser.parse_args(words[1:] if name else words)
    try:
        code, answer = run(args)
    except (QvlmError, RuntimeFault) as error:
        return _fail(str(error))
    except OSError as error:
        hint = (
            " Free some space and run again with --resume." if error.errno == errno.ENOSPC else ""
        )
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}.{hint}")
    except KeyboardInterrupt:
        return _fail("interrupted. Run again with --resume to continue.")
    if args.json:
        print(json.dumps(answer, sort_keys=True))
    return code


def _fail(message: str) -> int:
    print(f"qvlm-export: {' '.join(message.split())}", file=sys.stderr)
    return 1


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"qvlm-export{name and ' ' + name}", description=description
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser


Command = tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], Answer]]


def _export_parser() -> Command:
    parser = _parser("", "Quantize, export, verify and package a vision-language model.")
    add = parser.add_argument
    add("source", metavar="SRC", help='HF directory, hub id, quantized checkpoint, or "demo"')
    add(
        "out",
        metavar="OUT",
        type=Path,
        help="folder to write; also: verify, check, build, report, targets",
    )
    add("--target", action="append", choices=list(TARGETS), help="default ort; may be repeated")
    add(
        "--recipe",
        default="w4a16",
        metavar="NAME|FILE",
        help=f"{', '.join(RECIPES)}, or a JSON file",
    )
    add("--method", metavar="M", help="default: fused for a named recipe, else what the file says")
    add(
        "--calib",
        metavar="PATH",
        help="folder with samples.jsonl or images; default: shipped samples",
    )
    add("--samples", type=int, metavar="N", help="calibration samples (default 64)")
    add("--seed", type=int, metavar="S", help="draw of the calibration samples (default 0)")
    add("--dtype", choices=DTYPES, help="float type of the graphs; default: the target's first")
    add(
        "--overflow",
        choices=("refuse", "float32"),
        default="refuse",
        help="a layer whose activations leave float16: refuse the export (default), or compute it in "
        "float32",
    )
    add("--cache", choices=CACHE_FORMS, help="key/value cache; default: the target's first")
    add(
        "--max-tensor",
        type=int,
        metavar="MB",
        help="store a larger weight (a large output projection) in pieces of MB megabytes",
    )
    add_untie_argument(parser)
    add_budget_arguments(parser)
    add_sensitivity_argument(parser)
    add("--max-context", type=int, metavar="N", help="cache length; default: the model's own")
    add("--image-size", type=int, metavar="N", help="scale images down to the area of N x N pixels")
    add("--max-image-tokens", type=int, metavar="N", help="scale images down to N tokens")
    add(
        "--sm",
        type=int,
        action="append",
        metavar="NN",
        help="rtx: compile for this generation (86, 89)",
    )
    add(
        "--keep-checkpoint",
        action="store_true",
        help="keep OUT.checkpoint, the quantized checkpoint",
    )
    _add_compare(parser)
    add("--resume", action="store_true", help="continue an interrupted export")
    add("--overwrite", action="store_true", help="replace OUT if it exists")
    add("--dry-run", action="store_true", help="print the plan: layers, bits, bytes, peak memory")
    return parser, _export


def _recipe(args: argparse.Namespace, targets: Sequence[str]) -> Recipe:
    """The recipe by its name or file, or the best one within the budget, under what the arguments override."""
    from qvlm_export.pipeline import is_quantized

    recipe = recipe_of(args)
    if args.method is None and args.recipe in RECIPES:
        recipe = replace(recipe, method="fused")
    budget = budget_of(args)
    if (budget or args.untie) and is_quantized(args.source):
        raise ExportError(f"{args.source}: already quantized, no budget and no --untie changes it.")
    if budget is None:
        return recipe
    from qvlm.trials.sensitivity_run import Settings, recipe_within

    file = sensitivity_file(args, args.out)
    blocks = max(TARGETS[name].int4_blocks for name in targets)
    settings = Settings(calib=args.calib, int4_blocks=blocks)
    found = recipe_within(args.source, recipe, budget, file, settings, reporter())
    print(f"{found.bits_per_weight:.3f} bits per weight, KL {found.kl:.2e} predicted")
    return found.recipe


def _export(args: argparse.Namespace) -> Answer:
    from qvlm_export.pipeline import Request, export

    comparison = _comparison(args)
    targets = tuple(dict.fromkeys(args.target or ["ort"]))
    request = Request(
        args.source,
        _recipe(args, targets),
        targets,
        args.calib,
        args.max_context,
        tuple(args.sm or ()),
        Variant(args.dtype, args.cache, args.max_tensor and args.max_tensor * 10**6, args.overflow),
        ImageLimits(args.image_size, args.max_image_tokens),
    )
    if args.dry_run:
        data = _dry_run(request)
        print(_plan_text(data, request.targets))
        return 0, data
    result = export(
        request,
        args.out,
        resume=args.resume,
        overwrite=args.overwrite,
        keep_checkpoint=args.keep_checkpoint,
        comparison=comparison,
        progress=reporter(),
    )
    for row in result.report.components:
        print(
            f"{row.component:<10} {row.quantized:>4} of {row.linears:>4} linears  "
            f"{row.bits_per_weight:6.3f} bits/weight  {row.nbytes / 1e6:10.2f} MB  "
            f"{row.nbytes / row.float16_bytes:.3f}x float16"
        )
    kept = result.report.divergence
    print(
        f"KL to float {kept['kl']:.2e} nats per token, same greedy token {100 * kept['greedy']:.2f} %"
    )
    print(f"verified: {', '.join(request.targets)}; report: {result.folder / 'report.html'}")
    return 0, {"out": str(result.folder), **json.loads(result.report.to_json())}


def _plan_text(data: dict[str, Any], targets: Sequence[str]) -> str:
    lines = [
        f"{data['source']} ({data['model_type']}), method {data['method']}, {data['samples']} samples"
    ]
    for row in data["components"]:
        formats = ", ".join(f"{n} x {name}" for name, n in row["formats"].items())
        lines.append(
            f"{row['component']:<10} {row['layers']:>3} layers {row['linears']:>4} linears  {formats:<28} "
            f"{row['bits_per_weight']:7.3f} bits/weight {row['nbytes'] / 1e6:10.2f} MB"
        )
    lines.append(f"embeddings, norms and the rest: {data['other_bytes'] / 1e6:.2f} MB at 16 bit")
    lines.append(f"whole model: {data['bits_per_weight']:.3f} bits/weight")
    lines.append(f"estimated peak memory: {data['peak_bytes'] / 1e9:.2f} GB")
    lines.append(f"targets: {', '.join(targets)}")
    return "\n".join(lines)


def _dry_run(request: Any) -> dict[str, Any]:
    from qvlm_export.pipeline import is_quantized

    if is_quantized(request.source):
        raise ExportError(f"{request.source}: already quantized, nothing to plan. Drop --dry-run.")
    from qvlm.plan import plan
    from qvlm.source import open_source
    from qvlm_export.precheck import Settings, check_settings

    source = open_source(request.source)
    check_settings(Settings(source.directory, source.config), request.max_context, request.limits)
    return plan(source, request.recipe).to_json()


def _verify_parser() -> Command:
    parser = _parser("verify", "Replay an export's goldens through ONNX Runtime.")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder written by qvlm-export")
    return parser, _verify


def _verify(args: argparse.Namespace) -> Answer:
    from qvlm_export.verify import verify_folder

    results = verify_folder(args.out, reporter())
    head = ("target", "graph", "output", "tokens", "rms", "bound", "largest", "bound")
    print("{:<9} {:<12} {:<15} {:<8} {:>9} {:>9} {:>9} {:>9}".format(*head))
    for result in results:
        for row in result.rows:
            errors = (row.rms, row.rms_bound, row.largest, row.largest_bound)
            numbers = " ".join(f"{error:9.2e}" for error in errors)
            print(f"{result.target:<9} {row.graph:<12} {row.output:<15} {row.tokens:<8} {numbers}")
        print(
            f"{result.target}: {result.agree} of {result.positions} greedy tokens agree end to end"
        )
    return 0, {result.target: asdict(result) for result in results}


def _check_parser() -> Command:
    parser = _parser("check", "TensorRT's rules for a graph, without TensorRT.")
    parser.add_argument(
        "path", metavar="OUT|FILE", type=Path, help="exported folder or any .onnx file"
    )
    names = [name for name, target in TARGETS.items() if target.is_tensorrt]
    parser.add_argument("--target", action="append", choices=names, help="default: OUT's own")
    parser.add_argument(
        "--device", metavar="D", help="does OUT fit? orin-nano-8gb, orin-nx-16gb, thor, ..."
    )
    return parser, _check


def _check(args: argparse.Namespace) -> Answer:
    from qvlm_export.conform import check_graph
    from qvlm_export.fit import Fit, fit, named_device
    from qvlm_runtime.manifest import read_manifest

    fits: list[Fit] = []
    if args.path.is_dir():
        manifest = read_manifest(args.path)
        specs = manifest.targets
        names = args.target or [name for name in specs if TARGETS[name].is_tensorrt]
        names = [name for name in names if name in specs]
        graphs = [(n, args.path / path) for n in names for path in specs[n].graphs.values()]
        if args.device:
            device = named_device(args.device)
            described = manifest.model, manifest.image
            fits = [fit(args.path, n, specs[n], *described, device) for n in names]
    else:
        graphs = [(name, args.path) for name in args.target or ()]
        if args.device:
            raise ExportError(f"{args.path}: --device needs an exported folder, not one graph.")
    if not graphs:
        raise ExportError(f"{args.path}: no graph for a TensorRT target. Name one with --target.")
    findings = [(name, f) for name, path in graphs for f in check_graph(path, TARGETS[name])]
    for name, finding in findings:
        print(f"{name}: {finding.line()}")
    errors = sum(finding.level == "error" for _, finding in findings)
    print(f"{len(graphs)} graphs, {len(findings)} findings, {errors} errors")
    for one in fits:
        print("\n".join(one.lines()))
    rows = [{"target": name, **asdict(finding)} for name, finding in findings]
    answer = {"findings": rows, "errors": errors, "fits": [one.to_json() for one in fits]}
    return int(errors > 0 or not all(one.fits for one in fits)), answer


def _build_parser() -> Command:
    parser = _parser(
        "build",
        "Engines of an exported folder: with TensorRT on the device that runs them, or, target rtx, "
        "ahead of time on any machine.",
    )
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="folder written by qvlm-export")
    names = [name for name, target in TARGETS.items() if target.is_tensorrt]
    add("--target", choices=names, help="default: the folder's only one; rtx with --sm")
    add("--sm", type=int, action="append", metavar="NN", help="rtx: generation; default 86 and 89")
    add("--workspace", type=int, metavar="MIB", help="scratch memory a kernel may take")
    add("--opt-level", type=int, choices=range(6), help="how long to search; default 3")
    return parser, _build


def _build(args: argparse.Namespace) -> Answer:
    from qvlm_export.builder import Options
    from qvlm_export.package import add_engines

    if args.workspace is not None and args.workspace < 1:
        raise ExportError(f"--workspace: got {args.workspace}, expected at least 1 MiB.")
    options = Options(args.workspace, args.opt_level)
    rows = add_engines(args.out, reporter(), args.target, tuple(args.sm or ()), options)
    for row in rows:
        checked = (
            "not listed by this release, not checked" if row.checked == "nothing" else "checked"
        )
        print(
            f"{row.engine}: {row.bytes / 1e6:.2f} MB, {row.kernels} kernels, integer products "
            f"{checked}, {row.file}"
        )
    return 0, {"engines": [asdict(row) for row in rows]}


def _report_parser() -> Command:
    parser = _parser("report", "Draw an exported folder's report.html again.")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder written by qvlm-export")
    _add_compare(parser)
    return parser, _report


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="rows of `qvlm compare` to draw in the report"
    )


def _comparison(args: argparse.Namespace) -> list[dict[str, Any]]:
    from qvlm_export.report import read_comparison

    return read_comparison(args.compare) if args.compare else []


def _report(args: argparse.Namespace) -> Answer:
    from qvlm_export.package import redraw_report

    report = redraw_report(args.out, _comparison(args))
    print(f"{len(report.comparison)} rows compared; report: {args.out / 'report.html'}")
    return 0, {"report": str(args.out / "report.html"), "rows": len(report.comparison)}


def _targets_parser() -> Command:
    return _parser("targets", "Print the table of targets."), _targets


def _targets(args: argparse.Namespace) -> Answer:
    rows = [
        (
            target.name,
            target.release or "-",
            str(target.opset),
            " ".join(target.dtypes),
            " ".join(target.caches),
            " ".join(map(str, target.int4_sizes)),
            " ".join(map(str, target.sm)) or "-",
            target.hardware,
        )
        for target in TARGETS.values()
    ]
    head = ("target", "release", "opset", "dtype", "cache", "INT4 blocks", "sm", "runs on")
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    print("The first dtype and the first cache are the defaults.")
    return 0, {name: asdict(target) for name, target in TARGETS.items()}


_COMMANDS: dict[str, Callable[[], Command]] = {
    "verify": _verify_parser,
    "check": _check_parser,
    "build": _build_parser,
    "report": _report_parser,
    "targets": _targets_parser,
}
