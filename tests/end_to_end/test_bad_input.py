"""Proves that what a user can get wrong costs one clear line and exit 1, and leaves nothing under the output's name.

Run: python -m pytest tests/end_to_end/test_bad_input.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_source import picture

from qvlm_export.cli import main as export_main
from qvlm_runtime.bench.cli import main as bench_main
from qvlm_runtime.cli import main as run_main
from qvlm_runtime.serve.cli import main as serve_main

Damage = Callable[[Path], None]


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


def no_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()


def truncated(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def absent_shard(source: Path) -> None:
    names = load_file(source / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "model.safetensors").unlink()


def nan_weight(source: Path) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = np.nan
    save_file(tensors, path, metadata={"format": "pt"})


def unknown_family(source: Path) -> None:
    edit_json(source / "config.json", model_type="paligemma9")


def remote_code(source: Path) -> None:
    edit_json(source / "config.json", auto_map={"AutoModel": "modeling_evil.Evil"})


def broken_config(source: Path) -> None:
    (source / "config.json").write_text("{")


SOURCES: list[tuple[Damage, str]] = [
    (no_weights, "safetensors"),
    (truncated, "model.safetensors"),
    (absent_shard, "model-00001-of-00002.safetensors"),
    (nan_weight, "up_proj.weight"),
    (unknown_family, "paligemma9"),
    (remote_code, "auto_map"),
    (broken_config, "config.json"),
]


def one_line(capsys: pytest.CaptureFixture[str], program: str) -> str:
    """The last line on stderr, after checking that no traceback was shown."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith(f"{program}: ")
    return last


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(2):
        picture(i).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(("damage", "names"), SOURCES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_bad_source_is_named(
    tiny_source: Path,
    tmp_path: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Damage,
    names: str,
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_source, source)
    damage(source)
    assert export_main([str(source), str(out), "--method", "rtn", "--calib", str(images)]) == 1
    assert names in one_line(capsys, "qvlm-export")
    assert not out.exists()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def corrupt_image(folder: Path) -> None:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])


def absent(folder: Path) -> None:
    shutil.rmtree(folder)


def bad_lines(folder: Path) -> None:
    (folder / "samples.jsonl").write_text('{"image": "0.png"\n')


def leaves_folder(folder: Path) -> None:
    (folder / "samples.jsonl").write_text('{"image": "../x.png", "prompt": "?", "answer": "a"}\n')


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (empty, "images"),
        (absent, "images"),
        (corrupt_image, "1.png"),
        (bad_lines, "samples.jsonl"),
        (leaves_folder, "../x.png"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_bad_calibration_data_is_named(
    tiny_source: Path,
    tmp_path: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Damage,
    names: str,
) -> None:
    damage(images)
    out = tmp_path / "out"
    words = [str(tiny_source), str(out), "--method", "rtn", "--calib", str(images)]
    assert export_main(words) == 1
    assert names in one_line(capsys, "qvlm-export")
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "w4a4"], "only be simulated"),
        (["--recipe", "nothing"], "neither a known name"),
        (["--method", "magic"], "magic"),
        (["--max-context", "100000"], "max_context 100000"),
        (["--image-size", "16"], "images of this model have one size"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    tiny_source: Path,
    tmp_path: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    words = [str(tiny_source), str(out), "--calib", str(images), *options]
    if "--method" not in options:
        words += ["--method", "rtn"]
    assert export_main(words) == 1
    assert message in one_line(capsys, "qvlm-export")
    assert not out.exists()


def test_a_group_size_that_does_not_divide_names_the_layer(
    tiny_source: Path, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny vision tower is 96 wide."""
    recipe = tmp_path / "recipe.json"
    rules = [{"pattern": "vision.*", "format": "w4a16"}]
    recipe.write_text(json.dumps({"schema": 1, "method": "rtn", "rules": rules}))
    words = [str(tiny_source), str(tmp_path / "out"), "--recipe", str(recipe)]
    assert export_main([*words, "--calib", str(images)]) == 1
    line = one_line(capsys, "qvlm-export")
    assert "group_size 128 does not divide in_features 96" in line and "Use group_size 32" in line


@pytest.fixture(scope="module")
def exported(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound export of the tiny model. Copy it before changing anything."""
    work = tmp_path_factory.mktemp("exported")
    (work / "images").mkdir()
    picture(0).save(work / "images" / "0.png")
    words = [str(tiny_source), str(work / "out"), "--method", "rtn"]
    recipe = work / "recipe.json"
    rules = [{"pattern": "text.*", "format": "w4a16"}]
    recipe.write_text(json.dumps({"schema": 1, "method": "rtn", "samples": 1, "rules": rules}))
    assert export_main([*words, "--recipe", str(recipe), "--calib", str(work / "images")]) == 0
    return work / "out"


def flipped_byte(folder: Path) -> None:
    path = folder / "ort" / "decoder.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def path_outside(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"ort/vision.onnx"', '"../ort/vision.onnx"'))


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (flipped_byte, "decoder.onnx.data: sha256"),
        (path_outside, "../ort/vision.onnx"),
        (no_manifest, "manifest.json"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_damaged_folder_is_not_run(
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Damage,
    names: str,
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    damage(folder)
    capsys.readouterr()
    assert run_main([str(folder), "hello"]) == 1
    assert names in one_line(capsys, "qvlm-run")


@pytest.mark.parametrize(
    ("program", "run", "words"),
    [
        *(("qvlm-export", export_main, [name, "OUT"]) for name in ("verify", "check", "build")),
        ("qvlm-run", run_main, ["OUT", "hello"]),
        ("qvlm-bench", bench_main, ["OUT"]),
        ("qvlm-serve", serve_main, ["OUT"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_folder_of_schema_1_is_to_be_exported_again(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    program: str,
    run: Callable[[list[str]], int],
    words: list[str],
) -> None:
    """As the first version wrote them: images were a map of numbers."""
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": 1, "image": {"size": 24}}))
    assert run([str(tmp_path) if word == "OUT" else word for word in words]) == 1
    line = one_line(capsys, program)
    assert "schema 1, expected 2. Export again" in line


def test_a_prompt_longer_than_the_cache_is_refused(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model holds 160 tokens, a byte each."""
    capsys.readouterr()
    assert run_main([str(exported), "x" * 400]) == 1
    assert "cache" in one_line(capsys, "qvlm-run")


def test_a_corrupt_image_is_named(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nno image")
    capsys.readouterr()
    assert run_main([str(exported), "what?", "--image", str(path)]) == 1
    assert "broken.png" in one_line(capsys, "qvlm-run")


def test_a_pattern_that_matches_nothing_is_noted(
    tiny_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.json"
    rules = [{"pattern": p, "format": "w8a8"} for p in ("txt.*", "text.*")]
    recipe.write_text(json.dumps({"schema": 1, "rules": rules}))
    command = [str(tiny_source), str(tmp_path / "out"), "--recipe", str(recipe), "--dry-run"]
    assert export_main(command) == 0
    said = capsys.readouterr().err
    assert said == "note: no linear or embedding matches the recipe's 'txt.*'\n"


def test_an_existing_folder_is_not_replaced_unasked(
    exported: Path, tiny_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (exported / "manifest.json").read_bytes()
    assert export_main([str(tiny_source), str(exported), "--method", "rtn"]) == 1
    assert "--overwrite" in one_line(capsys, "qvlm-export")
    # A budget is not measured for a folder that may not be written.
    assert export_main([str(tiny_source), str(exported), "--max-bits-per-weight", "9"]) == 1
    assert "--overwrite" in one_line(capsys, "qvlm-export")
    assert not exported.with_name(exported.name + ".sensitivity.json").exists()
    assert export_main([str(tiny_source), "/", "--overwrite"]) == 1
    assert "no folder's name" in one_line(capsys, "qvlm-export")
    assert (exported / "manifest.json").read_bytes() == before
