"""Greedy decoding with transformers' own cache, and the goldens made from it. The oracle side: nothing is deployed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qvlm.capture import Sample
from qvlm.checkpoint import Array
from qvlm.models import ADAPTERS
from qvlm.models.adapter import Adapter


@dataclass(frozen=True)
class Decoded:
    """tokens int64 [B, T]; logits float32 [B, T, vocab] if kept (row t after tokens[:, :t]); cache: transformers'."""

    tokens: Tensor
    logits: Tensor | None
    cache: Any


@torch.no_grad()
def decode(
    model: nn.Module,
    inputs: dict[str, Any],
    steps: int,
    stop: frozenset[int] = frozenset(),
    forced: Tensor | None = None,
    keep_logits: bool = False,
) -> Decoded:
    """Prefill and up to ``steps`` tokens, each fed back (the last one is not).

    Ends early once every row has produced a token of ``stop``. ``forced`` [B, T] is fed instead of the argmax
    (teacher forcing), and then T tokens come back.
    """
    from transformers import DynamicCache

    ADAPTERS[str(model.config.model_type)].forget(model)  # type: ignore[union-attr]
    cache = DynamicCache(config=model.config.get_text_config())  # type: ignore[union-attr, operator]
    feed = {**inputs, "use_cache": True, "past_key_values": cache, "logits_to_keep": 1}
    tokens: list[Tensor] = []
    logits: list[Tensor] = []
    finished = torch.zeros(inputs["input_ids"].shape[0], dtype=torch.bool)
    for step in range(steps if forced is None else forced.shape[1]):
        output = model(**feed).logits[:, -1]
        token = output.argmax(-1) if forced is None else forced[:, step]
        tokens.append(token)
        if keep_logits:
            logits.append(output.float())
        if stop:
            finished |= torch.isin(token, torch.tensor(sorted(stop)))
            if bool(finished.all()):
                break
        feed = {
            "input_ids": token[:, None],
            "use_cache": True,
            "past_key_values": cache,
            "logits_to_keep": 1,
        }
    return Decoded(torch.stack(tokens, 1), torch.stack(logits, 1) if keep_logits else None, cache)


def stop_tokens(model: nn.Module) -> frozenset[int]:
    """End tokens from generation_config.json, else from the text config."""
    for config in (model.generation_config, model.config.get_text_config()):  # type: ignore[union-attr, operator]
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


def with_own_answer(model: nn.Module, sample: Sample, steps: int) -> Sample:
    """A sample without answer extended by the model's greedy answer (end token included)."""
    tokens = decode(model, sample.model_inputs(), steps, stop_tokens(model)).tokens
    count = tokens.shape[1]
    # Qwen-VL's kinds of tokens: a number for each, 0 for text.
    others = {
        key: torch.cat([value, value.new_zeros(tokens.shape)], 1)
        if isinstance(value, Tensor) and value.shape == sample.input_ids.shape
        else value
        for key, value in sample.others.items()
    }
    return replace(
        sample,
        input_ids=torch.cat([sample.input_ids, tokens], 1),
        others=others,
        image_mask=torch.cat([sample.image_mask, torch.zeros(count, dtype=torch.bool)]),
        answer_mask=torch.cat([sample.answer_mask, torch.ones(count, dtype=torch.bool)]),
    )


@torch.no_grad()
def golden_side(
    model: nn.Module, adapter: Adapter, sample: Sample, steps: int, forced: Tensor | None = None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """One side of a golden: (inputs, outputs) as ``checkpoint.Golden`` lays them out, from a prompt without answer.

    Decoding goes on past the end token, so that ``steps`` cached steps are compared whatever the answer's length.
    """
    pixels: list[Tensor] = []
    entered: list[dict[str, Any]] = []
    positions: list[Tensor] = []

    def seen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        pixels.append(args[0])

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        entered.append(kwargs)
        # Some decoders are given the positions of their rows, others count them for their layers.
        if not positions and isinstance(kwargs.get("position_ids"), Tensor):
            positions.append(kwargs["position_ids"])

    decoder = model.get_submodule(adapter.text_layers.rpartition(".")[0])
    first = model.get_submodule(adapter.layer_names(model, "text")[0])
    with ExitStack() as stack:
        hook = model.get_submodule(adapter.pixels).register_forward_pre_hook(seen)
        stack.callback(hook.remove)
        for module in (decoder, first):
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        result = decode(model, sample.model_inputs(), steps, forced=forced, keep_logits=True)
    assert result.logits is not None
    mask = sample.image_mask.numpy()
    rows = positions[0].reshape(-1, len(mask)).numpy()
    inputs: dict[str, Array] = {
        "input_ids": sample.input_ids[0].numpy(),
        "pixel_values": torch.cat(pixels).numpy(),
        "image_sizes": np.array(sample.image_sizes, np.int64).reshape(-1, 2),
        "image_index": np.where(mask, np.cumsum(mask) - 1, -1).astype(np.int64),
        "position_ids": rows[0] if len(rows) == 1 else rows,
        "tokens": result.tokens[0].numpy(),
    }
    # Image tokens enter the decoder as rows of features, whatever a family did with the projector's.
    parts = [entered[0]["inputs_embeds"][0, sample.image_mask]]
    parts += entered[0].get(adapter.deepstack) or []
    last = result.cache.layers[-1]
    outputs: dict[str, Array] = {
        "image_features": torch.cat(parts, -1).float().numpy(),
        "logits": result.logits[0].numpy(),
        "key": last.keys[0].transpose(0, 1).contiguous().numpy(),
        "value": last.values[0].transpose(0, 1).contiguous().numpy(),
    }
    return inputs, outputs


def golden_steps(samples: Sequence[Sample], vocab: int, positions: int, wanted: int = 64) -> int:
    """Decode steps per golden: ``wanted``, less where logits of all goldens would pass 64 MiB or the context ends."""
    longest = max(sample.input_ids.shape[1] for sample in samples)
    room = (64 << 20) // (2 * 4 * vocab * len(samples))
    return max(1, min(wanted, positions - longest, max(room, 8)))
