"""Proves that the checker and NVIDIA's own parser and compiler (TensorRT for RTX) give one verdict on
every graph that both can judge, but for the disagreements listed one by one, and that
``rtx_agreement.md`` says so.

Run: python -m pytest tests/export/conform/test_rtx_agreement.py -m rtx
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conform_cases.agreement import (
    ACCEPTED,
    CASES,
    KERNELS,
    TABLE,
    compile_case,
    verdicts,
)
from conform_cases.build import Case

from qvlm_export.kernels import integer_products

pytestmark = pytest.mark.rtx


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_same_verdict(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    found = verdicts(case, tmp_path)
    ours, theirs = found.good
    assert ours == theirs
    if case.rule in ACCEPTED:
        assert found.bad == (True, False), "no longer a disagreement: take it off the list"
    else:
        assert found.bad[0] == found.bad[1]
    written = TABLE.read_text(encoding="utf-8").splitlines()
    assert found.row() in written, "write the table again: see conform_cases/agreement.py"


def test_the_table_has_every_case() -> None:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    rules = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert rules[2:] == [case.rule for case in CASES]
    different = sum(case.rule in ACCEPTED for case in CASES)
    assert lines[2].startswith(
        f"{len(CASES)} rules, two graphs each: {2 * len(CASES) - different} of {2 * len(CASES)} verdicts agree."
    )


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
