"""Proves that the GPU measurements run as far as they can without one: help, the plan, and parts (a)
and (c) on the CPU provider; part (b) says what is missing.

Run: python -m pytest tests/bench/test_gpu.py
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """name -> the script, imported as it imports its neighbours."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module


@pytest.mark.parametrize("name", ["gpu", "engine_sizes"])
def test_help_names_the_options(script: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        script(name).main(["--help"])
    assert "--json" in capsys.readouterr().out


def test_a_dry_run_says_the_device_and_the_plan(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    script("gpu").main(["--dry-run", "--shapes", "7b"])
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("device: ") and "onnxruntime" in told[0]
    assert "7b: 6.61B weights, float16 13.2 GB" in told[1]


def test_the_parts_run_on_the_cpu_and_a_missing_gpu_is_told(script: Any, tmp_path: Path) -> None:
    words = (
        "--backend ort --target rtx --shapes tiny --no-goldens --prompt 20 --steps 2 --repeats 1"
    )
    script("gpu").main([*words.split(), "--json", str(tmp_path / "out.json")])
    told: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    rows = {row["format"]: row for row in told["speed tiny"]}
    assert all(rows[f]["prefill_ms"] > 0 < rows[f]["step_ms"] for f in ("float", "w4a16", "w8a8"))
    for depth in (1024, 4096, 11008):
        assert told[f"INT8 {depth}"]["error"] < told[f"INT8 {depth}"]["bound"]
    if "gpu" in told["device"]:
        assert "CUDA" in told["TensorRT for RTX"]["error"]
        assert "no CUDA device" in rows["transformers"]["error"]
