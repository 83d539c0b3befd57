"""Proves that images of different numbers of rows answer as a full recompute in float64 does, whole and in
pieces, cold and in a conversation, with positions in sequence and on M-RoPE's grids, and that these
positions are transformers': python -m pytest tests/runtime/test_picture_sizes.py
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from runtime_support import (
    EOS,
    FORMS,
    IMAGE,
    IMAGE_ROWS,
    IMAGE_SIDE,
    reference_logits,
    toy_vision_weights,
    write_folder,
)

from qvlm_runtime import ImageError, Model, PromptError, load
from qvlm_runtime.image_spec import CanvasImage, Layout, PixelSpec
from qvlm_runtime.manifest import MarkerSpec
from qvlm_runtime.model import Question
from qvlm_runtime.positions import prompt_positions

TILES = CanvasImage(
    PixelSpec(3, 1 / 255, (0.5,) * 3, (0.5,) * 3), IMAGE_ROWS, (IMAGE_SIDE,) * 2, 1, 4
)
TARGETS = ["ort", "rtx"] if FORMS[0] == "scatter" else ["rtx"]


def picture(height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng(height * 100 + width)
    return generator.integers(0, 256, (height, width, 3), np.uint8)


SQUARE, WIDE, HIGH = picture(5, 5), picture(7, 29), picture(31, 11)


@pytest.fixture(scope="module", params=["sequential", "mrope"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = tmp_path_factory.mktemp("model")
    marker = MarkerSpec("[{image}]", "({line},{column}){image}", "\n", "all{image}")
    if request.param == "mrope":  # on grids: every image stands as one run
        marker = MarkerSpec("[{image}]")
    write_folder(path, TILES, max_context=256, marker=marker, positions=request.param)
    return path


@pytest.fixture(scope="module", params=TARGETS)
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(folder, request.param, threads=1, verify=False) as opened:
        if opened.manifest.model.positions == "mrope":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("qvlm_runtime.model.prepare", on_a_grid)
                yield opened
        else:
            yield opened


def on_a_grid(source: Any, spec: CanvasImage, where: str) -> Any:
    """The toy's rows as a grid of lines of IMAGE_ROWS, as M-RoPE needs one."""
    from qvlm_runtime.vision import prepare

    layout, arrays = prepare(source, spec, where)
    return Layout(layout.tiles, layout.rows, (layout.tiles, IMAGE_ROWS)), arrays


def recomputed(model: Model, question: Question, images: list[Any], limit: int) -> list[int]:
    """Greedy decoding by full recompute in float64."""
    spec, ready = model.manifest.model, model.prepare(question, images)
    weights = toy_vision_weights(spec).astype(np.float64)
    pieces = [one.inputs["pixel_values"].reshape(-1, len(weights)) for one in ready.pictures]
    features = np.concatenate(pieces) @ weights if pieces else None
    ids, index, positions = list(ready.token_ids), list(ready.image_index), ready.positions
    new: list[int] = []
    while len(new) < limit and EOS not in new:
        logits = reference_logits(spec, ids + new, index, features, positions)
        new.append(int(np.argmax(logits)))
        index.append(-1)
        behind = np.full((len(positions), 1), positions.max() + 1)
        positions = np.concatenate([positions, behind], axis=1)
    return new


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_answers_equal_a_full_recompute(model: Model, chunk: int | None) -> None:
    for images in ([SQUARE], [WIDE, SQUARE, HIGH], [HIGH, WIDE]):
        done = model.generate("What?", images, max_new_tokens=12, prefill_chunk=chunk)
        assert list(done.token_ids) == recomputed(model, "What?", images, 12)
        assert done.timings.prompt_tokens == model.count_tokens("What?", images)


def test_a_conversation_equals_cold_runs_and_runs_only_what_is_new(model: Model) -> None:
    turns: list[tuple[str, list[np.ndarray]]] = [
        ("What?", [WIDE]),
        ("And?", []),
        ("Compare.", [SQUARE, HIGH]),
        ("Why?", []),
    ]
    with model.conversation("Be brief.") as talk:
        before = 0
        for question, images in turns:
            done = talk.ask(question, images, max_new_tokens=8)
            cold = talk.messages[:-1]
            assert list(done.token_ids) == recomputed(model, cold, [], 8)
            # All of the prompt before but the mark that an answer begins.
            assert done.timings.cached_tokens >= before - 1
            before = done.timings.prompt_tokens
        changed = [*talk.messages[:1], {"role": "user", "content": "Be"}]
        talk.messages = changed
        done = talk.ask("What?", [HIGH], max_new_tokens=8)
        assert list(done.token_ids) == recomputed(model, talk.messages[:-1], [], 8)


def test_the_oldest_turns_are_dropped_by_their_own_sizes(model: Model) -> None:
    with model.conversation("S", max_rows=90, when_full="drop_oldest") as talk:
        dropped = 0
        for n, image in enumerate((WIDE, SQUARE, HIGH, SQUARE, WIDE)):
            done = talk.ask(f"{n}" * 9, [image], max_new_tokens=8)
            assert list(done.token_ids) == recomputed(model, talk.messages[:-1], [], 8)
            dropped += done.dropped_messages
        assert dropped


def test_rows_that_end_within_an_image_are_kept(model: Model) -> None:
    prompt = model.prepare("What?", [WIDE, HIGH])
    first = prompt.pictures[0].layout.rows
    inside = prompt.image_index.index(first + 4)
    part = prompt.behind(inside)
    assert part.pictures == prompt.pictures[1:] and part.image_index[0] == 4
    assert prompt.behind(0).pictures == prompt.pictures
    assert prompt.behind(len(prompt.token_ids) - 1).pictures == ()
    assert len(set(prompt.keys()) - set(prompt.token_ids)) == first + prompt.pictures[1].layout.rows


def test_a_graph_of_one_tile_is_run_tile_by_tile(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "one")
    path = tmp_path / "one" / "rtx" / "vision.onnx"
    graph = onnx.load(path, load_external_data=False)
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    graph.graph.output[0].type.tensor_type.shape.dim[0].dim_value = IMAGE_ROWS
    onnx.save(graph, path)
    with (
        load(folder, "rtx", verify=False) as many,
        load(tmp_path / "one", "rtx", verify=False) as one,
    ):
        assert one.vision.inputs["pixel_values"].shape[0] == 1
        pictures = many.pictures([WIDE, SQUARE])
        rows = sum(p.layout.rows for p in pictures)
        got, expected = (m.image_features(pictures).buffer.read(0, (rows, 12)) for m in (one, many))
        np.testing.assert_array_equal(got, expected)


def test_a_prompt_of_too_many_images_is_refused_before_any_is_read(model: Model) -> None:
    with pytest.raises(PromptError, match="expected room for one new token"):
        model.generate("What?", ["absent.png"] * 100)
    with pytest.raises(ImageError, match=r"absent\.png: no such file"):
        model.generate("What?", ["absent.png"])


# --- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_mrope_positions_are_transformers(family: str) -> None:
    import importlib

    name = {"qwen2_vl": "Qwen2VLModel", "qwen2_5_vl": "Qwen2_5_VLModel", "qwen3_vl": "Qwen3VLModel"}
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cls = getattr(module, name[family])
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    stub = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    stub.get_vision_position_ids = lambda *a, **k: cls.get_vision_position_ids(stub, *a, **k)
    generator = np.random.default_rng(2)
    for images in (0, 1, 1, 2, 3, 5):
        grids = generator.integers(1, 9, (images, 2)).tolist()
        ids: list[int] = []
        for lines, columns in grids:
            ids += [9] * int(generator.integers(1, 6)) + [IMAGE] * (lines * columns)
        ids += [9] * int(generator.integers(1, 6))
        marks = np.array(ids) == IMAGE
        index = np.where(marks, np.cumsum(marks) - 1, -1)
        layouts = [Layout(1, lines * columns, (lines, columns)) for lines, columns in grids]
        got = prompt_positions("mrope", index.tolist(), layouts)
        grid = torch.tensor([[1, 2 * lines, 2 * columns] for lines, columns in grids])
        expected, delta = cls.get_rope_index(
            stub,
            torch.tensor([ids]),
            mm_token_type_ids=torch.from_numpy(marks.astype(np.int64))[None],
            image_grid_thw=grid if images else None,
        )
        np.testing.assert_array_equal(got, expected[:, 0].numpy())
        assert got.max() + 1 - len(ids) == int(delta)
