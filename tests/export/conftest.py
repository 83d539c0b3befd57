"""Fixtures of the exporter's tests: quantized tiny models and their graphs, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(recipe name, changes) -> ``tiny_models.TinyCase``. Read only."""
    from tiny_models import make_case

    from qvlm.recipe import RECIPES

    made: dict[Any, Any] = {}

    def case(recipe: str, **changes: Any) -> Any:
        key = (recipe, repr(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("case") / recipe
            made[key] = make_case(folder, RECIPES[recipe], **changes)
        return made[key]

    return case


@pytest.fixture(scope="session")
def built(
    tiny_case: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """(recipe name, target name, changes) -> (folder, TargetSpec, Checkpoint). Read only."""
    from qvlm.checkpoint import Checkpoint
    from qvlm.progress import silent
    from qvlm_export.build import build
    from qvlm_export.targets import named_target

    made: dict[Any, Any] = {}

    def make(recipe: str, target: str, **changes: Any) -> tuple[Path, Any, Checkpoint]:
        key = (recipe, target, repr(sorted(changes.items())))
        if key not in made:
            checkpoint = Checkpoint(tiny_case(recipe, **changes).directory)
            folder = tmp_path_factory.mktemp("built")
            spec = build(checkpoint, named_target(target), folder, None, silent)
            made[key] = folder, spec, checkpoint
        return made[key]

    return make
