"""A whole tiny Hugging Face directory (weights, tokenizer, processor) and questions for it. For
tests only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_models import IMAGE_TOKEN, tiny_llava
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from qvlm.data import Question

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ 'U: ' if m['role'] == 'user' else 'A: ' }}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def tiny_processor() -> LlavaProcessor:
    """A token per byte; the image token has the id that ``tiny_llava`` expects."""
    specials = ["<pad>", "<s>", "</s>", *(f"<{i}>" for i in range(3, IMAGE_TOKEN)), "<image>"]
    vocabulary = {
        token: i
        for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": 24, "width": 24}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def write_tiny_source(directory: Path, **changes: Any) -> Path:
    """Save ``tiny_llava(**changes)`` with its processor as Hugging Face does."""
    tiny_llava(**changes).save_pretrained(directory)
    tiny_processor().save_pretrained(directory)
    return directory


def picture(seed: int) -> Image.Image:
    """Noise of an uneven size, so that resizing happens."""
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 26, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tiny_questions(count: int = 4) -> list[Question]:
    """Questions of different lengths, a third without an answer."""
    return [
        Question(
            (picture(i),), "What" + " is" * i + "?", None if i % 3 == 2 else f"cat {i}", "ab"[i % 2]
        )
        for i in range(count)
    ]
