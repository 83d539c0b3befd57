"""Families' prompts for tests: a byte tokenizer with their special tokens, their chat templates, their image
settings at a tiny size, and transformers' own text for each image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image
from runtime_support import _byte_letters

from qvlm_runtime.image_spec import (
    AnyresImage,
    CanvasImage,
    ImageSpec,
    PatchImage,
    PixelSpec,
    SplitImage,
    WholeImage,
)
from qvlm_runtime.manifest import MarkerSpec

PIXELS = PixelSpec(3, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

QWEN = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Those of the hub, without tools and videos.
IDEFICS3 = SMOLVLM.replace("<|im_start|>", "<|begin_of_text|>")
QWEN3 = (  # no system turn that nobody wrote
    "{% if messages[0]['role'] == 'system' %}<|im_start|>system\n"
    "{% for content in messages[0]['content'] %}{% if 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTERNVL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# BLIP-2 has none; this one writes markers, which its processor would not, for they vanish in any case.
BLIP2 = (
    "{% for message in messages %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content['text'] }}{% else %}{{ ' Question: ' + content['text'] + ' Answer:' }}"
    "{% endif %}{% endfor %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """processor: transformers' processor class; inputs(image): what its replace_image_token is called
    with, besides the attributes ``settings`` of the processor.
    """

    image: ImageSpec
    marker: MarkerSpec
    image_token: str
    template: str
    specials: tuple[str, ...]
    processor: str
    settings: Mapping[str, Any]
    inputs: Callable[[Image.Image], Any]
    bos: bool = False


def _qwen(image: Image.Image, patch: int) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    area = (2 * patch) ** 2
    size = {"shortest_edge": 4 * area, "longest_edge": 20 * area}
    return Qwen2VLImageProcessorPil(size=size, patch_size=patch)(image, return_tensors="np")


def _whole(image: Image.Image) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": 32, "width": 32}
    return CLIPImageProcessorPil(size=size, crop_size=size)(image, return_tensors="np")


def _idefics(image: Image.Image) -> Any:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    options = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
    return SmolVLMImageProcessorPil(**options, return_row_col_info=True)(image, return_tensors="np")


def _internvl(image: Image.Image) -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    size = {"height": 28, "width": 28}
    processor = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=6)
    return processor(image, return_tensors="np")


def _anyres(image: Image.Image) -> Any:
    import numpy as np

    pixels = np.zeros((1, 2, 3, 32, 32))
    return {"image_sizes": [(image.height, image.width)], "pixel_values": pixels,
            "batch_num_images": [1]}  # fmt: skip


GRID = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))
_PINPOINTS = SimpleNamespace(image_grid_pinpoints=[list(one) for one in GRID])
_CHATML = ("<|im_start|>", "<|im_end|>")
_PLACES = [f"<row_{i}_col_{j}>" for i in (1, 2, 3) for j in (1, 2)]  # those of column 3 are text
_TILE = "<fake_token_around_image><row_{line}_col_{column}>{image}"
_GLOBAL = "<fake_token_around_image><global-img>{image}<fake_token_around_image>"


def _qwen_family(name: str, processor: str, patch: int = 14, template: str = QWEN) -> Family:
    area = (2 * patch) ** 2
    return Family(
        PatchImage(PIXELS, patch, 2, 2, 4 * area, 20 * area),
        MarkerSpec(),
        "<|image_pad|>",
        template,
        (*_CHATML, "<|vision_start|>", "<|vision_end|>"),
        f"{name}.processing_{name}.{processor}",
        {"image_processor": SimpleNamespace(merge_size=2)},
        lambda image: _qwen(image, patch),
    )


def _split_family(name: str, processor: str, template: str, first: str) -> Family:
    return Family(
        SplitImage(PIXELS, 4, 32, 96),
        MarkerSpec(_GLOBAL, _TILE, "\n", f"\n{_GLOBAL}"),
        "<image>",
        template,
        (first, "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", *_PLACES),
        f"{name}.processing_{name}.{processor}",
        {
            "image_seq_len": 4,
            "fake_image_token": "<fake_token_around_image>",
            "global_image_tag": "<global-img>",
            "global_image_token": "<global-img>",
        },
        _idefics,
    )


FAMILIES: dict[str, Family] = {
    "qwen2_vl": _qwen_family("qwen2_vl", "Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen_family("qwen2_5_vl", "Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen_family("qwen3_vl", "Qwen3VLProcessor", 16, QWEN3),
    "smolvlm": _split_family("smolvlm", "SmolVLMProcessor", SMOLVLM, "<|im_start|>"),
    "idefics3": _split_family("idefics3", "Idefics3Processor", IDEFICS3, "<|begin_of_text|>"),
    "llava": Family(
        WholeImage(PIXELS, 16, ("exact", 32, 32), None),
        MarkerSpec(),
        "<image>",
        LLAVA,
        (),
        "llava.processing_llava.LlavaProcessor",
        {
            "patch_size": 8,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
        _whole,
        bos=True,
    ),
    "internvl": Family(
        CanvasImage(PIXELS, 3, (28, 28), 1, 6),
        MarkerSpec("<img>{image}</img>"),
        "<IMG_CONTEXT>",
        INTERNVL,
        (*_CHATML, "<img>", "</img>"),
        "internvl.processing_internvl.InternVLProcessor",
        {"image_seq_length": 3, "start_image_token": "<img>", "end_image_token": "</img>"},
        _internvl,
    ),
    "llava_next": Family(
        AnyresImage(PIXELS, 32, 4, GRID),
        MarkerSpec(),
        "<image>",
        LLAVA,
        (),
        "llava_next.processing_llava_next.LlavaNextProcessor",
        {
            "image_processor": _PINPOINTS,
            "patch_size": 8,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
        _anyres,
        bos=True,
    ),
    "llava_onevision": Family(
        AnyresImage(PIXELS, 32, 4, GRID),
        MarkerSpec(),
        "<image>",
        LLAVA,
        _CHATML,
        "llava_onevision.processing_llava_onevision.LlavaOnevisionProcessor",
        {
            "image_processor": _PINPOINTS,
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
        _anyres,
    ),
}
BLIP = Family(
    WholeImage(PIXELS, 5, ("exact", 16, 16), None),
    MarkerSpec(leading=True),
    "<image>",
    BLIP2,
    (),
    "blip_2.processing_blip_2.Blip2Processor",
    {"num_query_tokens": 5},
    lambda image: None,
    bos=True,
)


def write_tokenizer(path: Path, family: Family) -> None:
    """Bytes; two line ends are one token; "<s>" in front where the family has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    specials = ["<s>", family.image_token, *family.specials]
    letters = _byte_letters()
    end = letters[ord("\n")]
    names = [*letters.values(), end * 2]
    vocab = {name: i for i, name in enumerate([*specials, *names])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(end, end)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    if family.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer.save(str(path))


def image_text(family: Family, image: Image.Image) -> str:
    """What transformers' processor writes for one image."""
    import importlib

    module, _, name = family.processor.rpartition(".")
    cls = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    processor = cls.__new__(cls)  # its constructor wants a tokenizer, and torchvision for video
    processor.__dict__.update(family.settings, image_token=family.image_token)
    return str(processor.replace_image_token(family.inputs(image), 0))
