"""Proves that every TensorRT and CUDA name the code touches exists in every release it is for: read
from the source, against the table of names of ten TensorRT releases, TensorRT for RTX and two of
cuda-python (tests/data/device_api.json, from introspecting the published wheels).

Run: python -m pytest tests/test_device_api.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_cuda import API
from fake_trt_api import RELEASES, names

ROOT = Path(__file__).parent.parent
TENSORRT = [name for name in RELEASES if not name.startswith("rtx")]
RTX = [name for name in RELEASES if name.startswith("rtx")]

# file -> (releases it is for, expression -> class). Every expression must occur in its file.
SOURCES: dict[str, tuple[list[str], dict[str, str]]] = {
    "export/qvlm_export/builder.py": (
        RELEASES,
        {
            "builder": "Builder",
            "network": "INetworkDefinition",
            "parser": "OnnxParser",
            "config": "IBuilderConfig",
            "profile": "IOptimizationProfile",
            "first": "ParserError",
        },
    ),
    "export/qvlm_export/engine.py": (
        TENSORRT,
        {
            "config": "IBuilderConfig",
            "config.get_timing_cache()": "ITimingCache",
            "runtime": "Runtime",
            "engine": "ICudaEngine",
            "inspector": "EngineInspector",
        },
    ),
    "export/qvlm_export/rtx.py": (RTX, {"config": "IBuilderConfig"}),
    "runtime/qvlm_runtime/trt_library.py": (RELEASES, {}),
    "runtime/qvlm_runtime/trt.py": (
        RELEASES,
        {
            "engine": "ICudaEngine",
            "self._engine": "ICudaEngine",
            "self._runtime": "Runtime",
            "native": "IExecutionContext",
            "context.native": "IExecutionContext",
        },
    ),
}
# Attributes of Python's own that stand on the same expressions.
PLAIN = {"__version__", "__init__", "__members__"}


def touched(path: Path, variables: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(expression, class, member) of every access; a class of the module itself is a member of ""."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            base, member = ast.unparse(node.value), node.attr
            if base in variables:
                yield base, variables[base], member
            elif base in ("trt", "self._trt") and member not in PLAIN:
                yield base, "", member
            elif base.startswith(("trt.", "self._trt.")) and member not in PLAIN:
                yield base, base.rpartition(".")[2], member


@pytest.mark.parametrize("source", SOURCES)
def test_every_name_exists_in_every_release(source: str) -> None:
    releases, variables = SOURCES[source]
    found = list(touched(ROOT / source, variables))
    assert {base for base, _, _ in found} >= set(variables)
    for _, kind, member in found:
        for release in releases:
            has = bool(names(release, member)) if kind == "" else member in names(release, kind)
            assert has, f"{source}: TensorRT {release} has no {kind or 'class'} {member}"


def optional(path: Path) -> set[str]:
    """Names asked for with getattr, which may be absent."""
    return {
        node.args[1].value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "getattr"
        and isinstance(node.args[1], ast.Constant)
    }


def test_what_is_asked_for_with_a_default_is_absent_somewhere_and_exists_somewhere() -> None:
    """Else getattr hides a misspelt name, or a plain attribute would do."""
    asked = optional(ROOT / "runtime/qvlm_runtime/trt.py")
    assert asked == {"get_aliased_input_tensor"}
    for name in asked:
        has = [name in names(release, "ICudaEngine") for release in RELEASES]
        assert any(has) and not all(has)


def test_every_cuda_name_exists_in_every_release() -> None:
    tree = ast.parse((ROOT / "runtime/qvlm_runtime/cuda.py").read_text(encoding="utf-8"))
    found = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    found |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and
              isinstance(n.value, str) and " " not in n.value}  # fmt: skip
    found = {name for name in found if name.startswith("cuda") and name not in ("cuda",)}
    assert len(found) > 20
    for release, table in API["cuda.bindings.runtime"].items():
        known = {name for key in table for name in table[key]} | set(table)
        assert found <= known, f"cuda-python {release} has no {sorted(found - known)}"


def test_the_check_sees_a_name_that_went_away(tmp_path: Path) -> None:
    path = tmp_path / "old.py"
    path.write_text("config.int8_calibrator = 1\ntrt.BuilderFlag.FP16\nconfig.reset()\n")
    gone = [
        member
        for _, kind, member in touched(path, {"config": "IBuilderConfig"})
        if kind and member not in names("11.4.0.106", kind)
    ]
    assert sorted(gone) == ["FP16", "int8_calibrator"]
