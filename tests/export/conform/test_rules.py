"""Proves that every rule finds its breach and is silent on the mended graph.

Run: python -m pytest tests/export/conform/test_rules.py
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conform_cases import attention, graphs, operators, quantization
from conform_cases.build import Case, save

from qvlm.errors import ExportError
from qvlm_export.conform import RULES, check, rule_table
from qvlm_export.conform.rule import EVERYWHERE, Finding, release_column
from qvlm_export.targets import TARGETS, Target

CASES = (*operators.CASES, *attention.CASES, *quantization.CASES, *graphs.CASES)


def target(case: Case) -> Target:
    release = None if case.release == "ort" else case.release
    return replace(TARGETS["jetpack6"], name="case", release=release, sm=(case.sm,))


def findings(case: Case, which: str, folder: Path) -> list[Finding]:
    return check(save(getattr(case, which), folder / "model.onnx"), target(case))


def test_every_rule_has_one_violating_and_one_clean_graph() -> None:
    rules, cases = [rule.id for rule in RULES], [case.rule for case in CASES]
    assert sorted(rules) == sorted(set(rules))
    assert sorted(cases) == sorted(set(cases))
    assert set(rules) - set(cases) == set(), "rules without graphs"
    assert set(cases) - set(rules) == set(), "graphs without a rule"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_violating_graph_is_found(case: Case, tmp_path: Path) -> None:
    found = [f for f in findings(case, "bad", tmp_path) if f.rule == case.rule]
    assert found, f"{case.rule} said nothing"
    for finding in found:
        assert finding.found and finding.allowed and finding.fix
        assert case.rule in finding.line() and "\n" not in finding.line()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_clean_graph_is_clean(case: Case, tmp_path: Path) -> None:
    found = findings(case, "good", tmp_path)
    assert [f.line() for f in found if f.rule == case.rule or f.level == "error"] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_violating_graph_breaks_no_other_rule_by_error(case: Case, tmp_path: Path) -> None:
    others = {f.rule for f in findings(case, "bad", tmp_path) if f.level == "error"} - {case.rule}
    assert others <= ALSO.get(case.rule, set())


# Errors that follow from the breach itself.
ALSO = {"T-10": {"P-08", "W-11"}}  # a 4-bit float in blocks, on hardware without it


def test_rows_are_complete() -> None:
    for row, rule in zip(rule_table(), RULES, strict=True):
        assert all(row.values())
        assert set(rule.releases) <= set(EVERYWHERE)
        assert rule.fix.endswith(".") and not rule.title.endswith(".")


def test_findings_are_ready_for_json(tmp_path: Path) -> None:
    found = findings(CASES[0], "bad", tmp_path)
    assert all(isinstance(value, str) for finding in found for value in asdict(finding).values())


@pytest.mark.parametrize(
    ("release", "column"),
    [
        ("10.3", "10.3"),
        ("10.7.0", "10.3"),
        ("10.13.3", "10.13"),
        ("10.14", "10.13"),
        ("10.16.2", "10.15"),
        ("11.4", "11"),
        ("rtx-1.7", "rtx-1.7"),
        (None, "ort"),
    ],
)
def test_column_of_a_release(release: str | None, column: str) -> None:
    assert release_column(release) == column


def test_unknown_release_and_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no rules"):
        release_column("8.6")
    with pytest.raises(ExportError, match="no such file"):
        check(tmp_path / "absent.onnx", TARGETS["rtx"])
    with pytest.raises(ExportError, match="no ONNX file"):
        check(tmp_path, TARGETS["rtx"])
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"broken\.onnx: not an ONNX model"):
        check(broken, TARGETS["rtx"])
