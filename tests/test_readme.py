"""Proves that README is true: its tree is the repository, its commands and options exist, its table of what is
supported is what the code registers.

Run: python -m pytest tests/test_readme.py
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = (
    "qvlm",
    "export/qvlm_export",
    "runtime/qvlm_runtime",
    "calib_data/qvlm_calib_data",
)


def block(info: str) -> str:
    """The fenced block whose info string is ``info``."""
    found = re.search(rf"```{re.escape(info)}\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no ```{info} block"
    return found[1]


def tree() -> set[str]:
    """Paths of the tree block: two spaces of indent a level, a folder ends in /, several files may share a line."""
    paths: set[str] = set()
    stack: list[str] = []
    for line in block("text tree").splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r"\s{2,}", line.strip())[0].split()
        parent = "".join(stack[:depth])
        paths.update(parent + name for name in names)
        stack = [*stack[:depth], names[0]]
    return paths


def test_every_path_of_the_tree_exists() -> None:
    assert [path for path in sorted(tree()) if not (ROOT / path).exists()] == []


def test_every_module_stands_in_the_tree() -> None:
    modules = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert sorted(modules - tree()) == []


def commands() -> list[list[str]]:
    lines = block("sh commands").replace("\\\n", " ").splitlines()
    return [line.split("#")[0].split() for line in lines if line.startswith("qvlm")]


HELP = {
    "qvlm": "qvlm.cli",
    "qvlm-export": "qvlm_export.cli",
    "qvlm-run": "qvlm_runtime.cli",
    "qvlm-bench": "qvlm_runtime.bench.cli",
    "qvlm-serve": "qvlm_runtime.serve.cli",
}


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_and_option_exists(command: list[str]) -> None:
    module = HELP[command[0]]
    words = command[1:]
    sub = (
        [words[0]]
        if command[0] == "qvlm" or words[0] in ("verify", "check", "build", "targets")
        else []
    )
    code = f"from {module} import main; main({[*sub, '--help']!r})"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={
            "PYTHONPATH": ":".join(str(ROOT / p) for p in (".", "export", "runtime", "calib_data"))
        },
    )
    assert run.returncode == 0, run.stderr
    for option in (word for word in words if word.startswith("--")):
        assert option in run.stdout, f"{option} is not an option of {' '.join(command[:2])}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)`", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"Makefile has no {target}"


def test_supported_table_is_what_the_code_registers() -> None:
    from qvlm.methods import METHODS
    from qvlm.models import ADAPTERS
    from qvlm.recipe import RECIPES
    from qvlm_export.models import BUILDERS
    from qvlm_export.targets import TARGETS

    def row(name: str) -> set[str]:
        found = re.search(rf"^\| {name} \|(.*?)\|", README, re.MULTILINE)
        assert found, f"README's table has no row {name!r}"
        return set(re.findall(r"`([^`]+)`", found[1]))

    assert row("model types") == set(ADAPTERS) == set(BUILDERS)
    assert row("targets") == set(TARGETS)
    assert row("methods") == set(METHODS)
    assert row("recipes") == set(RECIPES)
