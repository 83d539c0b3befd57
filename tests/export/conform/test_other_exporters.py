"""Proves that the rules hold for graphs that others wrote: a transformers tower through torch.onnx.export,
and the same quantized by ONNX Runtime's own tool, whose asymmetric integers TensorRT refuses.

Run: python -m pytest tests/export/conform/test_other_exporters.py
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from transformers import CLIPVisionConfig, CLIPVisionModel

from qvlm_export.conform import check_graph
from qvlm_export.conform.rule import Finding
from qvlm_export.targets import TARGETS

SIDE = 24


class Pixels(CalibrationDataReader):  # type: ignore[misc]
    """Two pictures of noise."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        shape = (1, 3, SIDE, SIDE)
        self._left = [generator.standard_normal(shape).astype(np.float32) for _ in range(2)]

    def get_next(self) -> dict[str, Any] | None:
        return {"pixels": self._left.pop()} if self._left else None


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP tower, traced by torch."""
    path = tmp_path_factory.mktemp("torch") / "tower.onnx"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = CLIPVisionConfig(**sizes, num_attention_heads=4, image_size=SIDE, patch_size=8)
    model = CLIPVisionModel(config).eval()
    example = torch.zeros(1, 3, SIDE, SIDE)
    names = {"input_names": ["pixels"], "output_names": ["states", "pooled"]}
    # The other exporter of torch needs onnxscript; this one says that it is the older, and traces.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (example,), str(path), opset_version=17, dynamo=False, **names)
    return path


def rules(findings: list[Finding], level: str = "error") -> set[str]:
    return {finding.rule for finding in findings if finding.level == level}


@pytest.mark.parametrize("target", [name for name in TARGETS if TARGETS[name].is_tensorrt])
def test_a_traced_tower_is_read(tower: Path, target: str) -> None:
    """A float32 graph of plain operators breaks no rule by error, on any release."""
    assert rules(check_graph(tower, TARGETS[target])) == set()


def test_integers_of_another_tool_are_named(tower: Path, tmp_path: Path) -> None:
    """Unsigned activations (Q-01, Q-02) and INT32 biases (Q-10); symmetric signed ones break neither."""
    found = {}
    for kind, symmetric in ((QuantType.QUInt8, False), (QuantType.QInt8, True)):
        path = tmp_path / f"{kind}.onnx"
        quantize_static(
            str(tower),
            str(path),
            Pixels(),
            quant_format=QuantFormat.QDQ,
            activation_type=kind,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True},
        )
        findings = check_graph(path, TARGETS["jetpack6"])
        assert all(f.node or f.tensor for f in findings if f.level == "error")
        found[kind] = rules(findings)
    assert {"Q-01", "Q-02", "Q-10"} <= found[QuantType.QUInt8]
    assert not {"Q-01", "Q-02"} & found[QuantType.QInt8]
