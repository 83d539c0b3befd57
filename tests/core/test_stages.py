"""Proves that a stage's statistics are of numbers: an overflow on either stream, in samples that are fitted and in
those held out, ends each method that measures stage by stage with one line that says where.

Run: python -m pytest tests/core/test_stages.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_blocks import tiny_block, tiny_stream

from qvlm.errors import CalibrationError
from qvlm.methods import METHODS
from qvlm.methods.held_out import split
from qvlm.recipe import component_recipe


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("method", "side"),
    [("gptq", "quantized"), ("gptaq", "float"), ("vlmq", "float"), ("fused", "quantized"), ("fused", "float")],
)  # fmt: skip
def test_inputs_that_are_no_numbers_are_named(method: str, side: str, bad: float) -> None:
    block = tiny_block(tiny_stream("text", 4), "w4a16")
    _, held = split(4)
    for sample in (0, *held):
        streams = {"quantized": list(block.quant_inputs), "float": list(block.float_inputs)}
        hidden = streams[side][sample].clone()
        hidden[..., -1, 0] = bad
        streams[side][sample] = hidden
        spoilt = replace(block, quant_inputs=streams["quantized"], float_inputs=streams["float"])
        recipe = component_recipe("w4a16", "float", "float", method=method)
        with pytest.raises(CalibrationError) as caught:
            METHODS[method].quantize_block(spoilt, recipe, {})
        message = str(caught.value)
        first = f"{block.names[0]}.self_attn.v_proj: on calibration sample {sample} its inputs on the {side} stream"
        assert message.startswith(first) and "\n" not in message


def test_hidden_states_hold_numbers_before() -> None:
    """The check above fails for what it plants and nothing else."""
    block = tiny_block(tiny_stream("text", 4), "w4a16")
    assert all(bool(torch.isfinite(h).all()) for h in (*block.quant_inputs, *block.float_inputs))
    recipe = component_recipe("w4a16", "float", "float", method="gptaq")
    METHODS["gptaq"].quantize_block(block, recipe, {})
