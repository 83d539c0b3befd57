"""Proves that a tied model whose head got a copy exports like one that never was tied: the head is a product of its own
integers, the goldens replay, every token is torch's simulation's, and no rule of TensorRT is broken.

Run: python -m pytest tests/export/test_untie.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_families import questions, tied, write_source

from qvlm.checkpoint import Checkpoint
from qvlm.models import ADAPTERS
from qvlm.progress import silent
from qvlm.quantize import quantize
from qvlm.recipe import FORMATS, LayerRule, Recipe, component_recipe
from qvlm.trials.compare import with_method
from qvlm_export.build import build
from qvlm_export.cli import main
from qvlm_export.conform import check
from qvlm_export.facts import graph_facts
from qvlm_export.targets import named_target
from qvlm_export.verify import verify_target


def recipe(method: str, head: str) -> Recipe:
    """w4a16 with a quantized head; the table, which is no longer multiplied, in INT8 rows."""
    base = component_recipe("w4a16", "w8a8", "w8a8", head, samples=2, untie=True)
    table = LayerRule("embedding.*embed_tokens", FORMATS["w8a16"])
    return with_method(replace(base, rules=(*base.rules, table)), method)


@pytest.mark.parametrize(
    ("family", "method", "head"),
    [
        ("qwen2_vl", "rotate+gptq", "w8a8"),
        ("internvl", "gptq", "w4a16"),
        ("smolvlm", "fused:steps=4,sweeps=1", "w4a16"),
        ("llava_onevision", "gptq", "w8a8"),
    ],
)
def test_the_graph_is_the_simulation(family: str, method: str, head: str, tmp_path: Path) -> None:
    # An even number of rows: TensorRT's rule for INT4 (W-01).
    source = write_source(family, tmp_path / "source", **tied(family, 400))
    out = tmp_path / "checkpoint"
    quantize(str(source), out, recipe(method, head), questions=questions(family), goldens=1)
    checkpoint = Checkpoint(out)
    name = ADAPTERS[family].head
    assert checkpoint.linears[name] == {"component": "head", "format": head}
    if method != "gptq":
        assert checkpoint.method_report["transforms"]["rotate"]["residual"] == 384
    for target in map(named_target, ("ort", "jetpack6")):
        spec = build(checkpoint, target, tmp_path, None, silent)
        assert name in graph_facts(tmp_path / spec.graphs["decoder"]).linears
        result = verify_target(tmp_path, spec, checkpoint, silent)
        assert all(row.passed for row in result)
        if target.is_tensorrt:
            assert [f.line() for f in check(tmp_path, target) if f.level != "info"] == []
        else:
            assert result.agree == result.positions == len(checkpoint.goldens()[0].inputs["tokens"])


def test_the_command_plans_a_copy_and_refuses_a_quantized_source(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source("llava", tmp_path / "source", **tied("llava", 400))
    command = [str(source), str(tmp_path / "out"), "--dry-run", "--json"]
    bytes_ = []
    for flags in ([], ["--untie"]):
        assert main([*command, *flags]) == 0
        planned = json.loads(capsys.readouterr().out.splitlines()[-1])
        bytes_.append(sum(c["nbytes"] for c in planned["components"]) + planned["other_bytes"])
    # Named recipes leave the head float: the table once more at 16 bits.
    assert bytes_[1] - bytes_[0] == 2 * 400 * 384
    assert main([str(tiny_checkpoint), str(tmp_path / "out"), "--untie"]) == 1
    assert "already quantized, no budget and no --untie changes it" in capsys.readouterr().err
