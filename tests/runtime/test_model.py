"""Proves whole folders on ONNX Runtime: both targets answer what NumPy computes, streams equal whole
answers, threads equal serial runs, importing stays light: python -m pytest tests/runtime/test_model.py
"""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runtime_support import EOS, reference_logits, toy_vision_weights, write_folder

import qvlm_runtime
from qvlm_runtime import Model, SessionError, load

RUNTIME = Path(qvlm_runtime.__file__).parent
HEAVY = ["PIL", "tokenizers", "jinja2", "onnxruntime", "torch", "transformers", "onnx", "tensorrt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_folder(path)
    return path


@pytest.fixture(scope="module", params=["ort", "rtx"])
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(folder, request.param, threads=1) as opened:
        yield opened


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    shapes = generator.integers(4, 30, (count, 2))
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), np.uint8)) for h, w in shapes]


def reference_answer(model: Model, prompt: str, images: list[Image.Image], limit: int) -> list[int]:
    """Greedy decoding by full recompute in float64."""
    spec, ready = model.manifest.model, model.prepare(prompt, images)
    features = None
    if ready.pictures:
        weights = toy_vision_weights(spec).astype(np.float64)
        pixels = np.concatenate([picture.inputs["pixel_values"] for picture in ready.pictures])
        features = pixels.reshape(-1, weights.shape[0]) @ weights
    ids, index, new = list(ready.token_ids), list(ready.image_index), []
    while len(new) < limit and EOS not in new:
        new.append(int(np.argmax(reference_logits(spec, ids + new, index, features))))
        index.append(-1)
    return new


@pytest.mark.parametrize(("prompt", "count"), [("Hello", 0), ("What?", 1), ("Compare", 3)])
def test_a_greedy_answer_equals_numpy(model: Model, prompt: str, count: int) -> None:
    images = pictures(count)
    done = model.generate(prompt, images, max_new_tokens=25)
    assert list(done.token_ids) == reference_answer(model, prompt, images, 25)
    assert done.timings.images == count
    assert done.timings.prompt_tokens == 2 + len(prompt) + 3 * count


def test_the_order_of_images_matters_and_paths_are_images(model: Model, tmp_path: Path) -> None:
    first, second = pictures(2, seed=4)
    answers = [model.generate("ab", pair).token_ids for pair in ([first, second], [second, first])]
    assert answers[0] != answers[1]
    paths = [tmp_path / "1.png", tmp_path / "2.png"]
    first.save(paths[0])
    second.save(paths[1])
    assert model.generate("ab", paths).token_ids == answers[0]


def test_a_conversation_of_several_turns(model: Model) -> None:
    image = pictures(1)[0]
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a?"}]},
        {"role": "assistant", "content": "b."},
        {"role": "user", "content": [{"type": "text", "text": "c?"}, {"type": "image"}]},
    ]
    ready = model.prepare(talk, [image, image])
    assert ready.text == "<s><image>a?b.c?<image>>"
    assert max(ready.image_index) == 5
    assert model.generate(talk, [image, image]).token_ids


def test_a_stream_joined_is_the_answer_for_every_option(model: Model) -> None:
    options = [{}, {"temperature": 1.5, "seed": 2}, {"temperature": 1, "top_k": 9, "top_p": 0.8,
               "seed": 1}, {"stop": ["a", "7", "\ufffd"]}]  # fmt: skip
    for option in options:
        whole = model.generate("Tell", pictures(1), max_new_tokens=40, **option)
        stream = model.stream("Tell", pictures(1), max_new_tokens=40, **option)
        assert "".join(stream) == whole.text
        assert stream.generation.token_ids == whole.token_ids
        assert stream.generation.finish == whole.finish


def test_threads_give_the_answers_of_serial_runs(model: Model) -> None:
    def ask(n: int) -> tuple[int, ...]:
        images = pictures(n % 3, seed=n)
        return model.generate(
            "x" * (1 + n % 5), images, max_new_tokens=30, temperature=n % 2 * 1.2, seed=n
        ).token_ids

    serial = [ask(n) for n in range(24)]
    assert len(set(serial)) > 12, "the questions must have different answers to tell runs apart"
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(24))) == serial


def test_interleaved_streams_do_not_disturb_each_other(model: Model) -> None:
    prompts = ["one", "another", "a third"]
    expected = [model.generate(p, pictures(1), max_new_tokens=20).text for p in prompts]
    streams = [model.stream(p, pictures(1), max_new_tokens=20) for p in prompts]
    texts, open_streams = ["", "", ""], {0, 1, 2}
    while open_streams:
        for i in sorted(open_streams):
            piece = next(streams[i], None)
            if piece is None:
                open_streams.discard(i)
            else:
                texts[i] += piece
    assert texts == expected


def test_a_closed_model_says_so(folder: Path) -> None:
    opened = load(folder)
    opened.close()
    with pytest.raises(SessionError, match="closed"):
        opened.generate("a")


def test_importing_the_package_and_its_modules_loads_nothing_heavy() -> None:
    modules = [f"qvlm_runtime.{path.stem}" for path in RUNTIME.glob("*.py")]
    names = ", ".join(name.removesuffix(".__init__") for name in modules)
    code = f"import sys, {names}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"PYTHONPATH": str(RUNTIME.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["tokenizers", "jinja2", "onnxruntime"])
def test_a_library_that_is_not_installed_is_named_with_its_extra(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SessionError, match=rf"{name} is not installed .* 'qvlm\[runtime\]'"):
        load(folder)


def test_answering_loads_neither_torch_nor_transformers_nor_onnx(folder: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx'): sys.modules[name] = None\n"
        "from qvlm_runtime import load\n"
        f"print(load({str(folder)!r}).generate('hi', max_new_tokens=3).token_ids)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(RUNTIME.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("(")
