"""Give a model outlier channels without changing its function: powers of two moved between weights.

Real VLMs have a few activation channels far larger than the rest, and image tokens of another
magnitude than text tokens; a small model trained for an hour has neither.  Three places let a
factor pass through exactly:

- a norm's gain (and bias) up, the columns of the linears that read it down;
- rows of `up_proj` up, columns of `down_proj` down (the gate multiplies, so it does not mind);
- rows of `v_proj` up, columns of `o_proj` down (attention mixes positions, never channels; with
  grouped queries one row of `v_proj` feeds one column per query head of its group).

Every factor is a power of two, so each product is scaled exactly and each sum meets the same
roundings: in float the outputs keep their bits, as long as nothing leaves the exponent range.  In
float16 small weights would: the shipped weights are rounded after the move, and `undo` gives the
model they are an exact reparametrisation of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from demo_eval import Case, batch_inputs

GROUP = 128


@dataclass(frozen=True)
class Dial:
    """How many channels at each place are raised, and by which power of two.

    The last two go the other way: `column_channels` per group of 128 are lowered in a decoder place
    by 2 ** `column_log2`, so the columns that read them are raised and widen the range of their
    weight group.  Every other weight of the group then has that many bits less.
    """

    norm_channels: int = 4
    norm_log2: int = 4
    inner_channels: int = 4
    inner_log2: int = 2
    vision_channels: int = 4
    vision_log2: int = 3
    column_channels: int = 1
    column_log2: int = 2


@dataclass(frozen=True)
class Move:
    """One exact move: `channels` of a place, named by its module, times 2 ** `log2`."""

    place: str
    channels: tuple[int, ...]
    log2: int


def places(model: LlavaForConditionalGeneration) -> dict[str, str]:
    """Every place a factor can pass, by the module whose outputs grow, with its kind."""
    found = {}
    for index in range(len(model.model.language_model.layers)):
        layer = f"model.language_model.layers.{index}"
        found[f"{layer}.input_layernorm"] = "norm"
        found[f"{layer}.self_attn.v_proj"] = "inner"
        found[f"{layer}.post_attention_layernorm"] = "norm"
        found[f"{layer}.mlp.up_proj"] = "inner"
    for index in range(len(model.model.vision_tower.encoder.layers)):
        layer = f"model.vision_tower.encoder.layers.{index}"
        found[f"{layer}.layer_norm1"] = "vision"
        found[f"{layer}.layer_norm2"] = "vision"
    return found


def readers(model: LlavaForConditionalGeneration, place: str) -> list[nn.Linear]:
    """The linears that read what a place writes."""
    layer, name = place.split(".")[:-1], place.split(".")[-1]
    names = {
        "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "layer_norm1": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
        "layer_norm2": ["mlp.fc1"],
        "v_proj": ["o_proj"],
        "up_proj": ["down_proj"],
    }[name]
    return [model.get_submodule(".".join([*layer, reader])) for reader in names]


def apply(model: LlavaForConditionalGeneration, moves: Sequence[Move], sign: int = 1) -> None:
    """Move the factors; `sign` -1 moves them back."""
    heads = model.config.text_config.num_attention_heads
    groups = heads // model.config.text_config.num_key_value_heads
    width = model.config.text_config.head_dim
    with torch.no_grad():
        for move in moves:
            factor = 2.0 ** (sign * move.log2)
            module = model.get_submodule(move.place)
            channels = torch.tensor(move.channels)
            module.weight[channels] *= factor
            bias = getattr(module, "bias", None)
            if bias is not None:
                bias[channels] *= factor
            if move.place.endswith("v_proj"):
                head, inner = channels // width, channels % width
                group = torch.arange(groups)
                query = head[:, None] * groups + group[None, :]
                channels = (query * width + inner[:, None]).flatten()
            for reader in readers(model, move.place):
                reader.weight[:, channels] /= factor


def profile(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, seen: Sequence[Case]
) -> dict[str, Tensor]:
    """Mean magnitude of image tokens over that of text tokens, per channel of every place."""
    inputs = batch_inputs(processor, seen)
    is_image = inputs["input_ids"] == model.config.image_token_id
    is_text = (inputs["attention_mask"] == 1) & ~is_image
    magnitudes: dict[str, Tensor] = {}

    def watch(place: str, kind: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            size = output.abs()
            if kind == "vision":
                magnitudes[place] = size.flatten(0, -2).mean(0)
            else:
                magnitudes[place] = size[is_image].mean(0) / size[is_text].mean(0)

        return hook

    hooks = [
        model.get_submodule(place).register_forward_hook(watch(place, kind))
        for place, kind in places(model).items()
    ]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return magnitudes


def choose(
    model: LlavaForConditionalGeneration, magnitudes: dict[str, Tensor], dial: Dial
) -> list[Move]:
    """The moves of a dial: up where image tokens stand out most, down where they do least."""
    strength = {
        "norm": (dial.norm_channels, dial.norm_log2),
        "inner": (dial.inner_channels, dial.inner_log2),
        "vision": (dial.vision_channels, dial.vision_log2),
    }
    moves = []
    for place, kind in places(model).items():
        ratio = magnitudes[place]
        count, log2 = strength[kind]
        if count and log2:
            top = ratio.topk(count).indices.sort().values
            moves.append(Move(place, tuple(int(c) for c in top), log2))
        if dial.column_channels and dial.column_log2 and kind != "vision":
            groups = max(readers(model, place)[0].in_features // GROUP, 1)
            low = ratio.view(groups, -1).topk(dial.column_channels, largest=False).indices
            flat = (low + torch.arange(groups)[:, None] * (len(ratio) // groups)).flatten()
            moves.append(Move(place, tuple(sorted(int(c) for c in flat)), -dial.column_log2))
    return moves
