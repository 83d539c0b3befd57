"""Fixtures that several test folders share. Heavy libraries are imported inside, for the partial
installs.
"""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float model directory. Read only: copy it before changing anything."""
    from tiny_source import write_tiny_source

    return write_tiny_source(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model quantized by round to nearest at w4a16. Read only."""
    from tiny_source import tiny_questions

    from qvlm.quantize import quantize
    from qvlm.recipe import RECIPES

    output = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return quantize(
        str(tiny_source), output, RECIPES["w4a16"], questions=tiny_questions(), goldens=2
    )
