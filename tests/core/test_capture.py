"""Proves that capture sees what the model computes: a stream run layer by layer equals the model's own forward, masks
and dead layers are right, and a sample's tokens are the chat template's.

Run: python -m pytest tests/core/test_capture.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import IMAGE_TOKEN, tiny_llava
from tiny_source import picture, tiny_processor

from qvlm.capture import (
    Sample,
    build_sample,
    capture_inputs,
    capture_stream,
    linear_inputs,
    linears_entered,
)
from qvlm.errors import CalibrationError, CheckpointError
from qvlm.models import ADAPTERS
from qvlm.recipe import COMPONENTS
from qvlm.source import Loaded, load, open_source

ADAPTER = ADAPTERS["llava"]


@pytest.fixture(scope="module")
def loaded(tiny_source: Path) -> Iterator[Loaded]:
    yield load(open_source(str(tiny_source)))


@pytest.fixture(scope="module")
def samples(loaded: Loaded) -> list[Sample]:
    two = [picture(0), picture(1)]
    return [
        build_sample(loaded.processor, two[:1], "What is it?", "a cat", IMAGE_TOKEN),
        build_sample(loaded.processor, [], "Hello?", "no", IMAGE_TOKEN),
        build_sample(loaded.processor, two, "Both?", "", IMAGE_TOKEN),
    ]


def test_a_sample_is_what_the_template_says(samples: list[Sample]) -> None:
    tokenizer = tiny_processor().tokenizer
    one = samples[0]
    text = tokenizer.decode(one.input_ids[0])
    assert text == "<s>U: " + "<image>" * 9 + "What is it? A: a cat</s>"
    assert tokenizer.decode(one.input_ids[0][one.answer_mask]) == " a cat</s>"
    assert int(one.image_mask.sum()) == 9
    assert torch.equal(one.image_mask, one.input_ids[0] == IMAGE_TOKEN)
    assert samples[1].pixel_values is None
    assert samples[2].pixel_values is not None and samples[2].pixel_values.shape == (2, 3, 24, 24)
    assert not samples[2].answer_mask.any()


@pytest.mark.parametrize("texts", [("What <image>?", "cat"), ("What?", "a <image>")])
def test_the_image_token_in_a_text_is_refused(loaded: Loaded, texts: tuple[str, str]) -> None:
    with pytest.raises(CalibrationError, match="holds '<image>', which stands for pictures"):
        build_sample(loaded.processor, [picture(0)], *texts, IMAGE_TOKEN)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_stream_run_layer_by_layer_equals_the_model(
    loaded: Loaded, samples: list[Sample], component: str
) -> None:
    model = loaded.model
    stream = capture_stream(model, ADAPTER, component, samples)
    assert stream.samples == ((0, 2) if component in ("vision", "projector") else (0, 1, 2))
    outputs: list[torch.Tensor] = []
    last = stream.layers[-1]
    hook = last.register_forward_hook(
        lambda m, a, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    for number in stream.samples:
        with torch.no_grad():
            model(**samples[number].model_inputs())
    hook.remove()
    for i, expected in enumerate(outputs):
        hidden = stream.inputs[i]
        with torch.no_grad():
            for layer in range(len(stream.layers)):
                hidden = stream.forward(layer, hidden, i)
        assert torch.equal(hidden, expected)
        assert stream.image_masks[i].shape == stream.inputs[i].shape[:-1]
    if component == "text":
        assert [int(mask.sum()) for mask in stream.image_masks] == [9, 0, 18]


def test_inputs_alone_equal_the_streams(loaded: Loaded, samples: list[Sample]) -> None:
    stream = capture_stream(loaded.model, ADAPTER, "text", samples)
    again = capture_inputs(loaded.model, stream.layers[0], samples)
    assert all(torch.equal(a, b) for a, b in zip(stream.inputs, again, strict=True))


def test_linear_inputs_are_what_each_linear_sees(loaded: Loaded, samples: list[Sample]) -> None:
    stream = capture_stream(loaded.model, ADAPTER, "text", samples)
    linears = ADAPTER.linears(loaded.model, "text")
    layer = {n: m for n, m in linears.items() if n.startswith(stream.names[1] + ".")}
    seen, output = linear_inputs(stream, 1, layer, stream.inputs[0], 0)
    assert seen.keys() == layer.keys()
    names = {name.rpartition(".")[2]: x for name, x in seen.items()}
    assert torch.equal(names["q_proj"], names["v_proj"])
    assert torch.equal(names["gate_proj"], names["up_proj"])
    assert names["o_proj"].shape == (1, stream.inputs[0].shape[1], 384)
    assert names["down_proj"].shape[-1] == 640
    with torch.no_grad():
        assert torch.equal(output, stream.forward(1, stream.inputs[0], 0))
    entered = linears_entered(stream, 1, layer, stream.inputs[0], 0)
    torch.testing.assert_close(entered, seen, rtol=0, atol=0)


def test_a_layer_stops_behind_the_last_linear_that_is_asked_for(
    loaded: Loaded, samples: list[Sample]
) -> None:
    stream = capture_stream(loaded.model, ADAPTER, "text", samples)
    calls = []
    later = stream.layers[0].get_submodule("mlp")
    hook = later.register_forward_pre_hook(lambda *_: calls.append(1))
    query = {"q": stream.layers[0].get_submodule("self_attn.q_proj")}
    seen = linears_entered(stream, 0, query, stream.inputs[0], 0)
    assert not calls and seen.keys() == {"q"}
    complete, _ = linear_inputs(stream, 0, query, stream.inputs[0], 0)
    hook.remove()
    assert calls
    torch.testing.assert_close(seen, complete, rtol=0, atol=0)


def test_hooks_are_gone_afterwards(loaded: Loaded, samples: list[Sample]) -> None:
    capture_stream(loaded.model, ADAPTER, "vision", samples)
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


@pytest.mark.parametrize(("layer", "live"), [(-1, 3), (-2, 2), (1, 1), ([-3, -2], 2), ([0, -1], 3)])
def test_vision_layers_behind_the_feature_layer_are_dead(layer: object, live: int) -> None:
    model = tiny_llava(vision_feature_layer=layer)
    names = ADAPTER.layer_names(model, "vision")
    assert names == tuple(f"model.vision_tower.encoder.layers.{i}" for i in range(live))
    assert len(ADAPTER.linears(model, "vision")) == 6 * live


def test_adapter_finds_every_live_linear() -> None:
    model = tiny_llava()
    counts = {component: len(ADAPTER.linears(model, component)) for component in COMPONENTS}
    assert counts == {"vision": 12, "projector": 2, "text": 14, "head": 1}


def test_another_module_tree_is_one_clear_line() -> None:
    moved = replace(ADAPTER, vision_layers="model.vision_tower.vision_model.encoder.layers")
    with pytest.raises(
        CheckpointError, match=r"llava: this transformers builds no module .*vision_model"
    ):
        moved.layer_names(tiny_llava(), "vision")
