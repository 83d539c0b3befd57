"""The model folder that qvlm_runtime opens: tokenizer files beside the graphs, digests, manifest
last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qvlm import __version__
from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm.progress import Progress
from qvlm_export.build import image_spec, model_spec
from qvlm_export.processor import chat_template
from qvlm_export.report import Report, to_html
from qvlm_export.rtx import EngineRow, compile_target
from qvlm_runtime.manifest import Manifest, TargetSpec, digest, read_manifest, verify_files

MANIFEST = "manifest.json"
# Copied as they are; the runtime needs the first, verify the second.
_REQUIRED = ("tokenizer.json", "goldens.npz", "recipe.json")


def add_runtime_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy tokenizer, goldens and recipe, and write chat_template.jinja; ExportError if one is
    missing.
    """
    try:
        for name in _REQUIRED:
            shutil.copyfile(checkpoint.directory / name, folder / name)
        template = chat_template(checkpoint)
        if template is None:
            raise ExportError(
                f"{checkpoint.directory}: no chat template (chat_template.jinja). "
                "Copy it from the model's source."
            )
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
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
) -> Manifest:
    """Digest every file in ``folder`` and write manifest.json, atomically and last.

    ``exclude`` names files and folders directly in ``folder`` that are not part of the result.
    ``max_context`` must be what the graphs were built with. ExportError if a graph a target names
    is absent or the disk refuses.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] not in exclude and str(name) != MANIFEST:
            files[name.as_posix()] = digest(path)
    manifest = Manifest(
        __version__,
        model_spec(checkpoint, max_context),
        image_spec(checkpoint),
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


def add_engines(folder: Path, capabilities: Sequence[int], progress: Progress) -> list[EngineRow]:
    """Compile a finished folder's rtx graphs and enter the engines into its manifest.

    The folder is verified first. ExportError if it has no rtx target or a graph does not compile; FolderError
    (qvlm_runtime) if it is not whole. The manifest changes last, in one rename.
    """
    manifest = read_manifest(folder)
    if "rtx" not in manifest.targets:
        raise ExportError(
            f"{folder}: targets {', '.join(manifest.targets)}, expected rtx. Export again with --target rtx."
        )
    verify_files(folder, manifest)
    spec, rows = compile_target(
        folder, manifest.targets["rtx"], manifest.model, progress, capabilities
    )
    files = {**manifest.files, **{row.file: digest(folder / row.file) for row in rows}}
    targets = {**manifest.targets, "rtx": spec}
    _write(folder, replace(manifest, targets=targets, files=files))
    return rows


def write_report(folder: Path, report: Report) -> None:
    """Write report.json and report.html."""
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "report.html").write_text(to_html(report), encoding="utf-8")


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
    names = ("report.json", "report.html")
    files = {**manifest.files, **{name: digest(folder / name) for name in names}}
    _write(folder, replace(manifest, files=files))
    return report


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
