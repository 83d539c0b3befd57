"""Proves that the core sees Qwen-VL as its model computes it: a stream run layer by layer equals the model's
own forward (deepstack's additions, mergers side by side), nothing of the last prompt is left, every patch projection
is the linear that is quantized, and methods that look at activations beat rounding.

Run: python -m pytest tests/core/test_qwen.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_qwen import FAMILIES, IMAGE_TOKEN, tiny_questions, write_tiny_source

from qvlm import embedding
from qvlm.capture import Sample, build_sample, capture_inputs, capture_stream
from qvlm.evaluate import answers, divergence, load_quantized
from qvlm.generate import decode, with_own_answer
from qvlm.models import ADAPTERS
from qvlm.quantize import quantize
from qvlm.recipe import COMPONENTS, RECIPES
from qvlm.source import Loaded, load, open_source

Made = tuple[Path, Loaded, list[Sample]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """family -> its directory, model, and three samples with one, two and three pictures."""
    known: dict[str, Made] = {}

    def make(family: str) -> Made:
        if family not in known:
            path = write_tiny_source(tmp_path_factory.mktemp(family) / "source", family)
            loaded = load(open_source(str(path)))
            samples = [
                build_sample(
                    loaded.processor, q.open_images(), q.prompt, q.answer or "", IMAGE_TOKEN
                )
                for q in tiny_questions(3)
            ]
            known[family] = path, loaded, samples
        return known[family]

    return make


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_run_layer_by_layer_equals_the_model(
    made: Callable[[str], Made], family: str, component: str
) -> None:
    _, loaded, samples = made(family)
    model: Any = loaded.model
    stream = capture_stream(model, ADAPTERS[family], component, samples)
    seen: list[torch.Tensor] = []
    hook = stream.layers[-1].register_forward_hook(lambda _, args, output: seen.append(output))
    for sample in samples:
        model(**sample.model_inputs())
    hook.remove()
    assert len(seen) == len(samples)
    hidden = stream.inputs
    for index in range(len(stream.layers)):
        hidden = stream.entering(index, hidden)
        hidden = [stream.forward(index, h, i) for i, h in enumerate(hidden)]
    for found, expected in zip(hidden, seen, strict=True):
        # Exact but for deepstack: an addition is told from two roundings, 2^-24 each.
        assert float((found - expected).abs().max()) <= 2.0**-20 * float(expected.abs().max())


def test_deepstack_is_seen(made: Callable[[str], Made]) -> None:
    """Two of three vision layers have a merger, so two text layers are entered by more than a layer left."""
    _, loaded, samples = made("qwen3_vl")
    text = capture_stream(loaded.model, ADAPTERS["qwen3_vl"], "text", samples)
    for added, mask in zip(text.additions, text.image_masks, strict=True):
        assert sorted(added) == [1, 2]
        assert all(
            bool((one[~mask] == 0).all()) and bool(one[mask].any()) for one in added.values()
        )
    mergers = capture_stream(loaded.model, ADAPTERS["qwen3_vl"], "projector", samples)
    assert len(mergers.layers) == 3
    for index, layer in enumerate(mergers.layers):
        again = capture_inputs(loaded.model, layer, samples)
        assert all(map(torch.equal, mergers.entries[index], again))


def test_nothing_of_the_last_prompt_is_left(made: Callable[[str], Made]) -> None:
    """The model keeps how far positions lag behind; a prompt without pictures must not inherit it."""
    _, loaded, samples = made("qwen2_5_vl")
    text = build_sample(loaded.processor, [], "Hello there?", "", IMAGE_TOKEN)
    first = decode(loaded.model, text.model_inputs(), 6, keep_logits=True).logits
    decode(loaded.model, samples[2].model_inputs(), 2)
    again = decode(loaded.model, text.model_inputs(), 6, keep_logits=True).logits
    assert first is not None and again is not None
    assert torch.equal(first, again)


def test_a_patch_projection_reads_rows(made: Callable[[str], Made]) -> None:
    _, loaded, samples = made("qwen3_vl")
    module: Any = loaded.model.get_submodule("model.visual.patch_embed.proj")
    rows = embedding.patches(module, samples[1])
    expected = loaded.model.get_submodule("model.visual.patch_embed")(samples[1].pixel_values)
    found = rows @ module.weight.flatten(1).T + module.bias
    # Sums of 96 products in another order.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_methods_beat_rounding(made: Callable[[str], Made], tmp_path: Path) -> None:
    path, loaded, _ = made("qwen3_vl")
    questions = tiny_questions(4)
    assert len(answers(loaded, questions).texts) == len(questions)
    found = {}
    for method in ("rtn", "gptq", "q-vlm"):
        recipe = replace(RECIPES["w4a16"], method=method)
        out = quantize(str(path), tmp_path / method, recipe, questions=questions, goldens=1)
        found[method] = divergence(loaded, load_quantized(out), questions).kl
    assert found["gptq"] < found["rtn"] / 2 and found["q-vlm"] < found["rtn"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_without_an_answer_gets_the_models_own(
    made: Callable[[str], Made], family: str
) -> None:
    """A folder of pictures has no answers; what the model is told of each token must grow with them."""
    _, loaded, samples = made(family)
    prompt = samples[1]
    length = int((~prompt.answer_mask).sum())
    kinds = {"mm_token_type_ids": prompt.others["mm_token_type_ids"][:, :length]}
    bare = replace(
        prompt,
        input_ids=prompt.input_ids[:, :length],
        image_mask=prompt.image_mask[:length],
        answer_mask=prompt.answer_mask[:length],
        others={**prompt.others, **kinds},
    )
    sample = with_own_answer(loaded.model, bare, 5)
    whole = loaded.model(**sample.model_inputs()).logits[0, length - 1 : -1]
    steps = decode(loaded.model, bare.model_inputs(), 5, keep_logits=True)
    assert torch.equal(sample.input_ids[0, length:], steps.tokens[0])
    assert steps.logits is not None
    torch.testing.assert_close(whole, steps.logits[0], rtol=1e-4, atol=1e-4)
