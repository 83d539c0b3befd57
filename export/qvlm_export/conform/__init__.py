"""Static conformance rules: what a TensorRT release would refuse or run slowly, told from the ONNX file alone."""

from qvlm_export.conform.checker import RULES, check, check_graph, rule_table
from qvlm_export.conform.rule import Finding, Rule

__all__ = ["RULES", "Finding", "Rule", "check", "check_graph", "rule_table"]
