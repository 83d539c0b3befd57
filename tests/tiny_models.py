"""Tiny random Hugging Face models with uneven sizes, their checkpoints, and torch's answers. For
tests only.

Sizes are chosen to catch swapped dimensions: 6 query and 2 key/value heads of 64 (groups of 3), an
odd vocabulary, 9 patches, a vision width that INT4 groups do not divide, rope theta and norm eps
away from their defaults.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from qvlm import affine, modality
from qvlm.checkpoint import CheckpointWriter, Golden, QuantizedLinear, write_goldens
from qvlm.recipe import Format, Recipe

IMAGE_TOKEN = 7


def tiny_llava(seed: int = 0, **changes: Any) -> LlavaForConditionalGeneration:
    """A LLaVA of about a million parameters; ``changes`` go to its config, ``text_*``/``vision_*``
    to the parts.
    """
    text: dict[str, Any] = {
        "hidden_size": 384,
        "intermediate_size": 640,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 333,
        "max_position_embeddings": 160,
        "rms_norm_eps": 3e-6,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "eos_token_id": 2,
    }
    vision: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 24,
        "patch_size": 8,
    }
    rest: dict[str, Any] = {"vision_feature_layer": -2}
    for key, value in changes.items():
        part, _, name = key.partition("_")
        {"text": text, "vision": vision}.get(part, rest)[
            name if part in ("text", "vision") else key
        ] = value
    if "feature_layer" in vision:
        rest["vision_feature_layer"] = vision.pop("feature_layer")
    if "feature_select_strategy" in vision:
        rest["vision_feature_select_strategy"] = vision.pop("feature_select_strategy")
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_id=IMAGE_TOKEN,
        **rest,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Spread the norms and biases too: ones and zeros would hide a missing or swapped
            # vector.
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            elif "embed_tokens" in name:
                parameter *= 20
            else:
                parameter *= 2
    return model


def component_of(name: str) -> str:
    """Recipe component of a linear."""
    if name == "lm_head":
        return "head"
    for part, component in (("vision_tower", "vision"), ("projector", "projector")):
        if part in name:
            return component
    return "text"


def live_linears(model: LlavaForConditionalGeneration) -> dict[str, nn.Linear]:
    """Linears whose output reaches the logits."""
    chosen = model.config.vision_feature_layer
    indices = [chosen] if isinstance(chosen, int) else chosen
    layers = model.config.vision_config.num_hidden_layers
    live = max(i % (layers + 1) for i in indices)
    dead = tuple(f"model.vision_tower.encoder.layers.{i}." for i in range(live, layers))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(dead)
    }


def quantize(
    weight: torch.Tensor, format_: Format, input_scale: list[float] | None
) -> QuantizedLinear:
    """Round to nearest."""
    assert format_.weights is not None
    q = affine.quantize_weight(weight.detach(), format_.weights)
    scale = None if input_scale is None else np.array(input_scale, np.float32)
    return QuantizedLinear(q.integers.numpy(), q.scale.numpy(), format_, input_scale=scale)


@dataclass(frozen=True)
class TinyCase:
    """A float model, the same model fake-quantized, and the checkpoint of the second with goldens
    of both.
    """

    model: LlavaForConditionalGeneration
    quantized: LlavaForConditionalGeneration
    directory: Path


def prompts(
    model: LlavaForConditionalGeneration, seed: int = 1
) -> list[tuple[list[int], torch.Tensor]]:
    """(input_ids, pixel_values [N, 3, H, W]): one image in the middle, then two images."""
    generator = torch.Generator().manual_seed(seed)
    c = model.config
    full = c.vision_feature_select_strategy == "full"
    rows = (c.vision_config.image_size // c.vision_config.patch_size) ** 2 + int(full)
    result = []
    for images, texts in ((1, (3, 9)), (2, (2, 4, 6))):
        ids: list[int] = []
        for i, count in enumerate(texts):
            ids += torch.randint(
                8, c.text_config.vocab_size, (count,), generator=generator
            ).tolist()
            if i < images:
                ids += [IMAGE_TOKEN] * rows
        size = c.vision_config.image_size
        result.append((ids, torch.randn(images, 3, size, size, generator=generator)))
    return result


@torch.no_grad()
def answer(
    model: LlavaForConditionalGeneration, ids: list[int], pixels: torch.Tensor, tokens: list[int]
) -> dict[str, np.ndarray[Any, Any]]:
    """What ``Golden`` holds of one model: teacher-forced on ``tokens``, one forward pass without a
    cache of its own.
    """
    sequence = torch.tensor([ids + tokens[:-1]])
    features = model.model.get_image_features(
        pixels,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    ).pooler_output
    out = model(input_ids=sequence, pixel_values=pixels, use_cache=True)
    last = out.past_key_values.layers[-1]
    return {
        "image_features": torch.cat(list(features)).numpy(),
        "logits": out.logits[0, len(ids) - 1 :].numpy(),
        "key": last.keys[0].transpose(0, 1).contiguous().numpy(),
        "value": last.values[0].transpose(0, 1).contiguous().numpy(),
    }


@torch.no_grad()
def greedy(
    model: LlavaForConditionalGeneration, ids: list[int], pixels: torch.Tensor, count: int
) -> list[int]:
    """``count`` greedy tokens, no stopping."""
    tokens: list[int] = []
    out = model(input_ids=torch.tensor([ids]), pixel_values=pixels, use_cache=True)
    while True:
        tokens.append(int(out.logits[0, -1].argmax()))
        if len(tokens) == count:
            return tokens
        out = model(
            input_ids=torch.tensor([tokens[-1:]]),
            past_key_values=out.past_key_values,
            use_cache=True,
        )


def golden(
    model: LlavaForConditionalGeneration,
    quantized: LlavaForConditionalGeneration,
    ids: list[int],
    pixels: torch.Tensor,
    count: int,
) -> Golden:
    """One golden of ``count`` tokens."""
    tokens = greedy(model, ids, pixels, count)
    index = np.cumsum(np.array(ids) == IMAGE_TOKEN) - 1
    inputs = {
        "input_ids": np.array(ids, np.int64),
        "pixel_values": pixels.numpy(),
        "image_sizes": np.full((len(pixels), 2), pixels.shape[-1], np.int64),
        "image_index": np.where(np.array(ids) == IMAGE_TOKEN, index, -1).astype(np.int64),
        "position_ids": np.arange(len(ids), dtype=np.int64),
        "tokens": np.array(tokens, np.int64),
    }
    sides = {"float": model, "quant": quantized}
    return Golden(inputs, {s: answer(m, ids, pixels, tokens) for s, m in sides.items()})


def make_case(directory: Path, recipe: Recipe, tokens: int = 6, **changes: Any) -> TinyCase:
    """Quantize ``tiny_llava`` by round to nearest and write its checkpoint with goldens."""
    model, quantized = tiny_llava(**changes), tiny_llava(**changes)
    linears, names = live_linears(quantized), dict(model.named_parameters())
    largest = _largest_inputs(model, recipe)
    modality.follow(quantized, IMAGE_TOKEN)
    writer = CheckpointWriter(directory)
    for name, module in linears.items():
        format_ = recipe.format_of(component_of(name), name)
        if format_.weights is None:
            continue
        static = format_.activations is not None and format_.activations.static
        scale = [float(np.float16(high / 127)) for high in largest[name]] if static else None
        linear = quantize(module.weight, format_, scale)
        writer.add_linear(component_of(name), name, linear)
        del names[f"{name}.weight"]
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(linear.dequantize()))
        if format_.activations is not None:
            module.register_forward_pre_hook(_fake_quantizer(format_, scale))
    for name, parameter in names.items():
        writer.add(name, parameter.detach().numpy())
    kept = {name: component_of(name) for name in linears if f"{name}.weight" in names}
    writer.close(model.config.to_dict(), recipe, {}, kept)
    goldens = [golden(model, quantized, ids, pixels, tokens) for ids, pixels in prompts(model)]
    write_goldens(directory / "goldens.npz", goldens)
    _processor_files(directory, model)
    return TinyCase(model, quantized, directory)


def _largest_inputs(model: LlavaForConditionalGeneration, recipe: Recipe) -> dict[str, list[float]]:
    """Largest input of each linear over the prompts; of text and of image tokens where its format
    tells them apart.
    """
    largest: dict[str, list[float]] = {}
    modality.follow(model, IMAGE_TOKEN)

    def measure(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            kinds = [args[0]]
            if _splits(recipe.format_of(component_of(name), name)):
                image = modality.current(args[0])
                kinds = [args[0][~image], args[0][image]]
            before = largest.get(name, [0.0] * len(kinds))
            found = zip(before, kinds, strict=True)
            largest[name] = [max(high, float(x.abs().max())) for high, x in found]

        return hook

    hooks = [m.register_forward_pre_hook(measure(n)) for n, m in live_linears(model).items()]
    for ids, pixels in prompts(model):
        answer(model, ids, pixels, [0])
    for hook in hooks:
        hook.remove()
    return largest


def _splits(format_: Format) -> bool:
    return format_.activations is not None and format_.activations.granularity == "modality"


def _fake_quantizer(format_: Format, scale: list[float] | None) -> Any:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        assert format_.activations is not None
        tensor = None if scale is None else torch.tensor(scale)
        image = modality.current(args[0]) if _splits(format_) else None
        rounded = affine.fake_quantize_activation(args[0], format_.activations, tensor, None, image)
        return (rounded, *args[1:])

    return hook


def _processor_files(directory: Path, model: LlavaForConditionalGeneration) -> None:
    size = model.config.vision_config.image_size
    square = {"height": size, "width": size}
    processor = {"crop_size": square, "size": {"shortest_edge": size}, "do_center_crop": True}
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    tokens = [{"id": IMAGE_TOKEN, "content": "<image>", "special": True}]
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
