"""Proves that a prepared graph gives the same numbers, is made once, is made anew when anything it depends on
changes, and that an interrupted or refused write leaves nothing half done:
python -m pytest tests/runtime/test_prepared.py
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from runtime_support import SCATTERS, model_spec, write_folder

from qvlm_runtime import FolderError, SessionError, load, prepared
from qvlm_runtime.backend import EXACT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared") / "toy"
    write_folder(path)
    return path


def logits(folder: Path, kept: Path | None, **options: object) -> np.ndarray:
    with load(folder, prepared=kept, **options) as model:
        features = model.image_features(model.pictures([np.ones((6, 6, 3), np.uint8)]))
        state = model.decoder.start(16, features)
        state.step([3, 3, 3, 40, 41], [0, 1, 2, -1, -1])
        return np.stack([state.step([42]), state.step([43])])


@pytest.mark.parametrize("target", ["ort", "rtx"] if SCATTERS else ["rtx"])
def test_the_numbers_are_the_same_bit_for_bit(folder: Path, tmp_path: Path, target: str) -> None:
    plain = logits(folder, None, target=target)
    first = logits(folder, tmp_path, target=target)  # makes it
    again = logits(folder, tmp_path, target=target)  # opens it
    assert plain.shape == (2, model_spec().vocab_size)
    assert (first == plain).all() and (again == plain).all()


def names(kept: Path) -> set[str]:
    return {path.name for path in kept.iterdir()}


def test_it_is_made_once_and_anew_when_something_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, copy = tmp_path / "kept", Path(shutil.copytree(folder, tmp_path / "copy"))
    logits(copy, kept)
    made = names(kept)
    assert len(made) == 2 and all(len(list((kept / name).iterdir())) == 2 for name in made)
    stamps = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    logits(copy, kept)
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == stamps
    logits(copy, kept, accuracy_level=EXACT)
    assert len(names(kept)) == 4 and made < names(kept)
    os.utime(copy / "ort/decoder.onnx.data", ns=(1, 1))
    logits(copy, kept)
    assert len(names(kept)) == 5
    monkeypatch.setattr(prepared, "_processor", lambda: "another processor")
    logits(copy, kept)
    assert len(names(kept)) == 7


def test_the_one_that_is_kept_is_the_one_that_is_opened(folder: Path, tmp_path: Path) -> None:
    logits(folder, tmp_path)
    (graph,) = tmp_path.glob("decoder-*/decoder.onnx")
    graph.write_bytes(b"nothing")
    with pytest.raises(SessionError, match="cannot open this graph"):
        logits(folder, tmp_path)


def damage(path: Path) -> None:
    """Another byte, the same size and time."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_weights_are_hashed_when_they_are_prepared_and_not_again(
    folder: Path, tmp_path: Path
) -> None:
    kept, copy = tmp_path / "kept", Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = copy / "ort/decoder.onnx.data"
    good = logits(copy, kept)
    damage(weights)
    assert (logits(copy, kept) == good).all()  # not opened, so not hashed
    with pytest.raises(FolderError, match="sha256 differs"):
        load(copy, prepared=tmp_path / "empty")
    assert not (tmp_path / "empty").exists(), "nothing is prepared of damaged weights"
    damage(copy / "chat_template.jinja")
    with pytest.raises(FolderError, match="sha256 differs"):
        load(copy, prepared=kept)


def test_a_write_that_fails_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    graph = folder / "ort/decoder.onnx"

    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise MemoryError

    with pytest.raises(MemoryError):
        prepared.prepared_graph(graph, tmp_path, "1", {}, fails)
    assert list(tmp_path.iterdir()) == []


def test_of_two_at_once_the_first_to_finish_is_kept(folder: Path, tmp_path: Path) -> None:
    graph = folder / "ort/decoder.onnx"

    def slower(path: Path) -> None:
        prepared.prepared_graph(
            graph, tmp_path, "1", {}, lambda p: p.write_bytes(b"first") and None
        )
        path.write_bytes(b"second")

    found = prepared.prepared_graph(graph, tmp_path, "1", {}, slower)
    assert found.read_bytes() == b"first" and len(names(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SessionError, match="prepared graphs cannot be kept here") as caught:
        load(folder, prepared=tmp_path / "file" / "kept")
    assert "\n" not in str(caught.value)
