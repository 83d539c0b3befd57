"""Tiny random Hugging Face models of the families that cut images into tiles, with uneven sizes, their float
checkpoints and torch's answers. For tests only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tiny_models import IMAGE_TOKEN
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from qvlm.checkpoint import CheckpointWriter
from qvlm.data import Question
from qvlm.recipe import RECIPES

Array = np.ndarray[Any, Any]
# 6 query heads in 2 groups, an odd vocabulary, norm and rope away from their defaults.
TEXT: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 389,
    "max_position_embeddings": 640,
    "rms_norm_eps": 3e-6,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
# 36 patches of 8 x 8 a tile: divided by a pixel shuffle of 2 and of 3.
VISION: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 48,
    "patch_size": 8,
}
PINPOINTS = [[48, 96], [96, 48], [96, 96], [48, 144], [144, 48]]
# family -> (config class, vision, text, rest)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "smolvlm": ("SmolVLMConfig", {}, {"model_type": "llama"}, {"image_token_id": IMAGE_TOKEN}),
    "idefics3": ("Idefics3Config", {}, {"model_type": "llama"}, {"image_token_id": IMAGE_TOKEN}),
    "internvl": (
        "InternVLConfig",
        {"image_size": [48, 48], "patch_size": [8, 8]},
        {"model_type": "qwen2"},
        {"image_token_id": IMAGE_TOKEN},
    ),
    "llava_next": (
        "LlavaNextConfig",
        {"model_type": "clip_vision_model"},
        {"model_type": "llama"},
        {"image_token_index": IMAGE_TOKEN, "image_grid_pinpoints": PINPOINTS},
    ),
    "llava_onevision": (
        "LlavaOnevisionConfig",
        {"model_type": "siglip_vision_model", "vision_use_head": False},
        {"model_type": "qwen2"},
        {"image_token_index": IMAGE_TOKEN, "image_grid_pinpoints": PINPOINTS},
    ),
}


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """About a million parameters; ``changes`` go to its config, ``text__*`` and ``vision__*`` to the parts."""
    config_class, vision, text, rest = FAMILIES[family]
    parts = {"vision": {**VISION, **vision}, "text": {**TEXT, **text}, "": dict(rest)}
    for key, value in changes.items():
        part, _, name = key.partition("__")
        parts[part if name else ""][name or key] = value
    config = getattr(transformers, config_class)(
        vision_config=parts["vision"], text_config=parts["text"], **parts[""]
    )
    torch.manual_seed(seed)
    auto: Any = transformers.AutoModelForImageTextToText
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Ones and zeros would hide a missing or swapped vector.
            if parameter.ndim != 2 and parameter.ndim != 4:
                parameter += 0.2 * torch.randn_like(parameter)
            elif "embed_tokens" in name:
                parameter *= 20
            else:
                parameter *= 2
    return model


def float_checkpoint(model: nn.Module, directory: Path) -> Path:
    """The checkpoint that ``qvlm quantize --recipe float`` writes of a model, without goldens."""
    writer = CheckpointWriter(directory)
    config: Any = model.config
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            writer.add(name, tensor.numpy())
    writer.close(config.to_dict(), RECIPES["float"], {}, {})
    tokens = [{"id": IMAGE_TOKEN, "content": "<image>", "special": True}]
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    return directory


@dataclass(frozen=True)
class Prompt:
    """ids int64 [S]; tiles float32 [N, 3, H, W] of all images in order; counts: tiles of each image; sizes [images,
    2]: height and width of each picture, for families that drop padding.
    """

    ids: list[int]
    tiles: torch.Tensor
    counts: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...] = ()


def prompt(model: Any, texts: Sequence[int], rows: Sequence[int], **rest: Any) -> Prompt:
    """Random text of ``texts[i]`` tokens, an image of ``rows[i]`` rows between each two."""
    generator = torch.Generator().manual_seed(sum(texts))
    vocabulary = model.config.get_text_config().vocab_size
    ids: list[int] = []
    for i, count in enumerate(texts):
        ids += torch.randint(8, vocabulary, (count,), generator=generator).tolist()
        if i < len(rows):
            ids += [IMAGE_TOKEN] * rows[i]
    size = VISION["image_size"]
    tiles = torch.randn(sum(rest["counts"]), 3, size, size, generator=generator)
    return Prompt(ids, tiles, **rest)


def model_inputs(family: str, p: Prompt) -> dict[str, Any]:
    """The image part of the model's forward, in the shape that the family's processor gives."""
    if family in ("smolvlm", "idefics3"):
        return {"pixel_values": p.tiles[None]}
    if not p.sizes:
        return {"pixel_values": p.tiles}
    most = max(p.counts)
    images = [
        torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
        for part in p.tiles.split(list(p.counts))
    ]
    return {"pixel_values": torch.stack(images), "image_sizes": torch.tensor(p.sizes)}


@dataclass(frozen=True)
class Answer:
    """image_features [M, H]; tokens [T] greedy; logits [T, V], row t after tokens[:t]."""

    image_features: Array
    tokens: list[int]
    logits: Array


def feature_index(model: Any, p: Prompt) -> list[Array]:
    """For each image the rows of its tiles, the newline row behind them, in the order that transformers packs them:
    its own function on features that are their own numbers.
    """
    side = VISION["image_size"] // VISION["patch_size"]
    parts = [
        torch.arange(n * side**2, dtype=torch.float64).reshape(n, side**2, 1) for n in p.counts
    ]
    found = []
    for part, size in zip(parts, p.sizes, strict=True):
        end = torch.tensor([float(part.numel())], dtype=torch.float64)
        strategy = (
            {}
            if "onevision" in model.config.model_type
            else {"vision_feature_select_strategy": "default"}
        )
        packed, _ = model.model.pack_image_features(
            [part], [list(size)], image_newline=end, **strategy
        )
        found.append(packed[0][:, 0].to(torch.int64).numpy())
    return found


@torch.no_grad()
def answer(family: str, model: Any, p: Prompt, steps: int) -> Answer:
    """Prefill and ``steps`` greedy tokens through transformers' own cache."""
    features: list[torch.Tensor] = []
    image = torch.tensor(p.ids) == IMAGE_TOKEN

    def entered(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not features:
            features.append(kwargs["inputs_embeds"][0][image])

    handle = model.model.get_decoder().register_forward_pre_hook(entered, with_kwargs=True)
    out = model(input_ids=torch.tensor([p.ids]), use_cache=True, **model_inputs(family, p))
    handle.remove()
    tokens, logits = [], []
    while True:
        logits.append(out.logits[0, -1].numpy())
        tokens.append(int(logits[-1].argmax()))
        if len(tokens) == steps:
            return Answer(features[0].numpy(), tokens, np.stack(logits))
        out = model(
            input_ids=torch.tensor([tokens[-1:]]),
            past_key_values=out.past_key_values,
            use_cache=True,
        )


SPECIALS = (
    *("<pad>", "<s>", "</s>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *("<img>", "<image>", "</img>", "<video>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
)
TEMPLATE = (
    "<s>{% for m in messages %}{{ 'U: ' if m['role'] == 'user' else 'A: ' }}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def _tokenizer() -> Any:
    """A token per byte; the image token has the id that the models expect."""
    vocabulary = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={
            "image_token": "<image>",
            "context_image_token": "<image>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
    )


_SQUARE = {"height": 48, "width": 48}
_HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_SPLIT = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 48}}
# family -> (image processor, its settings, the processor's): pictures become up to four tiles of 48 x 48 and one more.
PROCESSORS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "smolvlm": (
        "SmolVLMImageProcessorPil",
        _SPLIT,
        {"processor_class": "SmolVLMProcessor", "image_seq_len": 9},
    ),
    "idefics3": (
        "Idefics3ImageProcessorPil",
        _SPLIT,
        {"processor_class": "Idefics3Processor", "image_seq_len": 9},
    ),
    "internvl": (
        "GotOcr2ImageProcessorPil",
        {"size": _SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
        {"processor_class": "InternVLProcessor", "image_seq_length": 9},
    ),
    "llava_next": (
        "LlavaNextImageProcessorPil",
        {
            "size": {"shortest_edge": 48},
            "crop_size": _SQUARE,
            "image_grid_pinpoints": PINPOINTS,
        },
        {
            "processor_class": "LlavaNextProcessor",
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "llava_onevision": (
        "LlavaOnevisionImageProcessorPil",
        {"size": _SQUARE, "image_grid_pinpoints": PINPOINTS, **_HALVES},
        {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 36,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
    ),
}


def write_source(family: str, directory: Path, **changes: Any) -> Path:
    """A directory as Hugging Face has them: weights, tokenizer, processor, chat template."""
    tiny_model(family, **changes).save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    kind, settings, rest = PROCESSORS[family]
    getattr(transformers, kind)(**settings).save_pretrained(directory)
    (directory / "processor_config.json").write_text(json.dumps(rest))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tiny_questions(count: int = 3) -> list[Question]:
    """One picture and two, wide and tall; with an answer and without."""
    questions = [
        Question((picture(0, 40, 96),), "What is it?", "cat"),
        Question((picture(1, 90, 60), picture(2, 50, 50)), "Both?", None),
        Question((picture(3, 30, 26),), "Is", "a dog"),
    ]
    return questions[:count]
