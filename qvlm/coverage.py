"""Text tokens that no calibration sample holds, as samples of their own: what a weight does to a token it never saw.

A few dozen prompts hold a small part of a vocabulary (on the demo 87 of its 576 tokens in 128 samples). Methods that
move rounding errors to where the calibration has no energy move them onto the tokens it lacks: on the demo one word
among a thousand questions, never seen in calibration, made three quarters of a mean divergence. The embeddings of
those tokens are known, so no further data is needed.

1. Ids of the embedding table that no sample holds; not those that the configuration names (images, padding, ends).
2. In random order by seed, at most ``share`` times as many as the calibration's tokens of all kinds.
3. In sequences of ``LENGTH`` behind the calibration's first token; text only, without an answer.

Such a sequence is no sentence: what enters the first layer is exact, deeper layers see the token in odd company.
``with_coverage`` appends them behind the samples, for methods with an option ``coverage`` above zero; as one sample in
eight is held out (``methods.held_out``), they judge as well as fit.

Cost: their share of the calibration's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.capture import Sample
from qvlm.methods import METHODS, Context

# Tokens of one sequence, the first one not counted.
LENGTH = 64


def unseen_tokens(model: nn.Module, samples: Sequence[Sample]) -> Tensor:
    """Ids int64 [n], rising, of step 1."""
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Module)
    unseen = torch.ones(len(table.weight), dtype=torch.bool)  # type: ignore[arg-type]
    for sample in samples:
        unseen[sample.input_ids] = False
    named = [number for number in _token_ids(model.config.to_dict()) if number < len(unseen)]  # type: ignore[union-attr, operator]
    unseen[named] = False
    return unseen.nonzero()[:, 0]


def _token_ids(config: Mapping[Any, Any]) -> list[int]:
    """Values of all ``*_token_id``, ``*_token_index`` and ``*_token_ids`` of a configuration and its parts."""
    found: list[int] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _token_ids(value)
        elif str(key).endswith(("token_id", "token_index", "token_ids")):
            values = value if isinstance(value, list | tuple) else [value]
            found += [number for number in values if isinstance(number, int) and number >= 0]
    return found


def covering(model: nn.Module, samples: Sequence[Sample], share: float, seed: int) -> list[Sample]:
    """Steps 1 to 3; empty where nothing is unseen."""
    ids = unseen_tokens(model, samples)
    most = int(share * sum(sample.input_ids.numel() for sample in samples))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    chosen = ids[order[:most]]
    first = samples[0].input_ids[:, :1]
    found = []
    for part in chosen.split(LENGTH) if len(chosen) else ():
        tokens = torch.cat([first, part[None]], 1)
        nothing = torch.zeros(tokens.shape[1], dtype=torch.bool)
        found.append(Sample(tokens, None, nothing, nothing))
    return found


def with_coverage(context: Context) -> Context:
    """The context with the samples that its recipe's method asks for; itself where the method asks for none."""
    options = {**METHODS[context.recipe.method].options, **context.recipe.options}
    share = options.get("coverage", 0.0)
    if not share or not context.samples or not {"text", "head"} & context.formats.keys():
        return context
    more = covering(context.model, context.samples, share, context.recipe.seed)
    return replace(context, samples=[*context.samples, *more])
