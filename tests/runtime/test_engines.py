"""Proves which engines or graphs a machine runs, and one line for everything that keeps a plan from running, on a
fake GPU: python -m pytest tests/runtime/test_engines.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from device_support import machine, toy_engines

from qvlm_runtime import FolderError, SessionError, cuda, load


def one_line(match: str, folder: Path, **options: Any) -> None:
    with pytest.raises((SessionError, FolderError), match=match) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


def test_a_plan_for_another_release_or_gpu_is_refused_before_it_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = machine(monkeypatch, "10.3.0")
    toy_engines(tmp_path, device)
    machine(monkeypatch, "10.3.0", capability=110)
    one_line(r"engine is for sm87, this GPU is sm110\. Run qvlm-export build", tmp_path)
    machine(monkeypatch, "10.16.1.11")
    one_line(r"built with tensorrt 10\.3\.0, here is 10\.16\.1\.11\. Run", tmp_path)
    with load(tmp_path, backend="ort", threads=1) as model:
        assert model.backend == "ort"


def test_engines_of_another_gpu_beside_ort_graphs_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toy_engines(tmp_path, machine(monkeypatch, "10.3.0"), both=True)
    with load(tmp_path) as model:
        assert (model.target, model.backend) == ("device", "tensorrt")
    machine(monkeypatch, "10.3.0", capability=110)
    with load(tmp_path, threads=1) as model:
        assert (model.target, model.backend) == ("ort", "ort")
    one_line("engine is for sm87, this GPU is sm110", tmp_path, target="device")
    one_line("engine is for sm87, this GPU is sm110", tmp_path, backend="tensorrt")


def test_without_a_gpu_or_tensorrt_graphs_are_taken_and_an_asked_backend_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = machine(monkeypatch, "10.3.0")
    toy_engines(tmp_path, device)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with load(tmp_path, threads=1) as model:
        assert model.backend == "ort"
    one_line("TensorRT is not installed .* comes with JetPack", tmp_path, backend="tensorrt")
    one_line("no engines for backend tensorrt-rtx", tmp_path, backend="tensorrt-rtx")
    one_line("no backend 'cuda', expected one of ort, ort-cuda", tmp_path, backend="cuda")
    device = machine(monkeypatch, "10.3.0")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    cuda.forget_device()
    with load(tmp_path, threads=1) as model:
        assert model.backend == "ort"
    one_line(r"cuda-python is not installed .*qvlm\[tensorrt\]", tmp_path, backend="tensorrt")
    device = machine(monkeypatch, "10.3.0")
    device.gpu.no_driver = True
    with load(tmp_path, threads=1) as model:
        assert model.backend == "ort"
    one_line("dlopen libcuda.so.1, expected an NVIDIA driver", tmp_path, backend="tensorrt")


def test_a_broken_plan_and_full_memory_are_one_line_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = machine(monkeypatch, "10.3.0")
    toy_engines(tmp_path, device)
    plan = tmp_path / "device/engines/decoder.sm87.plan"
    whole = plan.read_bytes()
    for content, match in ((b"no plan", "cannot open this plan .magic tag"), (b"", "not readable")):
        plan.write_bytes(content)
        one_line(match, tmp_path, verify=False)
    plan.write_bytes(whole)
    machine(monkeypatch, "10.3.0", memory=5000)
    one_line(r"out of device memory: .*activations needs 0\.0 MB, .* are free", tmp_path)
    device = machine(monkeypatch, "10.3.0", memory=60_000)
    with (
        load(tmp_path) as model,
        pytest.raises(SessionError, match="buffer of the cache") as caught,
    ):
        model.decoder.start(64)
        [model.decoder.start(64) for _ in range(20)]
    assert "smaller --max-context" in str(caught.value)
