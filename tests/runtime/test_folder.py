"""Proves that a damaged, foreign or hostile model folder is refused with one clear line, and that
an intact one opens: python -m pytest tests/runtime/test_folder.py
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runtime_support import write_folder

from qvlm_runtime import FolderError, SessionError, load
from qvlm_runtime.manifest import Manifest, read_manifest, verify_files


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    write_folder(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(FolderError) as caught:
        load(folder, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_an_intact_folder_opens_and_its_manifest_survives_a_round_trip(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert Manifest.from_json(manifest.to_json(), "here") == manifest
    verify_files(folder, manifest)
    with load(folder) as model:
        assert model.target == "ort"
    with load(str(folder), "rtx", verify=False) as model:
        assert model.target == "rtx"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "ort/decoder.onnx", "ort/decoder.onnx.data"]
)
def test_one_flipped_bit_is_found(folder: Path, name: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"{path}: sha256 differs" in refusal(folder)


def test_a_damaged_file_is_named_before_the_graph_that_it_breaks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions open while the weights are hashed; the hash is the reason that is given."""
    (folder / "ort/vision.onnx.data").write_bytes(
        bytes((folder / "ort/vision.onnx.data").stat().st_size)
    )

    def fails(path: Path, **_: object) -> None:
        raise SessionError(f"{path}: cannot open")

    monkeypatch.setattr("qvlm_runtime.loading.open_session", fails)
    assert "vision.onnx.data: sha256 differs" in refusal(folder)
    with pytest.raises(SessionError, match="cannot open"):
        load(folder, verify=False)


def test_a_flipped_bit_in_another_target_is_not_read(folder: Path) -> None:
    path = folder / "rtx/decoder.onnx.data"
    path.write_bytes(path.read_bytes()[::-1])
    load(folder, "ort").close()
    assert "sha256 differs" in refusal(folder, target="rtx")


def test_a_shortened_file_says_both_sizes(folder: Path) -> None:
    path = folder / "ort/vision.onnx.data"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    assert f"{size - 5} bytes, expected {size}" in refusal(folder)


def test_an_absent_file_is_named(folder: Path) -> None:
    (folder / "ort/decoder.onnx.data").unlink()
    assert "decoder.onnx.data: listed in manifest.json but absent" in refusal(folder)


def test_a_folder_without_manifest_says_what_to_give(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    assert "not found. Give a folder written by qvlm-export" in refusal(folder)
    assert "not found" in refusal(folder / "nowhere")
    assert "not found" in refusal(folder / "tokenizer.json")


@pytest.mark.parametrize("path", ["../tokenizer.json", "/etc/passwd", "a\\b", "C:x", "", "a\0b"])
@pytest.mark.parametrize("place", ["files", "graphs", "engines"])
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, path: str, place: str) -> None:
    def change(data: dict) -> None:
        if place == "files":
            data["files"][path] = {"bytes": 1, "sha256": "0"}
        elif place == "graphs":
            data["targets"]["ort"]["graphs"]["decoder"] = path
        else:
            data["targets"]["ort"]["engines"]["sm87/decoder"] = {
                "path": path, "backend": "tensorrt", "version": "10.3.0", "capability": 87
            }  # fmt: skip

    edit(folder, change)
    assert "leaves the folder" in refusal(folder)


def test_a_link_out_of_the_folder_is_refused_even_if_its_bytes_are_right(folder: Path) -> None:
    inside, outside = folder / "tokenizer.json", folder.parent / "tokenizer.json"
    inside.rename(outside)
    inside.symlink_to(outside)
    assert "a link that leaves the folder" in refusal(folder)


def test_a_linked_subfolder_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder / "ort").rename(folder.parent / "ort")
    (folder / "ort").symlink_to(folder.parent / "ort")
    assert "a link that leaves the folder" in refusal(folder)


@pytest.mark.parametrize("schema", [0, 1, "2", None])
def test_another_schema_is_refused(folder: Path, schema: object) -> None:
    edit(folder, lambda data: data.update(schema=schema))
    assert f"schema {schema!r}, expected 2. Export again" in refusal(folder)


def test_a_truncated_manifest_is_refused_at_any_length(folder: Path) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    for length in (0, 1, len(text) // 3, len(text) - 3):
        path.write_text(text[:length])
        assert "not JSON" in refusal(folder)


def test_a_manifest_of_other_json_is_refused(folder: Path) -> None:
    for text in ("[]", "3", '"x"', "[" * 100_000):
        (folder / "manifest.json").write_text(text)
        assert "expected 2" in (line := refusal(folder)) or "not JSON" in line


@pytest.mark.parametrize("place", ["", "model", "image", "targets.ort", "files.tokenizer.json"])
def test_an_unknown_key_is_named_wherever_it_stands(folder: Path, place: str) -> None:
    def change(data: dict) -> None:
        head, _, tail = place.partition(".")
        part = data[head] if head else data
        (part[tail] if tail else part)["colour"] = 1

    edit(folder, change)
    assert "colour" in refusal(folder)


@pytest.mark.parametrize("place", ["model", "image", "targets", "files", "recipe", "version"])
def test_a_missing_key_is_named(folder: Path, place: str) -> None:
    edit(folder, lambda data: data.pop(place))
    assert place in refusal(folder)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "layers", "2"),
        ("model", "layers", 0),
        ("model", "layers", True),
        ("model", "hidden_size", 1.5),
        ("model", "image_token", 3),
        ("model", "eos_token_ids", ["a"]),
        ("model", "eos_token_ids", 2),
        ("model", "template_tokens", {"bos_token": 1}),
        ("model", "positions", "rotary"),
        ("model", "marker", {"leading": 1}),
        ("image", "rows", "3"),
        ("image", "kind", "round"),
        ("image", "crop", [4]),
        ("ort", "dtype", "float8"),
        ("ort", "cache", "ring"),
        ("ort", "graphs", ["a"]),
    ],
)
def test_a_value_of_another_type_is_refused(
    folder: Path, section: str, key: str, value: object
) -> None:
    def change(data: dict) -> None:
        (data["targets"]["ort"] if section == "ort" else data[section])[key] = value

    edit(folder, change)
    refusal(folder)


def test_a_target_that_is_not_there_lists_those_that_are(folder: Path) -> None:
    assert "ort, rtx" in refusal(folder, target="jetpack6")
    edit(folder, lambda data: data["targets"].pop("ort"))
    with load(folder) as model:
        assert model.target == "rtx"
    edit(folder, lambda data: data["targets"].clear())
    assert "none" in refusal(folder)


def test_a_graph_that_is_not_listed_under_files_is_refused(folder: Path) -> None:
    edit(folder, lambda data: data["files"].pop("ort/decoder.onnx"))
    assert "not listed under files" in refusal(folder)


def test_a_target_without_a_decoder_is_refused(folder: Path) -> None:
    edit(folder, lambda data: data["targets"]["ort"]["graphs"].pop("decoder"))
    assert "has no graph decoder" in refusal(folder)


def test_a_tokenizer_or_template_that_is_none_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert "not a tokenizer" in refusal(folder, verify=False)


def test_a_template_with_a_syntax_error_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}")
    assert "not a chat template" in refusal(folder, verify=False)
