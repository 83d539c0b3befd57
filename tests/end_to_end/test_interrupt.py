"""Proves that an export stopped by SIGINT leaves nothing under its name, and that --resume then gives the bytes of an
uninterrupted run; that a write the system refuses is one clear line; and that two runs give the same bytes.

Run: python -m pytest tests/end_to_end/test_interrupt.py
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_source import picture

ROOT = Path(__file__).parent.parent.parent
RECIPE = """{"schema": 1, "method": "rtn", "samples": 3, "seed": 0, "rules": [
    {"pattern": "text.*", "format": "w4a16"}, {"pattern": "projector.*", "format": "w8a8"}]}"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration folder of three pictures and a recipe file."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "images").mkdir()
    for i in range(3):
        picture(i).save(folder / "images" / f"{i}.png")
    (folder / "recipe.json").write_text(RECIPE)
    return folder


def command(source: Path, inputs: Path, out: Path, *more: str) -> list[str]:
    code = "import sys; from qvlm_export.cli import main; sys.exit(main())"
    words = [str(source), str(out), "--recipe", str(inputs / "recipe.json")]
    return [sys.executable, "-c", code, *words, "--calib", str(inputs / "images"), *more]


def environment() -> dict[str, str]:
    roots = (".", "export", "runtime", "calib_data")
    return {**os.environ, "PYTHONPATH": ":".join(str(ROOT / r) for r in roots)}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tiny_source: Path, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted export."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run = subprocess.run(
        command(tiny_source, inputs, out), env=environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return out


@pytest.mark.slow
def test_two_runs_give_the_same_bytes(
    tiny_source: Path, inputs: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    subprocess.run(command(tiny_source, inputs, out), env=environment(), check=True)
    assert contents(out) == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["float goldens: 0/", "text: 0/", "decoder.onnx.data: "])
def test_resume_after_an_interrupt_gives_the_same_bytes(
    tiny_source: Path, inputs: Path, whole: Path, tmp_path: Path, stage: str
) -> None:
    out = tmp_path / "out"
    lines: list[str] = []
    with subprocess.Popen(
        command(tiny_source, inputs, out), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(stage) and not any(seen.startswith(stage) for seen in lines):
                process.send_signal(signal.SIGINT)
            lines.append(line)
    assert process.returncode == 1, f"no stage {stage!r} in {lines}"
    assert lines[-1] == "qvlm-export: interrupted. Run again with --resume to continue.\n"
    assert not out.exists()
    again = subprocess.run(
        command(tiny_source, inputs, out, "--resume"),
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_a_refused_write_is_one_line_and_leaves_nothing_whole(
    tiny_source: Path, inputs: Path, tmp_path: Path
) -> None:
    """A limit on file size is the nearest thing to a full disk that needs no privilege: the same failing write."""
    out = tmp_path / "out"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    run = subprocess.run(
        command(tiny_source, inputs, out),
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last.startswith("qvlm-export: ") and "File too large" in last
    assert "Traceback" not in run.stderr
    assert not out.exists()
