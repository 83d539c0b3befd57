"""``qvlm-export SRC OUT``: the arguments, the recipe they mean, the export or its plan."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qvlm.commands.command import note_unmatched
from qvlm.commands.recipe import add_untie_argument, recipe_of
from qvlm.errors import ExportError
from qvlm.progress import reporter
from qvlm.recipe import RECIPES, Recipe
from qvlm.trials.budget import (
    add_budget_arguments,
    add_sensitivity_argument,
    budget_of,
    sensitivity_file,
)
from qvlm_export.commands.command import Answer, Command, add_compare, comparison, parser_of
from qvlm_export.image_limits import ImageLimits
from qvlm_export.targets import TARGETS, Variant
from qvlm_runtime.manifest import CACHE_FORMS, DTYPES


def export_parser() -> Command:
    """Of the command without a name."""
    parser = parser_of("", "Quantize, export, verify and package a vision-language model.")
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
    add_compare(parser)
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
    from qvlm_export.pipeline import Request, check_output, export, is_quantized

    if not args.dry_run:
        check_output(args.out, args.overwrite)  # before a budget's sensitivities are measured
    rows = comparison(args)
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
        note_unmatched(data["unmatched"])
        print(_plan_text(data, request.targets))
        return 0, data
    if request.recipe.deployable and not args.resume and not is_quantized(args.source):
        note_unmatched(_dry_run(request)["unmatched"])
    result = export(
        request,
        args.out,
        resume=args.resume,
        overwrite=args.overwrite,
        keep_checkpoint=args.keep_checkpoint,
        comparison=rows,
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
    settings = Settings(source.directory, source.config)
    check_settings(settings, request.max_context, request.limits, source.adapter.chat_template)
    return plan(source, request.recipe).to_json()
