"""Proves that the GPU measurements run as far as they can without one: help, the plan, and parts (a)
and (c) on the CPU provider; part (b) says what is missing.

Run: python -m pytest tests/bench/test_gpu.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "tests/bench"


def run(script: str, *words: str) -> str:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime", "calib_data"))
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", ["gpu.py", "engine_sizes.py"])
def test_help_names_the_options(script: str) -> None:
    assert "--json FILE" in run(script, "--help").replace("JSON", "FILE")


def test_a_dry_run_says_the_device_and_the_plan() -> None:
    told = run("gpu.py", "--dry-run", "--shapes", "7b").splitlines()
    assert told[0].startswith("device: ") and "onnxruntime" in told[0]
    assert "7b: 6.61B weights, float16 13.2 GB" in told[1]


def test_the_parts_run_on_the_cpu_and_a_missing_gpu_is_told(tmp_path: Path) -> None:
    words = (
        "--backend ort --target rtx --shapes tiny --no-goldens --prompt 20 --steps 2 --repeats 1"
    )
    run("gpu.py", *words.split(), "--json", str(tmp_path / "out.json"))
    told: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    rows = {row["format"]: row for row in told["speed tiny"]}
    assert all(rows[f]["prefill_ms"] > 0 < rows[f]["step_ms"] for f in ("float", "w4a16", "w8a8"))
    for depth in (1024, 4096, 11008):
        assert told[f"INT8 {depth}"]["error"] < told[f"INT8 {depth}"]["bound"]
    if "gpu" in told["device"]:
        assert "CUDA" in told["TensorRT for RTX"]["error"]
        assert "no CUDA device" in rows["transformers"]["error"]
