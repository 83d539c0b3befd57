"""Proves round to nearest: every static scale covers exactly what its linear saw on the stream it was given, and
block by block the integers are those of the weight alone.

Run: python -m pytest tests/core/test_rtn.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_blocks import tiny_block, tiny_stream
from tiny_models import prompts, tiny_llava

from qvlm.capture import Sample, capture_stream, linear_inputs
from qvlm.checkpoint import QuantizedLinear
from qvlm.methods import METHODS
from qvlm.methods.method import Block
from qvlm.methods.rtn import round_to_nearest
from qvlm.models import ADAPTERS
from qvlm.recipe import FORMATS, Recipe
from qvlm.scales import search_scales

ADAPTER = ADAPTERS["llava"]


def block_of(format_name: str, component: str) -> Block:
    """The first layer of a component with two samples; the quantized stream is the float one, scaled."""
    model = tiny_llava()
    samples = []
    for ids, pixels in prompts(model, 0)[:2]:
        tokens = torch.tensor([ids])
        nothing = torch.zeros(len(ids), dtype=torch.bool)
        samples.append(Sample(tokens, pixels, tokens[0] == 7, nothing))
    stream = capture_stream(model, ADAPTER, component, samples)
    linears = {
        name: linear
        for name, linear in ADAPTER.linears(model, component).items()
        if name.startswith(stream.names[0])
    }
    formats = dict.fromkeys(linears, FORMATS[format_name])
    return Block(stream, 0, 1, linears, formats, stream.inputs, [1.5 * x for x in stream.inputs])


@pytest.mark.parametrize("component", ["vision", "projector", "text"])
def test_static_scales_cover_what_the_quantized_stream_brings(component: str) -> None:
    block = block_of("w8a8-static", component)
    result = METHODS["rtn"].quantize_block(block, Recipe(()), {})
    largest: dict[str, float] = {}
    for i, hidden in enumerate(block.quant_inputs):
        seen, _ = linear_inputs(block.stream, 0, block.linears, hidden, i)
        for name, x in seen.items():
            largest[name] = max(largest.get(name, 0.0), float(x.abs().max()))
    assert result.linears.keys() == block.linears.keys()
    for name, linear in result.linears.items():
        assert linear.input_scale is not None and linear.input_zero_point is None
        expected = np.float16(np.float32(largest[name]) / np.float32(127))
        assert linear.input_scale.tolist() == [float(expected)]


@pytest.mark.parametrize("format_name", ["w8a8", "w8a8-static"])
def test_integers_depend_on_the_weight_alone(format_name: str) -> None:
    block = block_of(format_name, "text")
    result = METHODS["rtn"].quantize_block(block, Recipe(()), {})
    for name, linear in block.linears.items():
        expected = round_to_nearest(linear.weight, FORMATS["w8a8"])
        assert np.array_equal(result.linears[name].integers, expected.integers)
        assert (result.linears[name].input_scale is None) == (format_name == "w8a8")


def test_searched_scales_weigh_channels_by_the_energy_of_all_tokens() -> None:
    """Step 1's search, and what it is for: less output error than with the largest weight's scale."""
    block = block_of("w4a16", "text")
    plain, found = (
        METHODS["rtn"].quantize_block(block, Recipe((), options={"scales": scales}), {}).linears
        for scales in ("max", "search")
    )
    seen = [
        linear_inputs(block.stream, 0, block.linears, hidden, i)[0]
        for i, hidden in enumerate(block.quant_inputs)
    ]
    for name, linear in block.linears.items():
        x = torch.cat([one[name].reshape(-1, linear.in_features) for one in seen])
        scheme = FORMATS["w4a16"].weights
        assert scheme is not None
        energy = torch.stack([one[name].flatten(0, -2).square().sum(0) for one in seen]).sum(0)
        expected = search_scales(linear.weight, scheme, energy)
        assert np.array_equal(found[name].scale, expected.numpy())

        def error(side: dict[str, QuantizedLinear]) -> float:
            difference = torch.from_numpy(side[name].dequantize()) - linear.weight.detach()  # noqa: B023
            return float((x.double() @ difference.double().T).square().sum())  # noqa: B023

        assert error(found) < error(plain)


def test_asymmetric_channels_get_a_range_each() -> None:
    block = block_of("w4a4", "text")
    result = METHODS["rtn"].quantize_block(block, Recipe(()), {})
    for name, linear in result.linears.items():
        columns = block.linears[name].in_features
        assert linear.input_scale is not None and linear.input_scale.shape == (columns,)
        assert linear.input_zero_point is not None and linear.input_zero_point.shape == (columns,)
        assert linear.input_zero_point.min() >= -8 and linear.input_zero_point.max() <= 7


def test_blocks_are_single_layers() -> None:
    block = block_of("w8a8", "vision")
    assert METHODS["rtn"].partition(block.stream, Recipe(()), {}) == [(0, 1), (1, 2)]


def test_static_activations_need_a_range() -> None:
    with pytest.raises(ValueError, match="needs the range"):
        round_to_nearest(torch.ones(2, 4), FORMATS["w8a8-static"])
    with pytest.raises(ValueError, match="quantizes no weight"):
        round_to_nearest(torch.ones(2, 4), FORMATS["float"])


def test_searched_scales_are_positive_at_two_bits_too() -> None:
    block = tiny_block(tiny_stream("text", 1), "w2a16")
    plan = Recipe((), "rtn", options={"scales": "search"})
    found = METHODS["rtn"].quantize_block(block, plan, {}).linears
    assert all((linear.scale > 0).all() for linear in found.values())
