"""Which tokens are image tokens while a model or a layer runs: what the simulation of ``w8a8-split`` asks. And weights
of tokens by their kind.

A linear sees rows, not ids. Whoever runs it says which rows are image tokens: a stream from its masks
(``capture.Stream``), a whole model from the ids it is given (``follow``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.errors import RecipeError

_image: ContextVar[Tensor | None] = ContextVar("image tokens", default=None)


@contextmanager
def image_tokens(mask: Tensor) -> Iterator[None]:
    """While open, ``mask`` (bool [batch, tokens], True on image tokens) describes what linears see."""
    token = _image.set(mask)
    try:
        yield
    finally:
        _image.reset(token)


def current(x: Tensor) -> Tensor:
    """The mask of a linear's input, [batch, tokens, in] or [batch * tokens, in], in the input's form; RuntimeError if
    nobody said it.
    """
    mask = _image.get()
    if mask is not None and x.ndim == 2:
        mask = mask.flatten()
    if mask is None or mask.shape != x.shape[:-1]:
        known = None if mask is None else tuple(mask.shape)
        raise RuntimeError(
            f"image tokens known for {known}, asked for an input {tuple(x.shape)}: run the model or a stream, "
            "not a module alone"
        )
    return mask


class _Follow:
    """Sets the mask from ``input_ids`` when the model is entered."""

    def __init__(self, image_token_id: int) -> None:
        self.image_token_id = image_token_id

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        _image.set(kwargs["input_ids"] == self.image_token_id)


def _forget(module: nn.Module, args: Any, output: Any) -> None:
    _image.set(None)


def follow(model: nn.Module, image_token_id: int) -> None:
    """From now on the model says which of its tokens are image tokens. Once is enough, twice does no harm."""
    if not any(isinstance(hook, _Follow) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_Follow(image_token_id), with_kwargs=True)
        model.register_forward_hook(_forget, always_call=True)


# -- weights


def check_mix(mix: float) -> float:
    """The option; RecipeError unless both kinds of token get some weight."""
    if not 0 < mix < 1:
        raise RecipeError(f"option mix: {mix!r}, expected a share between 0 and 1")
    return mix


def balanced(image: Tensor, mix: float = 0.5) -> Tensor:
    """Weights [tokens] with mean 1 of which image tokens have the share ``mix``; ones if there is one kind only."""
    ones = torch.ones(image.shape, dtype=torch.float32)
    count = int(image.sum())
    if count in (0, len(image)):
        return ones
    total, text = len(image), len(image) - count
    return torch.where(image, mix * total / count, (1 - mix) * total / text).to(ones.dtype)
