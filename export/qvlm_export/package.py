"""The model folder that qvlm_runtime opens: tokenizer files beside the graphs, digests, manifest
last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qvlm import __version__
from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm.progress import Progress
from qvlm_export import engine, rtx
from qvlm_export.build import image_spec, model_spec
from qvlm_export.builder import EngineRow, Options, write_file
from qvlm_export.image_limits import NO_LIMITS, ImageLimits
from qvlm_export.processor import chat_template
from qvlm_export.report import Report, to_html
from qvlm_export.targets import named_target
from qvlm_export.verify import write_golden_images
from qvlm_runtime.manifest import Manifest, TargetSpec, digest, read_manifest, verify_files

MANIFEST = "manifest.json"
# Copied as they are; the runtime needs the first, verify the second.
_REQUIRED = ("tokenizer.json", "goldens.npz", "recipe.json")
_REPORT = ("report.json", "report.html")


def add_runtime_files(
    checkpoint: Checkpoint, folder: Path, limits: ImageLimits = NO_LIMITS
) -> None:
    """Copy tokenizer, goldens and recipe, and write chat_template.jinja; ExportError if one is
    missing. With ``limits`` the images of the goldens are cut otherwise than the manifest says:
    golden_images.json says how.
    """
    try:
        for name in _REQUIRED:
            shutil.copyfile(checkpoint.directory / name, folder / name)
        template = chat_template(checkpoint)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        if limits != NO_LIMITS:
            write_golden_images(folder, image_spec(checkpoint))
    except FileNotFoundError as error:
        raise ExportError(
            f"{error.filename}: absent. Copy the model's tokenizer files beside its weights."
        ) from error
    except OSError as error:
        raise ExportError(f"{folder}: not written ({error}). Free disk space.") from error


def write_manifest(
    folder: Path,
    checkpoint: Checkpoint,
    targets: Mapping[str, TargetSpec],
    exclude: Collection[str] = (),
    max_context: int | None = None,
    limits: ImageLimits = NO_LIMITS,
) -> Manifest:
    """Digest every file in ``folder`` and write manifest.json, atomically and last.

    ``exclude`` names files and folders directly in ``folder`` that are not part of the result.
    ``max_context`` must be what the graphs were built with; ``limits`` are of images. ExportError if
    a graph a target names is absent or the disk refuses.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] not in exclude and str(name) != MANIFEST:
            files[name.as_posix()] = digest(path)
    manifest = Manifest(
        __version__,
        model_spec(checkpoint, max_context),
        image_spec(checkpoint, limits),
        dict(targets),
        files,
        checkpoint.recipe.to_json(),
    )
    if missing := sorted(set(manifest.paths()) - set(files)):
        raise ExportError(f"{folder / missing[0]}: named by the manifest but absent. Export again.")
    _write(folder, manifest)
    return manifest


def _write(folder: Path, manifest: Manifest) -> None:
    partial = folder / f"{MANIFEST}.partial"
    try:
        partial.write_text(manifest.to_json(), encoding="utf-8")
        os.replace(partial, folder / MANIFEST)
    except OSError as error:
        raise ExportError(
            f"{folder / MANIFEST}: not written ({error}). Free disk space."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def add_engines(
    folder: Path,
    progress: Progress,
    target: str | None = None,
    capabilities: Sequence[int] = (),
    options: Options | None = None,
) -> list[EngineRow]:
    """Build engines of one target of a finished folder, and enter them into its report and manifest.

    target "rtx" is compiled ahead of time for ``capabilities`` (default 86 and 89); any other on
    this device, with TensorRT. None: rtx if capabilities are given, else the only TensorRT target.
    The folder is verified first. ExportError if it has no such target or a graph does not compile;
    FolderError (qvlm_runtime) if it is not whole. The manifest changes last, in one rename.
    """
    manifest = read_manifest(folder)
    name = _buildable(folder, manifest, target, capabilities)
    verify_files(folder, manifest)
    spec, options = manifest.targets[name], options or Options()
    if name == "rtx":
        spec, rows = rtx.compile_target(
            folder,
            spec,
            manifest.model,
            manifest.image,
            progress,
            capabilities or rtx.COMPUTE_CAPABILITIES,
            options,
        )
    else:
        spec, rows = engine.compile_target(
            folder, named_target(name), spec, manifest.model, manifest.image, progress, options
        )
    changed = [*(row.file for row in rows), *_add_to_report(folder, name, rows)]
    files = {**manifest.files, **{file: digest(folder / file) for file in changed}}
    targets = {**manifest.targets, name: spec}
    _write(folder, replace(manifest, targets=targets, files=files))
    return rows


def write_report(folder: Path, report: Report) -> None:
    """Write report.json and report.html, each atomically; ExportError if the disk refuses."""
    # Both are made before either is written: what cannot be drawn leaves the old report.
    drawn = {"report.json": report.to_json(), "report.html": to_html(report)}
    for name, text in drawn.items():
        write_file(folder / name, text.encode())


def redraw_report(folder: Path, comparison: Sequence[Mapping[str, Any]]) -> Report:
    """Draw a finished folder's report again, with these rows of a comparison if any; the manifest follows.

    The folder is verified first: FolderError (qvlm_runtime) if it is not whole, ExportError as ``Report.read``.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    report = Report.read(folder / "report.json")
    if comparison:
        report = replace(report, comparison=comparison)
    write_report(folder, report)
    files = {**manifest.files, **{name: digest(folder / name) for name in _REPORT}}
    _write(folder, replace(manifest, files=files))
    return report


def _buildable(
    folder: Path, manifest: Manifest, target: str | None, capabilities: Sequence[int]
) -> str:
    """The target to build engines for."""
    names = [name for name in manifest.targets if named_target(name).is_tensorrt]
    if target is None and capabilities:
        target = "rtx"
    if target is None and len(names) == 1:
        target = names[0]
    if target not in names:
        wanted = "one TensorRT target" if target is None else target
        raise ExportError(
            f"{folder}: targets {', '.join(manifest.targets)}, expected {wanted}. "
            + ("Name one with --target." if len(names) > 1 else "Export again with --target.")
        )
    if capabilities and target != "rtx":
        raise ExportError(
            f"{folder}: --sm is for target rtx; engines of {target} are built on their device. "
            "Leave --sm out."
        )
    return target


def _add_to_report(folder: Path, target: str, rows: Sequence[EngineRow]) -> tuple[str, ...]:
    """Replace the target's engine rows of the same name in report.json and report.html; the files changed."""
    path = folder / "report.json"
    if not path.is_file():
        return ()
    report = Report.read(path)
    section = report.targets.setdefault(target, {})
    new = {row.engine for row in rows}
    kept = [row for row in section.get("engines", ()) if row["engine"] not in new]
    section["engines"] = kept + [asdict(row) for row in rows]
    write_report(folder, report)
    return _REPORT


def move(source: Path, destination: Path, overwrite: bool) -> None:
    """Rename a finished folder; with ``overwrite`` an existing one is set aside first and removed
    after.

    ExportError if ``destination`` exists without ``overwrite``, or if the rename fails (another
    file system).
    """
    aside = destination.with_name(destination.name + ".replaced")
    try:
        if destination.exists():
            if not overwrite:
                raise ExportError(
                    f"{destination}: exists. Choose another folder or pass --overwrite."
                )
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(destination, aside)
        os.replace(source, destination)
    except OSError as error:
        if aside.exists() and not destination.exists():
            os.replace(aside, destination)
        raise ExportError(f"{destination}: cannot take the finished folder ({error})") from error
    shutil.rmtree(aside, ignore_errors=True)
