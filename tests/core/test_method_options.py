"""Proves that a method's option with a value that makes no sense is refused when a recipe is checked, not after the
samples have been run.

Run: python -m pytest tests/core/test_method_options.py -q
"""

from __future__ import annotations

from typing import Any

import pytest

from qvlm.errors import RecipeError
from qvlm.methods import METHODS
from qvlm.plan import check_method
from qvlm.recipe import Recipe


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("fused", {"passes": 0}, "option passes: 0, expected at least 1"),
        ("fused", {"steps": "many"}, "option steps: 'many', expected a whole number"),
        ("fused", {"rate": "fast"}, "option rate: 'fast', expected a positive number"),
        ("fused", {"rate": float("nan")}, "option rate: nan, expected a positive number"),
        ("gptq", {"damping": -1}, "damping"),
        ("gptaq", {"alpha": 2.0}, "alpha"),
        ("vlmq", {"exponent": 3}, "option exponent: 3, expected 1 or 2"),
        ("vlmq", {"mix": 1.0}, "option mix: 1.0, expected a share between 0 and 1"),
        ("fused", {"mix": 0}, "option mix: 0, expected a share between 0 and 1"),
        ("q-vlm", {"partition": "none"}, "option partition: 'none'"),
        ("q-vlm", {"veo_batch": 0}, "option veo_batch: 0, expected at least 1"),
        ("q-vlm", {"search_samples": -1}, "option search_samples: -1, expected at least 0"),
        ("q-vlm", {"veo_rate": 0.0}, "option veo_rate: 0.0, expected a positive number"),
        ("q-vlm", {"h0": "mean"}, "option h0: 'mean', expected a number or null"),
        ("q-vlm", {"dependency_bits": 4.5}, "option dependency_bits: 4.5, expected 2 to 8"),
        ("rtn", {"scales": "none"}, "option scales: 'none'"),
    ],
)
def test_an_options_value_is_refused_before_any_work(
    method: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        check_method(Recipe((), method, options=options))


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_accepted(method: str) -> None:
    check_method(Recipe((), method, options=dict(METHODS[method].options)))
