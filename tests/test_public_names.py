"""Proves that importing does nothing heavy: every exporter and runtime module imports with torch masked, the
runtime's packages load numpy at most, and every public name exists.

Run: python -m pytest tests/test_public_names.py
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "qvlm": ".",
    "qvlm_export": "export",
    "qvlm_runtime": "runtime",
    "qvlm_calib_data": "calib_data",
}


def modules(package: str) -> list[str]:
    root = ROOT / PACKAGES[package]
    paths = (path.relative_to(root).with_suffix("") for path in (root / package).rglob("*.py"))
    return sorted(".".join(p.parts[:-1] if p.name == "__init__" else p.parts) for p in paths)


def loaded_by(names: list[str], masked: tuple[str, ...]) -> set[str]:
    """Top-level modules present after importing ``names`` in a fresh interpreter without ``masked``."""
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({masked!r}))\n"
        f"for name in {names!r}: __import__(name)\n"
        "print(' '.join({n.split('.')[0] for n, m in sys.modules.items() if m is not None}))"
    )
    path = ":".join(str(ROOT / root) for root in PACKAGES.values())
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path}
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize("package", ["qvlm_export", "qvlm_runtime", "qvlm_calib_data"])
def test_every_module_imports_without_torch(package: str) -> None:
    loaded_by(modules(package), ("torch", "transformers"))


def test_importing_the_runtime_loads_numpy_at_most() -> None:
    heavy = {"onnxruntime", "tokenizers", "jinja2", "PIL", "torch", "transformers", "tqdm", "onnx"}
    assert not loaded_by(["qvlm_runtime"], ()) & heavy


@pytest.mark.parametrize("package", ["qvlm", "qvlm_export", "qvlm_calib_data"])
def test_importing_a_workstation_package_loads_nothing_heavy(package: str) -> None:
    heavy = {"onnxruntime", "torch", "transformers", "onnx", "onnx_ir", "tensorrt_rtx_bindings"}
    assert not loaded_by([package], ()) & heavy


@pytest.mark.parametrize("package", list(PACKAGES))
def test_public_names_exist(package: str) -> None:
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", []):
        assert hasattr(module, name), f"{package}.__all__ names {name}, which is absent"
