"""Proves that the shipped demo is what SOURCES.md and card.json say: hashes, size, a stock Hugging Face model,
outlier channels moved in exactly, and its accuracy in float and rounded.

Run: python -m pytest tests/calib_data/test_demo.py            (add -m slow for the accuracy test)
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import qvlm_calib_data

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HERE = Path(qvlm_calib_data.__file__).parent
CARD = json.loads((HERE / "demo" / "card.json").read_text(encoding="utf-8"))
MIB = 1 << 20


def maker(name: str) -> ModuleType:
    """A module of the demo's recipe, which lies beside the package and is not installed."""
    if str(HERE.parent) not in sys.path:
        sys.path.insert(0, str(HERE.parent))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def processor() -> object:
    return transformers.AutoProcessor.from_pretrained(qvlm_calib_data.demo_model())


def shipped_model() -> object:
    auto = transformers.AutoModelForImageTextToText
    return auto.from_pretrained(qvlm_calib_data.demo_model(), dtype=torch.float32).eval()


def moves() -> list[object]:
    move = maker("demo_reparam").Move
    listed = CARD["reparametrisation"]["moves"]
    return [move(m["place"], tuple(m["channels"]), m["log2"]) for m in listed]


def test_sources_lists_every_file_with_its_hash() -> None:
    text = (HERE / "SOURCES.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", text, re.M))
    files = {p.relative_to(HERE).as_posix(): p for p in maker("demo_write").shipped(HERE)}
    assert listed.keys() == files.keys()
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == listed[name], name
    assert "Apache-2.0" in text


def test_package_is_small() -> None:
    total = sum(p.stat().st_size for p in HERE.rglob("*") if "__pycache__" not in p.parts)
    assert total <= 32 * MIB


def test_recipe_writes_the_shipped_tokenizer() -> None:
    built = maker("demo_model").build_tokenizer()
    fields = json.loads((HERE / "demo" / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(built.backend_tokenizer.to_str())["model"] == fields["model"]


def test_stock_transformers_answers_the_showcase(processor: object) -> None:
    model = shipped_model()
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert sum(p.numel() for p in model.parameters()) == CARD["parameters"]
    case = maker("demo_eval")
    question = maker("qvlm_calib_data.scenes").Question
    shown = qvlm_calib_data.showcase()
    asked = [(s.image, question(s.task, s.prompt, s.answer)) for s in shown]
    right = [
        a == s.answer for a, s in zip(case.answers(model, processor, asked), shown, strict=True)
    ]
    assert sum(right) >= len(shown) - 1


def test_moved_factors_leave_every_bit_of_a_random_model() -> None:
    """Tolerance 0: powers of two scale every product exactly, so every sum rounds as before."""
    reparam, recipe, cases = maker("demo_reparam"), maker("demo_model"), maker("demo_eval").cases
    tokenizer = recipe.build_tokenizer()
    processor = recipe.build_processor(tokenizer)
    model = recipe.build_model(tokenizer, seed=1, layers=2, hidden=128).eval()
    inputs = maker("demo_eval").batch_inputs(processor, cases("tuning", 4))
    dial = reparam.Dial(4, 4, 4, 3, 4, 3)
    with torch.no_grad():
        before = model(**inputs).logits
        chosen = reparam.choose(model, reparam.profile(model, processor, cases("tuning", 8)), dial)
        assert {m.place.rsplit(".", 1)[1] for m in chosen} == {
            "input_layernorm",
            "post_attention_layernorm",
            "v_proj",
            "up_proj",
            "layer_norm1",
            "layer_norm2",
        }
        weights = {n: p.clone() for n, p in model.named_parameters()}
        reparam.apply(model, chosen)
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, weights[n])]
        after = model(**inputs).logits
        reparam.apply(model, chosen, -1)
        undone = dict(model.named_parameters())
    assert torch.equal(before, after)
    # Two layers each: 9 tensors of a decoder layer, 6 of a vision layer (its biases are 0 here).
    assert len(changed) == 2 * 9 + 2 * 6
    assert all(torch.equal(undone[n], w) for n, w in weights.items())


def test_shipped_weights_are_an_exact_reparametrisation_of_a_float16_model(
    processor: object,
) -> None:
    model = shipped_model()
    inputs = maker("demo_eval").batch_inputs(processor, maker("demo_eval").cases("tuning", 8))
    with torch.no_grad():
        after = model(**inputs).logits
        maker("demo_reparam").apply(model, moves(), -1)
        before = model(**inputs).logits
    assert torch.equal(before, after)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weight.half().float()), name


def test_image_tokens_have_outlier_channels_at_the_linears(processor: object) -> None:
    """The raised channels of image tokens are at least 4 times the image tokens' median channel."""
    model = shipped_model()
    reparam = maker("demo_reparam")
    inputs = maker("demo_eval").batch_inputs(processor, maker("demo_eval").cases("tuning", 16))
    is_image = inputs["input_ids"] == model.config.image_token_id
    is_text = (inputs["attention_mask"] == 1) & ~is_image
    sizes: dict[str, tuple[object, object]] = {}

    def watch(place: str) -> object:
        def hook(module: object, args: object, output: object) -> None:
            sizes[place] = (output[is_image].abs().mean(0), output[is_text].abs().mean(0))

        return hook

    raised = {m.place: m for m in moves() if m.place.endswith("layernorm") and m.log2 > 0}
    for place in raised:
        model.get_submodule(place).register_forward_hook(watch(place))
    with torch.no_grad():
        model(**inputs)
    assert set(raised) == {p for p, kind in reparam.places(model).items() if kind == "norm"}
    for place, move in raised.items():
        image, text = sizes[place]
        channels = list(move.channels)
        assert image[channels].mean() >= 4 * image.median(), place
        assert image.norm() >= 1.1 * text.norm(), place


@pytest.mark.slow
def test_accuracy_is_what_the_card_says(processor: object) -> None:
    """On 1,000 held-out questions: 95 percent in float, W3 rounding loses 3 points, W4 little."""
    write = maker("demo_write")
    found = write.measure(shipped_model(), processor, "evaluation", 1000)
    score = {name: tasks["all"] for name, tasks in found.items()}
    assert score["float"] >= 95.0
    assert score["float"] - score["w3_rtn_g128"] >= 3.0
    assert score["float"] - score["w4_rtn_g128"] <= 2.0
