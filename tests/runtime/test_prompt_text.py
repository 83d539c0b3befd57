"""Proves that the families' chats become the token ids that transformers' processors make of them: ten
conversations each, several images, system and later turns, and the chat template's own text:
python -m pytest tests/runtime/test_prompt_text.py
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runtime_support import FakeSession, model_spec, target_spec
from tiny_processors import BLIP, FAMILIES, Family, image_text, write_tokenizer

from qvlm_runtime import Model, PromptError
from qvlm_runtime.chat import ChatTemplate
from qvlm_runtime.decoder import Decoder
from qvlm_runtime.image_spec import WholeImage
from qvlm_runtime.manifest import Manifest
from qvlm_runtime.tokenizer import Tokenizer

SIZES = ((40, 40), (97, 31), (20, 120), (64, 90), (5, 6))
IMAGES = [
    Image.fromarray(np.random.default_rng(h).integers(0, 256, (h, w, 3), np.uint8))
    for h, w in SIZES
]


def say(role: str, text: str, *images: int) -> dict[str, Any]:
    shown = [{"type": "image", "image": IMAGES[i]} for i in images]
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


SYSTEM = say("system", "Be brief.\n\nBe kind.")
CONVERSATIONS = [
    [say("user", "What is it?", 0)],
    [say("user", "What is it?", 1)],
    [say("user", "No image.")],
    [SYSTEM, say("user", "Größer?", 2)],
    [say("user", "Compare.", 0, 3)],
    [SYSTEM, say("user", "Three.", 4, 2, 1)],
    [say("user", "One.", 3), say("assistant", "A door.\n"), say("user", "And this?", 4)],
    [say("user", "a"), say("assistant", "b"), say("user", "c", 1), say("assistant", "d")],
    [SYSTEM, say("user", "x", 0, 1), say("assistant", "y"), say("user", "z", 2, 3)],
    [say("user", "\n\n", 2), say("assistant", " "), say("user", "<b> & {x} 日本")],
]


def model_of(family: Family, folder: Path) -> Model:
    write_tokenizer(folder / "tokenizer.json", family)
    (folder / "chat_template.jinja").write_text(family.template, encoding="utf-8")
    tokens = {"bos_token": "<s>"} if family.bos else {}
    spec = model_spec(
        image_token=family.image_token,
        image_token_id=1,
        marker=family.marker,
        max_context=100_000,
        template_tokens=tokens,
    )
    target, session, vision = target_spec("scatter"), FakeSession((), spec), FakeSession((), spec)
    return Model(
        Manifest("0", spec, family.image, {"ort": target}, {}, {}),
        "ort",
        Tokenizer(folder / "tokenizer.json"),
        ChatTemplate(folder / "chat_template.jinja", tokens),
        vision,  # type: ignore[arg-type]
        Decoder(session, spec, target),  # type: ignore[arg-type]
    )


def of_transformers(family: Family, folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<s>",
        additional_special_tokens=[family.image_token, *family.specials],
    )


def rendered(family: Family, messages: list[dict[str, Any]]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        conversations=[messages],
        chat_template=family.template,
        add_generation_prompt=True,
        bos_token="<s>",
    )
    return str(texts[0])


def images_of(messages: list[dict[str, Any]]) -> list[Image.Image]:
    parts = [part for message in messages for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


@pytest.mark.parametrize("name", FAMILIES)
def test_token_ids_are_the_processors(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model, tokenizer = model_of(family, tmp_path), of_transformers(family, tmp_path)
    runs = set()
    for messages in CONVERSATIONS:
        text = rendered(family, messages)
        pieces = text.split(family.image_token)
        texts = [image_text(family, image) for image in images_of(messages)]
        runs |= {len(one) for one in texts}
        whole = "".join(a + b for a, b in zip(pieces, [*texts, ""], strict=True))
        expected = tokenizer(whole, add_special_tokens=not text.startswith("<s>"))["input_ids"]
        prompt = model.prepare(messages)
        assert prompt.text == text
        assert list(prompt.token_ids) == expected
        marked = [row for row in prompt.image_index if row >= 0]
        assert marked == list(range(len(marked)))
        assert len(marked) == sum(picture.layout.rows for picture in prompt.pictures)
        assert model.count_tokens(messages) == len(expected)
    # Images of these sizes take different numbers of tokens, but for one tile of one size.
    assert len(runs) == 1 if isinstance(family.image, WholeImage) else len(runs) > 2


def test_query_tokens_stand_before_the_first_token(tmp_path: Path) -> None:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.blip_2.processing_blip_2 import Blip2Processor

    model, tokenizer = model_of(BLIP, tmp_path), of_transformers(BLIP, tmp_path)
    pixels = BlipImageProcessorPil(size={"height": 16, "width": 16})
    processor = Blip2Processor(pixels, tokenizer, num_query_tokens=5)
    for messages in CONVERSATIONS:
        images = images_of(messages)
        text = rendered(BLIP, messages).replace("<image>", "")
        # transformers' processor puts one image's tokens there, however many images there are.
        expected = processor(images=images[:1] or None, text=text)["input_ids"][0]
        more = max(0, len(images) - 1)
        assert list(model.prepare(messages).token_ids) == [1] * (5 * more) + expected


def test_blips_own_template_gives_the_processors_token_ids(tmp_path: Path) -> None:
    """The template that the core gives BLIP-2 writes no markers; one picture stands in front, more are refused."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.blip_2.processing_blip_2 import Blip2Processor

    from qvlm.models import ADAPTERS

    adapter = ADAPTERS["blip-2"]
    blip = dataclasses.replace(BLIP, template=adapter.chat_template)
    made = model_of(blip, tmp_path)
    spec = dataclasses.replace(made.manifest.model, images=adapter.images)
    model = dataclasses.replace(made, manifest=dataclasses.replace(made.manifest, model=spec))
    pixels = BlipImageProcessorPil(size={"height": 16, "width": 16})
    processor = Blip2Processor(pixels, of_transformers(blip, tmp_path), num_query_tokens=5)
    refused = 0
    for messages in CONVERSATIONS:
        if len(images_of(messages)) > 1:
            refused += 1
            with pytest.raises(PromptError, match=r"images, this model takes 1\. Ask"):
                model.prepare(messages)
            messages = first_image_only(messages)
        text = rendered(blip, messages)
        expected = processor(images=images_of(messages) or None, text=text)["input_ids"][0]
        prompt = model.prepare(messages)
        assert prompt.text == text and "Question: " in text
        assert list(prompt.token_ids) == expected
        assert model.count_tokens(messages) == len(expected)
    assert refused == 4


def first_image_only(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation without its second picture and later ones."""
    seen: list[Any] = []
    found = []
    for message in messages:
        parts = [
            p
            for p in message["content"]
            if p["type"] == "text" or (not seen and not seen.append(p))
        ]
        found.append({**message, "content": parts})
    return found


def test_an_image_token_that_is_no_token_is_told(tmp_path: Path) -> None:
    model = model_of(FAMILIES["internvl"], tmp_path)
    spec = dataclasses.replace(model.manifest.model, image_token_id=999)
    manifest = dataclasses.replace(model.manifest, model=spec)
    with pytest.raises(PromptError, match="1 in the prompt became 0 image tokens"):
        dataclasses.replace(model, manifest=manifest).prepare("What?", [IMAGES[0]])
