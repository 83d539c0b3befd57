"""Proves that every method decides alike when asked twice: same samples, same seed, the same integers and scales,
whatever else draws random numbers in the process. (Two whole runs of the command, byte by byte:
tests/end_to_end/test_interrupt.py.)

Run: python -m pytest tests/core/test_determinism.py -q
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_blocks import tiny_context
from torch import Tensor

from qvlm.methods import METHODS
from qvlm.recipe import LayerRule, Recipe, named_format
from qvlm.trials.job import quantized

# One layer of the decoder, and the tower for the method that trains on it.
RULES = {
    "q-vlm": (LayerRule("text.*layers.0.*", named_format("w4a16")), LayerRule("vision.*", named_format("w8a8"))),
    # Few enough bits for the joint rounding, which draws samples.
    "fused": (LayerRule("text.*layers.0.*", named_format("w3a16")),),
}  # fmt: skip
# What shortens a method without taking a stage from it.
SHORT: dict[str, dict[str, Any]] = {
    "q-vlm": {"percentiles": [1.0, 0.98], "clip_ratios": [1.0, 0.7], "veo_epochs": 1},
    "fused": {"steps": 2, "batch": 1, "every": 1, "sweeps": 1},
    "awq": {"grid": 3},
    "mbq": {"grid": 3},
}


def decided(method: str) -> dict[str, Tensor]:
    """Every tensor of a model that was quantized from scratch."""
    rules = RULES.get(method, RULES["q-vlm"][:1])
    recipe = Recipe(rules, method=method, options=SHORT.get(method, {}))
    return dict(quantized(tiny_context(recipe, samples=2)).model.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_run_gives_the_same_numbers(method: str) -> None:
    first = decided(method)
    torch.manual_seed(1234)  # whatever else drew numbers in between
    torch.rand(7)
    second = decided(method)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
