"""Runs every rule that holds for a target's release on a graph, without TensorRT and without reading weights.

``check`` takes a file or an exported folder; ``rule_table`` is what documentation and ``--json`` list.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qvlm.errors import ExportError
from qvlm_export.conform import attention, cache, graph, operators, placement, quant, types, weights
from qvlm_export.conform.rule import Consumer, Finding, Level, Rule, release_column
from qvlm_export.conform.view import GraphView
from qvlm_export.targets import Target

RULES: tuple[Rule, ...] = (
    *types.RULES,
    *operators.RULES,
    *attention.RULES,
    *cache.RULES,
    *quant.RULES,
    *weights.RULES,
    *placement.RULES,
    *graph.RULES,
)
_ORDER: dict[Level, int] = {"error": 0, "warning": 1, "info": 2}


def consumer_of(target: Target) -> Consumer:
    """The column of the rule book that a target falls under, and its GPU generations."""
    return Consumer(release_column(target.release), target.sm)


def check(model_path: Path, target: Target) -> list[Finding]:
    """Every breach in an ONNX file, or in the target's graphs of an exported folder, errors first.

    ExportError if there is no such file, it is no ONNX model, or the folder has no graphs for the target.
    """
    return _sorted(
        finding
        for path in _graph_files(model_path, target.name)
        for finding in check_graph(path, target)
    )


def check_graph(path: Path, target: Target) -> list[Finding]:
    """Every breach in one ONNX file, errors first; ExportError if it is missing or no ONNX model."""
    return _sorted(check_view(GraphView.open(path), consumer_of(target)))


def _sorted(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: (_ORDER[finding.level], finding.rule))


def check_view(view: GraphView, consumer: Consumer) -> list[Finding]:
    """Every breach in one graph, in the order of ``RULES``."""
    return [
        Finding(rule.id, rule.level, view.path.name, b.node, b.tensor, b.found, b.allowed, rule.fix)
        for rule in RULES
        if consumer.release in rule.releases
        for b in rule.check(view, consumer)
    ]


def rule_table() -> list[dict[str, str]]:
    """One row per rule: id, title, level, releases, fix."""
    return [
        {
            "id": rule.id,
            "title": rule.title,
            "level": rule.level,
            "releases": " ".join(rule.releases),
            "fix": rule.fix,
        }
        for rule in RULES
    ]


def _graph_files(path: Path, target: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted((path / target).glob("*.onnx")) or sorted(path.glob("*.onnx"))
    if not files:
        raise ExportError(
            f"{path}: no ONNX file in {target}/ or here. Export for target {target} first."
        )
    return files
