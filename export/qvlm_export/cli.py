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
from dataclasses import asdict
from pathlib import Path

from qvlm.errors import ExportError, QvlmError
from qvlm.progress import reporter
from qvlm_export.commands.command import Answer, Command, add_compare, comparison, parser_of
from qvlm_export.commands.export import export_parser
from qvlm_export.targets import TARGETS
from qvlm_runtime.errors import RuntimeFault


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvlm-export; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words and words[0] in _COMMANDS else ""
    parser, run = _COMMANDS[name]() if name else export_parser()
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


def _verify_parser() -> Command:
    parser = parser_of("verify", "Replay an export's goldens through ONNX Runtime.")
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
    parser = parser_of("check", "TensorRT's rules for a graph, without TensorRT.")
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
    parser = parser_of(
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
    parser = parser_of("report", "Draw an exported folder's report.html again.")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder written by qvlm-export")
    add_compare(parser)
    return parser, _report


def _report(args: argparse.Namespace) -> Answer:
    from qvlm_export.package import redraw_report

    report = redraw_report(args.out, comparison(args))
    print(f"{len(report.comparison)} rows compared; report: {args.out / 'report.html'}")
    return 0, {"report": str(args.out / "report.html"), "rows": len(report.comparison)}


def _targets_parser() -> Command:
    return parser_of("targets", "Print the table of targets."), _targets


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
