"""Proves that the table of families says what test results say, and that the tests it names exist.

Run: python -m pytest tests/test_families.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from families import COLUMNS, FAMILIES, ROOT, Outcome, Proof, cell, outcomes

from qvlm.models import ADAPTERS
from qvlm_export.models import BUILDERS

BOTH, ONE = Proof("tests/a.py", "test_a"), Proof("tests/b.py", "test_b", ("llava",))


def test_every_family_has_a_row() -> None:
    assert set(FAMILIES) == set(BUILDERS) == set(ADAPTERS)


@pytest.mark.parametrize("proof", [proof for proofs in COLUMNS.values() for proof in proofs])
def test_the_tests_behind_a_column_exist(proof: Proof) -> None:
    assert f"def {proof.function}(" in (ROOT / proof.file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("family", "case", "expected"),
    [
        ("llava", "llava", True),
        ("llava", "llava_next", False),
        ("llava_next", "llava_next, Mistral", True),
        ("qwen2_vl", "qwen2_vl-changes0", True),
        ("smolvlm", "jetpack6-smolvlm", True),
        ("smolvlm", "", False),
    ],
)
def test_parameters_name_a_family(family: str, case: str, expected: bool) -> None:
    assert BOTH.speaks_for(family, case) is expected


def test_a_cell_is_the_worst_of_its_results(tmp_path: Path) -> None:
    junit = tmp_path / "results.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase classname="tests.a" name="test_a[smolvlm-1]"/>'
        '<testcase classname="tests.a" name="test_a[smolvlm-2]"><failure/></testcase>'
        '<testcase classname="tests.a" name="test_a[internvl]"/>'
        '<testcase classname="tests.b" name="test_b"><skipped/></testcase></testsuite></testsuites>'
    )
    results = outcomes(junit)
    assert results[0] == Outcome("tests/a.py", "test_a", "smolvlm-1", "passed")
    assert cell("smolvlm", (BOTH, ONE), results) == "failed"
    assert cell("internvl", (BOTH, ONE), results) == "yes"
    assert cell("llava", (BOTH, ONE), results) == "-"
