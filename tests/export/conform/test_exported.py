"""Proves that the exported graphs of the tiny model keep every rule of their own release, and of later ones.

Run: python -m pytest tests/export/conform/test_exported.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qvlm.checkpoint import Checkpoint
from qvlm.progress import silent
from qvlm_export.build import build
from qvlm_export.conform import check
from qvlm_export.targets import TARGETS


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_exported_graphs_have_no_findings(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    build(Checkpoint(tiny_checkpoint), TARGETS[name], tmp_path, None, silent)
    assert [finding.line() for finding in check(tmp_path, TARGETS[name])] == []


@pytest.mark.parametrize("release", ["10.13", "10.16", "11.4"])
def test_portable_graph_serves_later_releases(
    release: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    portable = TARGETS["jetpack6"]
    build(Checkpoint(tiny_checkpoint), portable, tmp_path, None, silent)
    assert [f.line() for f in check(tmp_path, replace(portable, release=release))] == []
