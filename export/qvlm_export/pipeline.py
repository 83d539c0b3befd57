"""The stages of ``qvlm-export SRC OUT`` in order: quantize, build, compile, verify, report, package.

Everything is written into ``OUT.partial`` beside OUT and renamed when the last stage is done, so a
folder named OUT is always whole. ``state.json`` there holds the request.
``resume`` takes a finished checkpoint as it is, and the quantizer continues an unfinished one block
by block; graphs are built again. The result is the same bytes as an uninterrupted run.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from qvlm import __version__
from qvlm.checkpoint import Checkpoint, dump_json, load_json
from qvlm.errors import ExportError, RecipeError
from qvlm.progress import Progress, silent
from qvlm.recipe import Recipe
from qvlm_export import package, rtx
from qvlm_export.build import build, image_spec, model_spec
from qvlm_export.conform import check_graph
from qvlm_export.facts import graph_facts
from qvlm_export.float_range import largest_activations, overflow
from qvlm_export.image_limits import NO_LIMITS, ImageLimits
from qvlm_export.precheck import Settings, check_settings
from qvlm_export.report import Report, component_rows, divergence
from qvlm_export.targets import DEFAULT, Target, Variant, named_target
from qvlm_export.verify import verify_target
from qvlm_runtime.manifest import TargetSpec

# Measures accuracy on the folder under construction; gives what report.py's accuracy section shows.
Accuracy = Callable[[Path], Mapping[str, Any]]

_CHECKPOINT = "checkpoint"
_STATE = "state.json"
# Activations that a report of a float16 target lists.
_RANGE_ROWS = 5


@dataclass(frozen=True)
class Request:
    """What to export.

    source: a local directory, a hub id, a quantized checkpoint or "demo"; calib: folder or None for
    the shipped samples; capabilities: GPU generations that target rtx is compiled for (86, 89);
    variant: what is asked of every target; limits: of images.
    """

    source: str
    recipe: Recipe
    targets: tuple[str, ...]
    calib: str | None = None
    max_context: int | None = None
    capabilities: tuple[int, ...] = ()
    variant: Variant = DEFAULT
    limits: ImageLimits = NO_LIMITS

    def to_json(self) -> Any:
        """What ``state.json`` compares between the interrupted and the resuming run."""
        data = {**asdict(self), "recipe": self.recipe.to_json(), "version": __version__}
        return json.loads(json.dumps(data))


@dataclass(frozen=True)
class Result:
    """The finished folder and its report."""

    folder: Path
    report: Report


def _begin(work: Path, request: Request, resume: bool) -> None:
    """Make or check the folder under construction: ``state.json`` holds the request it belongs to."""
    path, wanted = work / _STATE, request.to_json()
    if work.exists() and resume:
        if load_json(path).get("request") != wanted:
            raise ExportError(
                f"{work}: was begun with other options. Give the same ones, or start again "
                "without --resume."
            )
    elif work.exists():
        if any(work.iterdir()) and not path.is_file():
            raise ExportError(f"{work}: exists and is not an unfinished export. Remove it first.")
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    dump_json(path, {"request": wanted})


def export(
    request: Request,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_checkpoint: bool = False,
    accuracy: Accuracy | None = None,
    comparison: Sequence[Mapping[str, Any]] = (),
    progress: Progress = silent,
) -> Result:
    """Run every stage; the folder ``out`` exists afterwards, whole and verified.

    ``comparison``: rows of ``qvlm compare`` for the report.

    Raises RecipeError for formats no engine runs, ExportError if ``out`` exists (without
    ``overwrite``) or a graph cannot be built or breaks a rule of its target, VerificationError if a
    graph does not reproduce its goldens, CheckpointError and CalibrationError for bad input.
    OUT.partial stays behind on an error, for ``resume``.
    """
    targets = _check(request, out, overwrite)
    work = out.with_name(out.name + ".partial")
    _check_settings(request, work if resume else None)
    _begin(work, request, resume)
    checkpoint = Checkpoint(_quantize(request, work, progress))
    specs: dict[str, TargetSpec] = {}
    sections: dict[str, dict[str, Any]] = {}
    for target in targets:
        specs[target.name], sections[target.name] = _target(
            checkpoint, request, target, work, progress
        )
    model = model_spec(checkpoint, request.max_context)
    package.add_runtime_files(checkpoint, work, request.limits)
    manifest = package.write_manifest(
        work,
        checkpoint,
        specs,
        exclude=_unfinished(work),
        max_context=request.max_context,
        limits=request.limits,
    )
    report = Report(
        __version__,
        Path(request.source).name,
        checkpoint.recipe.to_json(),
        component_rows(checkpoint),
        divergence(checkpoint.goldens(), model.eos_token_ids),
        sections,
        accuracy=accuracy(work) if accuracy else None,
        method=checkpoint.method_report,
        comparison=comparison,
        versions={**checkpoint.method_report.get("versions", {}), **_versions()},
        files={name: entry.sha256 for name, entry in manifest.files.items()},
    )
    package.write_report(work, report)
    package.write_manifest(
        work,
        checkpoint,
        specs,
        exclude=_unfinished(work),
        max_context=request.max_context,
        limits=request.limits,
    )
    if keep_checkpoint:
        package.move(work / _CHECKPOINT, out.with_name(out.name + ".checkpoint"), overwrite)
    for name in _unfinished(work):
        path = work / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    package.move(work, out, overwrite)
    return Result(out, report)


def _versions() -> dict[str, str]:
    """Of what built and replayed the graphs, and of this package."""
    names = ("numpy", "onnx", "onnx-ir", "onnxruntime")
    found = {name: metadata.version(name) for name in names}
    return {"qvlm (export)": __version__, "python": platform.python_version(), **found}


def _unfinished(work: Path) -> tuple[str, ...]:
    """What lies in the folder under construction only."""
    names = (_CHECKPOINT, f"{_CHECKPOINT}.partial", _STATE)
    return tuple(name for name in names if (work / name).exists())


def _check(request: Request, out: Path, overwrite: bool) -> tuple[Target, ...]:
    if not request.recipe.deployable:
        names = sorted({r.format.name for r in request.recipe.rules if not r.format.deployable})
        raise RecipeError(
            f"format {', '.join(names)} runs in no engine, it can only be simulated. Export w4a16 or "
            "w8a8; `qvlm quantize` and `qvlm evaluate` measure the simulation."
        )
    check_output(out, overwrite)
    return tuple(named_target(name, request.variant) for name in request.targets)


def check_output(out: Path, overwrite: bool) -> None:
    """ExportError if ``out`` may not be written."""
    if not out.name:
        raise ExportError(f"{out}: no folder's name. Give one to write to.")
    if out.exists() and not overwrite:
        raise ExportError(f"{out}: exists. Give another folder, or --overwrite.")
    if not out.parent.is_dir():
        raise ExportError(f"{out.parent}: no such directory. Make it first.")


def _check_settings(request: Request, resumed: Path | None) -> None:
    """Refuse what the source's settings forbid, before the first weight is read."""
    settings: Checkpoint
    template = ""
    if is_quantized(request.source):
        settings = Checkpoint(request.source)
    elif resumed is not None and (resumed / _CHECKPOINT).exists():  # the source is not read again
        settings = Checkpoint(resumed / _CHECKPOINT)
    else:
        from qvlm.source import open_source

        source = open_source(request.source)
        settings = Settings(source.directory, source.config)
        template = source.adapter.chat_template
    check_settings(settings, request.max_context, request.limits, template)


def is_quantized(source: str) -> bool:
    """True if ``source`` is a checkpoint that qvlm wrote."""
    return (Path(source) / "quantization.json").is_file()


def _quantize(request: Request, work: Path, progress: Progress) -> Path:
    """The quantized checkpoint: the source itself, or made below ``work`` by the core."""
    if is_quantized(request.source):
        return Path(request.source)
    checkpoint = work / _CHECKPOINT
    if not checkpoint.exists():  # it gets its name when complete
        # With _check_settings the bridge to the core: torch is needed here and nowhere else in the exporter.
        from qvlm.quantize import quantize

        quantize(
            request.source,
            checkpoint,
            request.recipe,
            request.calib,
            resume=checkpoint.with_name(f"{_CHECKPOINT}.partial").exists(),
            progress=progress,
        )
    return checkpoint


def _target(
    checkpoint: Checkpoint, request: Request, target: Target, work: Path, progress: Progress
) -> tuple[TargetSpec, dict[str, Any]]:
    """Build, check, compile and verify one target; its spec and its section of the report."""
    spec = build(checkpoint, target, work, request.max_context, progress)
    facts = [graph_facts(work / path) for path in spec.graphs.values()]
    section: dict[str, Any] = {
        "graphs": [
            {
                "graph": fact.name,
                "nodes": fact.nodes,
                "bytes": fact.nbytes,
                "INT4 products": fact.count("INT4"),
                "INT8 products": fact.count("INT8"),
            }
            for fact in facts
        ],
    }
    if target.dtype == "float16":
        section["largest activations"] = [
            asdict(row) for row in largest_activations(checkpoint, _RANGE_ROWS)
        ]
        section["float32"] = [asdict(row) for row in overflow(checkpoint, target).rows]
    if target.is_tensorrt:
        section["rules"] = _rules(work, spec, target)
    if target.name == "rtx" and request.capabilities:
        model = model_spec(checkpoint, request.max_context)
        image = image_spec(checkpoint, request.limits)
        spec, rows = rtx.compile_target(work, spec, model, image, progress, request.capabilities)
        section["engines"] = [asdict(row) for row in rows]
    verified = verify_target(work, spec, checkpoint, progress, request.max_context)
    section["verify"] = [asdict(row) for row in verified.rows]
    section["greedy"] = [{"tokens that agree": verified.agree, "of": verified.positions}]
    return spec, section


def _rules(work: Path, spec: TargetSpec, target: Target) -> list[dict[str, Any]]:
    """Findings of TensorRT's rules below the level of error; ExportError on the first error."""
    findings = [f for path in spec.graphs.values() for f in check_graph(work / path, target)]
    for finding in findings:
        if finding.level == "error":
            raise ExportError(f"target {target.name}: {finding.line()}")
    return [asdict(finding) for finding in findings]
