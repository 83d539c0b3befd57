"""Proves that the packaged folder is what the runtime accepts, and that folders change names whole.

Run: python -m pytest tests/export/test_package.py
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm_export.package import add_runtime_files, move, write_manifest
from qvlm_runtime.manifest import read_manifest, verify_files


@pytest.fixture
def folder(built: Callable[..., Any], tmp_path: Path) -> tuple[Path, Any, Checkpoint]:
    """A copy of a built target with the runtime's files."""
    source, spec, checkpoint = built("float", "ort")
    copy, whole = tmp_path / "out", tmp_path / "checkpoint"
    shutil.copytree(source, copy)
    shutil.copytree(checkpoint.directory, whole)
    (whole / "chat_template.jinja").write_text("{{ messages }}")
    add_runtime_files(Checkpoint(whole), copy)
    return copy, spec, Checkpoint(whole)


def test_the_runtime_accepts_the_manifest(folder: tuple[Path, Any, Checkpoint]) -> None:
    out, spec, checkpoint = folder
    (out / "state.json").write_text("{}")
    written = write_manifest(
        out, checkpoint, {"ort": spec}, exclude=("state.json",), max_context=64
    )
    read = read_manifest(out)
    assert read == written
    assert read.model.max_context == 64
    verify_files(out, read)
    assert {"chat_template.jinja", "tokenizer.json", "goldens.npz", "recipe.json"} <= set(
        read.files
    )
    assert "state.json" not in read.files
    assert "manifest.json" not in read.files


def test_a_graph_that_is_absent_is_named(folder: tuple[Path, Any, Checkpoint]) -> None:
    out, spec, checkpoint = folder
    (out / spec.graphs["vision"]).unlink()
    with pytest.raises(ExportError, match=r"vision\.onnx: named by the manifest but absent"):
        write_manifest(out, checkpoint, {"ort": spec})
    assert not (out / "manifest.json").exists()


def test_a_tokenizer_that_is_absent_is_named(folder: tuple[Path, Any, Checkpoint]) -> None:
    out, _, checkpoint = folder
    (checkpoint.directory / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"tokenizer\.json: absent"):
        add_runtime_files(checkpoint, out)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
def test_a_template_is_found_in_older_places(
    folder: tuple[Path, Any, Checkpoint], name: str
) -> None:
    out, _, checkpoint = folder
    (checkpoint.directory / "chat_template.jinja").unlink()
    (checkpoint.directory / name).write_text('{"chat_template": "{{ old }}"}')
    add_runtime_files(checkpoint, out)
    assert (out / "chat_template.jinja").read_text() == "{{ old }}"


def test_a_checkpoint_without_template_is_refused(folder: tuple[Path, Any, Checkpoint]) -> None:
    out, _, checkpoint = folder
    (checkpoint.directory / "chat_template.jinja").unlink()
    with pytest.raises(ExportError, match="no chat template"):
        add_runtime_files(checkpoint, out)


def test_move_replaces_only_when_asked(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(name)
    with pytest.raises(ExportError, match="old: exists"):
        move(tmp_path / "new", tmp_path / "old", overwrite=False)
    move(tmp_path / "new", tmp_path / "old", overwrite=True)
    assert (tmp_path / "old" / "text").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_failed_move_puts_the_old_folder_back(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(ExportError, match="cannot take the finished folder"):
        move(tmp_path / "absent", tmp_path / "old", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
