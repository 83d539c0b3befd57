"""Proves that imports point down only: the table below is the architecture.

Run: python -m pytest tests/test_layers.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"qvlm", "qvlm_export", "qvlm_runtime", "qvlm_calib_data"}
TORCH_FREE = {
    *("qvlm.recipe", "qvlm.checkpoint", "qvlm.errors", "qvlm.progress", "qvlm.data"),
    *(
        "qvlm.trials.budget",
        "qvlm.trials.allocation",
        "qvlm.commands.command",
        "qvlm.commands.recipe",
    ),
}

# package root -> (of ours it may import, libraries it never imports)
TABLE: dict[str, tuple[set[str], set[str]]] = {
    "calib_data/qvlm_calib_data": (
        {"qvlm_calib_data"},
        {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "tensorrt_rtx_bindings"},
    ),
    "runtime/qvlm_runtime": ({"qvlm_runtime"}, {"torch", "transformers", "onnx", "onnx_ir"}),
    "qvlm": (
        {"qvlm", "qvlm_calib_data"},
        {"onnx", "onnx_ir", "onnxruntime", "tensorrt_rtx_bindings"},
    ),
    "export/qvlm_export": (OURS, {"torch", "transformers"}),
}
# A heavy library is imported in these files only, inside functions.
ONLY_IN = {
    "tensorrt": {"runtime/qvlm_runtime/trt_library.py"},
    "tensorrt_rtx_bindings": {"runtime/qvlm_runtime/trt_library.py"},
    "cuda": {"runtime/qvlm_runtime/cuda.py"},
    "onnxruntime": {"runtime/qvlm_runtime/ort.py"},
    "llguidance": {"runtime/qvlm_runtime/grammar.py"},
    "uvicorn": {"runtime/qvlm_runtime/serve/cli.py"},
    "yaml": {"runtime/qvlm_runtime/bench/plan.py"},
}
# The one bridge from the exporter to the quantizer (DESIGN: SRC may be a float checkpoint, whose settings are checked
# before it is quantized).
BRIDGES = {
    "export/qvlm_export/pipeline.py": {"qvlm.quantize", "qvlm.source"},
    "export/qvlm_export/commands/export.py": {
        "qvlm.plan",
        "qvlm.trials.sensitivity_run",
        "qvlm.source",
    },
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every absolute import of a file: (module, whether it runs when the file is imported)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set()
    for node in tree.body:
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) and not guarded:
            top.update(id(child) for child in ast.walk(node))
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [
                f"{node.module}.{a.name}" if node.module in OURS else node.module
                for a in node.names
            ]
        yield from ((name, id(node) in top) for name in names)


def problems(path: Path, name: str) -> Iterator[str]:
    package = next(p for p in TABLE if name.startswith(p + "/"))
    allowed, never = TABLE[package]
    for module, _ in imports(path):
        root = module.split(".")[0]
        if root in never:
            yield f"{name} imports {module}"
        if root in OURS and root not in allowed:
            yield f"{name} imports {module}, which is above or beside it"
        if root in ONLY_IN and name not in ONLY_IN[root]:
            yield f"{name} imports {module}; only {sorted(ONLY_IN[root])} may"
        if package == "export/qvlm_export" and root == "qvlm":
            free = TORCH_FREE | BRIDGES.get(name, set())
            within = any(module == one or module.startswith(f"{one}.") for one in free)
            if not within and module not in ("qvlm", "qvlm.__version__"):
                yield f"{name} imports {module}, which needs torch"


FILES = sorted(
    str(path.relative_to(ROOT)) for package in TABLE for path in (ROOT / package).rglob("*.py")
)


@pytest.mark.parametrize("name", FILES)
def test_imports_follow_the_table(name: str) -> None:
    assert not list(problems(ROOT / name, name))


@pytest.mark.parametrize("name", FILES)
def test_heavy_libraries_are_imported_inside_functions(name: str) -> None:
    heavy = {*ONLY_IN, "transformers", "safetensors", "tokenizers"}
    found = {m for m, at_import in imports(ROOT / name) if at_import and m.split(".")[0] in heavy}
    assert not found


def test_the_check_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import torch\nfrom qvlm_export import build\n")
    assert list(problems(bad, "runtime/qvlm_runtime/bad.py")) == [
        "runtime/qvlm_runtime/bad.py imports torch",
        "runtime/qvlm_runtime/bad.py imports qvlm_export.build, which is above or beside it",
    ]
