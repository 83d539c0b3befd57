"""Proves that the checker and NVIDIA's own parser and compiler (TensorRT for RTX) give one verdict on
every graph that both can judge, but for the disagreements listed here one by one.

Run: python -m pytest tests/export/conform/test_rtx_agreement.py -m rtx
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conform_cases import attention, graphs, operators, quantization
from conform_cases.build import Case, save

from qvlm.errors import ExportError
from qvlm_export.conform import RULES, check_graph
from qvlm_export.conform.view import GraphView
from qvlm_export.rtx import Kernel, compile_graph, integer_products
from qvlm_export.targets import TARGETS

pytestmark = pytest.mark.rtx

# Graphs that this checker calls an error and TensorRT for RTX compiles.
ACCEPTED = {
    "A-05": "It builds; is_causal aligned to the upper left corner hides most of the past from new rows.",
    "Q-02": "It builds with a warning and reads UINT8 as INT8, so the numbers differ from ONNX Runtime's.",
    "Q-06": "It builds where only the weight is quantized; behind an INT8 activation, or on an sm87 device with "
    "10.16, type inference fails.",
    "Q-15": "Its parser turns DOUBLE scales into FLOAT; ONNX and ONNX Runtime do not have them.",
    "W-01": "It builds by unpacking the weight to float16 at every run; releases before 11 want whole bytes per row.",
    "W-07": "It builds by expanding the weight to float16; NVIDIA's guide names INT4 for matrix products only.",
    "W-09": "It builds an Int4 product; NVIDIA's guide calls INT4 weight-only and no release runs this elsewhere.",
    "W-10": "It builds, but multiplies block scales in behind the sum over all blocks, which is another result.",
}
# Rules about speed that the kernel list shows: what the clean graph has more, or less, of.
KERNELS = {
    "A-06": "fewer kernels",
    "C-04": "fewer kernels",
    "C-05": "fewer kernels",
    "G-05": "more INT4 products",
    "P-02": "more INT8 products",
    "P-05": "fewer kernels",
    "P-06": "more INT8 products",
    "Q-13": "more INT8 products",
    "W-01": "more INT4 products",
    "W-02": "more INT4 products",
    "W-05": "more INT4 products",
}
ON_RTX = {rule.id for rule in RULES if "rtx-1.7" in rule.releases}
# X-01 would write 2 GiB for a parser that cannot read it.
CASES = [
    case
    for case in (*operators.CASES, *attention.CASES, *quantization.CASES, *graphs.CASES)
    if case.rule in ON_RTX - {"X-01"}
]
FREE = 16  # what a dynamic dimension becomes


def compile_case(case: Case, which: str, folder: Path) -> list[Kernel]:
    """Kernels of the case's graph on SM86; ExportError with NVIDIA's message if it is refused."""
    path = save(getattr(case, which), folder / "model.onnx")
    view = GraphView.open(path)
    profile = {}
    for name in view.inputs:
        shape = view.shape(name) or ()
        fixed = tuple(size if isinstance(size, int) else FREE for size in shape)
        if fixed != shape:
            profile[name] = (fixed, fixed, fixed)
    return compile_graph(path, [profile] if profile else [], 86)[1]


def refused(case: Case, which: str, folder: Path) -> bool:
    try:
        compile_case(case, which, folder)
    except ExportError:
        return True
    return False


@pytest.mark.parametrize("which", ["bad", "good"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_same_verdict(case: Case, which: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    path = save(getattr(case, which), tmp_path / "model.onnx")
    ours = any(finding.level == "error" for finding in check_graph(path, TARGETS["rtx"]))
    theirs = refused(case, which, tmp_path)
    if which == "bad" and case.rule in ACCEPTED:
        assert (ours, theirs) == (True, False), "no longer a disagreement: take it off the list"
    else:
        assert ours == theirs


@pytest.mark.parametrize("rule", sorted(KERNELS))
def test_kernels_show_the_difference(rule: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    case = next(case for case in CASES if case.rule == rule)
    bad, good = (compile_case(case, which, tmp_path) for which in ("bad", "good"))
    if KERNELS[rule] == "fewer kernels":
        assert len(good) < len(bad)
    else:
        which = 0 if "INT4" in KERNELS[rule] else 1
        assert integer_products(good)[which] > integer_products(bad)[which]
