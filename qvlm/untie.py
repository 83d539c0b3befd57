"""A head that is the token table gets a copy of its own: what ``untie`` in a recipe asks for.

Small models share one matrix [vocab, hidden] between the token embedding and the head (``tie_word_embeddings``). The
table is looked up, a row a token; the head multiplies, and reads all of it in every decode step. What helps the one
must not touch the other: a head of integers, or the final norm's gain, which R1 (``methods.rotate``) folds into the
head alone. With a copy the model computes the same, bit for bit, and everything behind sees a model that was never
tied: the head has a format, the table may have one (``embedding``), R1 folds.

Cost: the bytes of the table once more, in the format that the recipe gives the head. Where the head is not tied
nothing changes, so that one recipe serves models of both kinds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qvlm.models.adapter import Adapter
from qvlm.recipe import Recipe

# Ends the advice of errors that a copy would have avoided.
HINT = 'untie them ("untie": true in the recipe, or --untie)'
_KEY = "tie_word_embeddings"


@torch.no_grad()
def untied(model: nn.Module, adapter: Adapter, recipe: Recipe) -> nn.Module:
    """The model that ``recipe`` is for: ``model`` itself, or where it unties a tied head, another one with a head of
    its own that shares every other tensor with ``model``, which stays as it is (weights may be on the meta device).
    """
    if not recipe.untie or not adapter.tied(model):
        return model
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    own = copy.deepcopy(model, shared)
    head: Any = own.get_submodule(adapter.head)
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=head.weight.requires_grad)
    config: Any = own.config
    for part in (config, config.get_text_config()):
        setattr(part, _KEY, False)
    return own


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the untied model: false at the top and in ``text_config``, which may default to true."""
    changed = {**config, _KEY: False}
    if isinstance(text := config.get("text_config"), dict):
        changed["text_config"] = {**text, _KEY: False}
    return changed
