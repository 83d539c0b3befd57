"""Proves that a limit on images which no image keeps is refused before anything is quantized, and that a folder with
limits is verified again by its own goldens, whose images are larger.

Run: python -m pytest tests/end_to_end/test_image_limits.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_qwen import picture, write_tiny_source

from qvlm_export.cli import main
from qvlm_runtime.manifest import read_manifest
from qvlm_runtime.vision import extremes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_source(tmp_path_factory.mktemp("limits") / "source", "qwen2_5_vl")


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    folder = tmp_path / "calib"
    folder.mkdir()
    picture(0, (40, 24)).save(folder / "a.png")
    return folder


def export(source: Path, out: Path, calib: Path, *options: str) -> int:
    return main([str(source), str(out), "--recipe", "float", "--calib", str(calib), *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "3"], "--image-size 3: expected at least 8"),
        (
            ["--max-image-tokens", "0"],
            "--max-image-tokens 0: an image of this model takes 1 tokens",
        ),
    ],
)
def test_a_limit_that_no_image_keeps_is_refused_first(
    source: Path,
    tmp_path: Path,
    calib: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("qvlm.quantize.quantize", None)  # would be a TypeError
    for more in ([], ["--dry-run"]):
        assert export(source, tmp_path / "out", calib, *options, *more) == 1
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["calib"]


@pytest.mark.parametrize("name", ["chat_template.jinja", "preprocessor_config.json"])
def test_files_that_the_manifest_needs_are_missed_first(
    tmp_path: Path, calib: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source = write_tiny_source(tmp_path / "source", "qwen2_vl")
    (source / name).unlink()
    assert export(source, tmp_path / "out", calib) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert name in line and "Copy" in line
    assert not (tmp_path / "out.partial").exists()


def test_a_folder_with_limits_is_verified_again(
    source: Path, tmp_path: Path, calib: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert export(source, out, calib, "--max-image-tokens", "6") == 0
    manifest = read_manifest(out)
    assert extremes(manifest.image)[1].rows == 6 and "golden_images.json" in manifest.files
    assert main(["verify", str(out)]) == 0
    wrong = {**json.loads((out / "golden_images.json").read_text()), "patch": None}
    (out / "golden_images.json").write_text(json.dumps({**wrong, "more": 1}))
    assert main(["verify", str(out)]) == 1
    assert "golden_images.json: a key is missing or unknown" in capsys.readouterr().err
    (out / "golden_images.json").unlink()
    assert main(["verify", str(out)]) == 1  # the goldens' image is larger than the manifest's
    assert "rows of pixels" in capsys.readouterr().err
