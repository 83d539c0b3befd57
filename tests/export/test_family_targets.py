"""Proves that the quantized graphs of every family keep the rules of every target, and that TensorRT for RTX compiles
them with their integers into as many kernels as expected.

Run: python -m pytest tests/export/test_family_targets.py   (the compiler's tests need the extra [rtx])
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from compiled import compile_graphs, counts
from tiny_families import FAMILIES, quantized

from qvlm.checkpoint import Checkpoint
from qvlm.progress import silent
from qvlm_export.build import build
from qvlm_export.conform import check
from qvlm_export.targets import TARGETS, named_target

# Kernels of an image, of a prompt and of a decode step. More than before: a form that is no longer fused.
KERNELS = {
    "llava": (27, 26, 21),
    "smolvlm": (36, 24, 19),
    "idefics3": (36, 24, 19),
    "internvl": (37, 24, 19),
    "llava_next": (27, 24, 19),
    "llava_onevision": (37, 24, 19),
    "qwen2_vl": (37, 36, 28),
    "qwen2_5_vl": (38, 36, 28),
    "qwen3_vl": (45, 42, 41),
    "blip-2": (71, 36, 27),
}
# The rest is compiled by tests/bench/family_engines.py.
ADA = ("smolvlm", "qwen2_5_vl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """family -> its quantized tiny model, made once."""
    made: dict[str, Checkpoint] = {}

    def make(family: str) -> Checkpoint:
        if family not in made:
            made[family] = quantized(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_of_every_target_have_no_findings(
    checkpoint: Callable[[str], Checkpoint], family: str, tmp_path: Path
) -> None:
    for target in TARGETS.values():
        build(checkpoint(family), target, tmp_path, None, silent)
        assert [f.line() for f in check(tmp_path, target) if f.level != "info"] == []


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("family", "sm"), [*((family, 86) for family in FAMILIES), *((family, 89) for family in ADA)]
)
def test_engines_have_their_integers_and_kernels(
    checkpoint: Callable[[str], Checkpoint], family: str, sm: int, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    spec = build(checkpoint(family), named_target("rtx"), tmp_path, None, silent)
    assert counts(compile_graphs(tmp_path, spec, checkpoint(family), sm)) == KERNELS[family]
