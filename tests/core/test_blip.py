"""Proves that the core sees BLIP-2 as its model computes it: a stream run layer by layer equals the model's own forward
(the Q-Former's cross attention, rows that OPT flattens), prompts without a picture and cached steps run, methods that
look at activations beat rounding, and what it does not take is refused in one line.

Run: python -m pytest tests/core/test_blip.py
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_blip import IMAGE_TOKEN, QUERIES, picture, tiny_questions, write_tiny_source

from qvlm.capture import Sample, build_sample, capture_stream
from qvlm.errors import CalibrationError, UnsupportedModelError
from qvlm.evaluate import answers, divergence, load_quantized
from qvlm.generate import decode
from qvlm.models import ADAPTERS
from qvlm.quantize import quantize
from qvlm.recipe import COMPONENTS, RECIPES
from qvlm.source import Loaded, load, open_source
from qvlm.visual_objective import Model

ADAPTER = ADAPTERS["blip-2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_source(tmp_path_factory.mktemp("blip") / "source")


@pytest.fixture(scope="module")
def loaded(source: Path) -> Loaded:
    return load(open_source(str(source)))


@pytest.fixture(scope="module")
def samples(loaded: Loaded) -> list[Sample]:
    """Two with a picture, the last one without."""
    return [
        build_sample(loaded.processor, q.open_images(), q.prompt, q.answer or "", IMAGE_TOKEN)
        for q in (tiny_questions(5)[i] for i in (0, 3, 4))
    ]


def test_the_picture_stands_before_the_first_token(loaded: Loaded, samples: list[Sample]) -> None:
    tokenizer = loaded.processor.tokenizer
    text = tokenizer.decode(samples[0].input_ids[0])
    assert text == "<image>" * QUERIES + "</s>Question: What? Answer: cat 0"
    assert tokenizer.decode(samples[0].input_ids[0][samples[0].answer_mask]) == " cat 0"
    assert int(samples[0].image_mask.sum()) == QUERIES
    caption = build_sample(loaded.processor, [picture(0)], "", "", IMAGE_TOKEN)
    assert tokenizer.decode(caption.input_ids[0]) == "<image>" * QUERIES + "</s>"


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_stream_run_layer_by_layer_equals_the_model(
    loaded: Loaded, samples: list[Sample], component: str
) -> None:
    model: Any = loaded.model
    stream = capture_stream(model, ADAPTER, component, samples)
    seen: list[torch.Tensor] = []
    hook = stream.layers[-1].register_forward_hook(lambda _, args, output: seen.append(output))
    reached = samples[:2] if component in ("vision", "projector") else samples
    for sample in reached:
        model(**sample.model_inputs())
    hook.remove()
    assert not stream.entries and not any(stream.additions)
    for i, expected in enumerate(seen):
        found = stream.run(0, len(stream.layers), stream.inputs[i], i)
        assert torch.equal(found, expected)


def test_the_tail_gives_the_models_logits(loaded: Loaded, samples: list[Sample]) -> None:
    """OPT's decoder adds positions to what it is given, so it cannot stand for what follows its layers."""
    model: Any = loaded.model
    stream = capture_stream(model, ADAPTER, "text", samples)
    assert stream.logits is not None
    for i, sample in enumerate(samples):
        hidden = stream.run(0, len(stream.layers), stream.inputs[i], i)
        assert torch.equal(stream.logits(hidden), model(**sample.model_inputs()).logits)


@pytest.mark.parametrize("number", [0, 2])
def test_cached_steps_equal_one_forward(loaded: Loaded, samples: list[Sample], number: int) -> None:
    """With a picture and without; a prompt without one sees nothing of the last one's."""
    model: Any = loaded.model
    sample = samples[number]
    found = decode(model, sample.model_inputs(), 8, keep_logits=True)
    assert found.logits is not None
    ids = torch.cat([sample.input_ids, found.tokens[:, :-1]], 1)
    whole = model(**{**sample.model_inputs(), "input_ids": ids}).logits[:, -8:]
    # Float32 sums of a cached forward and a whole one, in another order.
    torch.testing.assert_close(found.logits, whole, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # the decoder alone, as transformers runs it for text
        if number == 2:
            torch.testing.assert_close(model.language_model(ids).logits[:, -8:], whole)


def test_the_visual_encoder_step_sees_the_tower(loaded: Loaded, samples: list[Sample]) -> None:
    """What enters the projector is the tower's output, not what the linear behind the Q-Former reads."""
    model: Any = loaded.model
    seen = Model(model, ADAPTER).run(samples[0])
    expected = model.vision_model(samples[0].pixel_values).last_hidden_state
    assert seen.vision is not None and torch.equal(seen.vision, expected)


def test_methods_beat_rounding(source: Path, loaded: Loaded, tmp_path: Path) -> None:
    questions = tiny_questions(2)
    assert len(answers(loaded, questions).texts) == 2
    found = {}
    for method in ("rtn", "gptq"):
        recipe = replace(RECIPES["w4a16"], method=method)
        out = quantize(str(source), tmp_path / method, recipe, questions=questions, goldens=1)
        found[method] = divergence(loaded, load_quantized(out), questions).kl
    assert found["gptq"] < found["rtn"] / 2
    stored = json.loads((tmp_path / "gptq" / "quantization.json").read_text())["linears"]
    names = {name for name, entry in stored.items() if entry["component"] == "projector"}
    assert "language_projection" in names
    assert "qformer.encoder.layer.2.crossattention.attention.key" in names
    assert not any(name.startswith("qformer.encoder.layer.0.attention") for name in names)


def test_image_and_text_tokens_are_told_apart(source: Path, loaded: Loaded, tmp_path: Path) -> None:
    """OPT flattens batch and tokens before its MLP: the mask has to follow."""
    recipe = replace(RECIPES["w8a8-split"], method="rtn")
    out = quantize(str(source), tmp_path / "out", recipe, questions=tiny_questions(2), goldens=1)
    assert divergence(loaded, load_quantized(out), tiny_questions(2)).kl < 0.01


@pytest.mark.parametrize("transform", ["rotate", "awq"])
def test_a_transform_changes_no_answer(source: Path, transform: str, tmp_path: Path) -> None:
    """The driver compares the logits before and after, so passing is the proof."""
    options = {"rotations": ["values"]} if transform == "rotate" else {}
    recipe = replace(RECIPES["w4a16"], method="rtn", transforms=(transform,), options=options)
    quantize(str(source), tmp_path / "out", recipe, questions=tiny_questions(2), goldens=1)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text_config", {"model_type": "t5"}, "text_config model_type is 't5', expected 'opt'"),
        ("text_config", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
        ("text_config", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("text_config", {"word_embed_proj_dim": 512}, "word_embed_proj_dim is 512"),
        ("qformer_config", {"use_qformer_text_input": True}, "use_qformer_text_input is True"),
        ("", {"image_token_index": None}, "no image_token_index"),
    ],
)
def test_another_architecture_is_refused(
    source: Path, part: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    (config[part] if part else config).update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=message) as error:
        open_source(str(tmp_path / "source"))
    assert "\n" not in str(error.value)


def test_two_pictures_are_refused(loaded: Loaded) -> None:
    """transformers would leave the second one out in silence."""
    with pytest.raises(CalibrationError, match="2 images, this model takes 1"):
        build_sample(loaded.processor, [picture(0), picture(1)], "Both?", "", IMAGE_TOKEN)


def test_a_processor_without_query_tokens_is_refused(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    path = tmp_path / "source" / "processor_config.json"
    settings = json.loads(path.read_text())
    del settings["num_query_tokens"]
    path.write_text(json.dumps(settings))
    processor = load(open_source(str(tmp_path / "source"))).processor
    with pytest.raises(CalibrationError, match="writes no image token"):
        build_sample(processor, [picture(0)], "What?", "", IMAGE_TOKEN)
