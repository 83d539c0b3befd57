"""Tiny random BLIP-2 directories (weights, tokenizer, processor) with uneven sizes. For tests only.

Sizes are chosen to catch swapped dimensions: widths 96, 160 and 384, 3, 5 and 6 heads, 10 rows of the tower that 5
queries ask, three Q-Former layers of which the first and the last read the tower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2Processor,
    BlipImageProcessorPil,
    PreTrainedTokenizerFast,
)

from qvlm.data import Question

SPECIALS = ("<pad>", "<unk>", "</s>", "<image>")
IMAGE_TOKEN = SPECIALS.index("<image>")
QUERIES = 5
SIDE = 24


def tiny_config(**changes: Any) -> Blip2Config:
    """``changes`` go to the config, ``text__*``, ``vision__*`` and ``qformer__*`` to its parts."""
    parts: dict[str, dict[str, Any]] = {
        "vision": {
            "hidden_size": 96,
            "intermediate_size": 200,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": SIDE,
            "patch_size": 8,
            "initializer_range": 0.02,
        },
        "qformer": {
            "hidden_size": 160,
            "intermediate_size": 224,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
        },
        "text": {
            "model_type": "opt",
            "hidden_size": 384,
            "word_embed_proj_dim": 384,
            "ffn_dim": 640,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "vocab_size": 333,
            "max_position_embeddings": 160,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "": {"num_query_tokens": QUERIES, "image_token_index": IMAGE_TOKEN},
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        parts[part if name else ""][name or key] = value
    return Blip2Config(
        vision_config=parts["vision"],
        qformer_config=parts["qformer"],
        text_config=parts["text"],
        **parts[""],
    )


def tiny_blip(seed: int = 0, **changes: Any) -> Any:
    """A model of about three million parameters."""
    torch.manual_seed(seed)
    auto: Any = AutoModelForImageTextToText
    model = auto.from_config(tiny_config(**changes), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Spread the norms and biases too: ones and zeros would hide a missing or swapped vector.
            if parameter.ndim in (1, 3):
                parameter += 0.2 * torch.randn_like(parameter)
            else:  # a tied embedding that is large would make the model repeat its last token
                parameter *= 2 if "embed_tokens" in name else 4
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, "</s>" in front as OPT's has it."""
    vocabulary = {
        t: i for i, t in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    core.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", SPECIALS.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def write_tiny_source(directory: Path, **changes: Any) -> Path:
    """Save ``tiny_blip`` with its processor as on the hub: no chat template."""
    tiny_blip(**changes).save_pretrained(directory)
    pictures = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    Blip2Processor(pictures, tiny_tokenizer(), num_query_tokens=QUERIES).save_pretrained(directory)
    return directory


def picture(seed: int, width: int = 31, height: int = 22) -> Image.Image:
    """Noise of an uneven size, so that resizing happens."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tiny_questions(count: int = 4) -> list[Question]:
    """Questions of different lengths about pictures of different shapes; every third has no answer, the fifth no
    picture.
    """
    return [
        Question(
            () if i == 4 else (picture(i, 20 + 9 * i),),
            "What" + " is" * i + "?",
            None if i % 3 == 2 else f"cat {i}",
            "ab"[i % 2],
        )
        for i in range(count)
    ]
