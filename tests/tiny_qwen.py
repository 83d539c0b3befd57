"""Tiny random Qwen-VL directories (weights, tokenizer, processor) with uneven sizes. For tests only.

Sizes are chosen to catch swapped dimensions: 6 query and 2 key/value heads, rotary sections of three
lengths, 3 vision heads, windows of 2 x 2 merged patches that no picture's grid is a multiple of, and
only the second of three vision layers seeing the whole image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from qvlm.checkpoint import Golden
from qvlm.data import Question

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
IMAGE_TOKEN = SPECIALS.index("<|image_pad|>")
PATCH = 4
# Least and largest area of a picture: 16 to 60 patches.
PIXELS = (16 * PATCH**2, 60 * PATCH**2)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(family: str, **changes: Any) -> Any:
    """``changes`` go to the config, ``text_*`` and ``vision_*`` to its parts."""
    text: dict[str, Any] = {
        "hidden_size": 384,
        "intermediate_size": 640,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 333,
        "max_position_embeddings": 200,
        "rms_norm_eps": 3e-6,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000.0,
            "mrope_section": [6, 10, 16],
        },
    }
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_heads": 3,
        "patch_size": PATCH,
        "out_hidden_size": 384,
    }
    if family == "qwen2_vl":
        vision |= {"embed_dim": 96, "hidden_size": 384, "mlp_ratio": 2}
        del vision["out_hidden_size"], vision["intermediate_size"]
    elif family == "qwen2_5_vl":
        vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
    else:
        text["head_dim"] = 128
        text["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": [25, 20, 19]}
        vision |= {"num_position_embeddings": 49, "deepstack_visual_indexes": [0, 2]}
    rest: dict[str, Any] = {}
    for key, value in changes.items():
        part, _, name = key.partition("_")
        {"text": text, "vision": vision}.get(part, rest)[
            name if part in ("text", "vision") else key
        ] = value
    tokens = {
        f"{name}_token_id": SPECIALS.index(f"<|{text_}|>")
        for name, text_ in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    return AutoConfig.for_model(family, text_config=text, vision_config=vision, **tokens, **rest)


def tiny_qwen(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model of about two million parameters."""
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    model = AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Spread the norms and biases too: ones and zeros would hide a missing or swapped vector.
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            elif "embed_tokens" in name:
                parameter *= 20
            elif "pos_embed" in name:
                parameter *= 10
            else:
                parameter *= 2
    return model


def write_tiny_source(directory: Path, family: str, **changes: Any) -> Path:
    """Save ``tiny_qwen`` with its processor files as they are on the hub: no processor_config.json."""
    tiny_qwen(family, **changes).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    pictures = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        size=dict(zip(("shortest_edge", "longest_edge"), PIXELS, strict=True)),
    )
    pictures.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return directory


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte."""
    vocabulary = {
        token: i
        for i, token in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIALS),
    )


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Noise of ``size`` (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tiny_questions(count: int = 4) -> list[Question]:
    """Questions of different lengths, with one picture, two, or three, of four shapes."""
    shapes = ((23, 31), (40, 18), (25, 24), (16, 60))
    questions = []
    for i in range(count):
        pictures = tuple(picture(10 * i + k, shapes[(i + k) % 4]) for k in range(1 + i % 3))
        questions.append(Question(pictures, "What" + " is" * i + "?", f"cat {i}", "ab"[i % 2]))
    return questions


def grid_of(size: Sequence[int]) -> torch.Tensor:
    """Patches of a picture of ``size`` (height, width) as transformers counts them: [1, 3]."""
    height, width = smart_resize(*size, 2 * PATCH, *PIXELS)
    return torch.tensor([[1, height // PATCH, width // PATCH]])


def vision_feeds(golden: Golden, config: Mapping[str, Any], dtype: str) -> list[dict[str, Any]]:
    """The vision graph's inputs for each picture of a golden; what depends on the grid alone comes from
    transformers' own functions.
    """
    vision, start, feeds = config["vision_config"], 0, []
    for size in golden.inputs["image_sizes"].tolist():
        grid = grid_of(size)
        count = int(grid.prod())
        pixels = golden.inputs["pixel_values"][start : start + count].astype(dtype)
        start += count
        feed = {"pixel_values": pixels, "patch_positions": get_vision_position_ids(grid, 2).numpy()}
        if "window_size" in vision:
            order, edges = get_vision_window_index(grid, 2, vision["window_size"], PATCH)
            lengths = np.diff(edges.numpy())
            feed["window_index"] = order.numpy()
            feed["window_inverse"] = order.argsort().numpy()
            feed["window_segments"] = np.repeat(np.arange(len(lengths)), lengths)
        if "num_position_embeddings" in vision:
            index, weights = get_vision_interpolation_indices_and_weights(
                grid,
                int(vision["num_position_embeddings"] ** 0.5),
                align_corners=True,
                spatial_merge_size=2,
            )
            feed["position_index"] = np.ascontiguousarray(index.T.numpy())
            feed["position_weights"] = np.ascontiguousarray(weights.T.numpy()).astype(dtype)
        feeds.append(feed)
    return feeds
