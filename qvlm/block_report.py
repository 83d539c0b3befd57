"""What the report shows of each block: its error before and after the method, and the ranges of what its linears read.

* Error: |q - f|^2 / |f|^2 of what leaves the block, f the float stream's, q the quantized stream's, image and text
  tokens apart (vision and projector have image tokens only). "nearest" is round to nearest on the same quantized
  inputs, that is before the method did anything; "final" is the method's result.
* Range of what a linear reads: the largest |x| of each channel over all samples on the float stream, image and text
  tokens apart. Stored are the median and the largest over channels and the few largest channels, those that quantizers
  struggle with. Linears that are given the same tensor share a row, named after the first of them.

Cost: three runs of the block over all samples, one of them with round to nearest in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qvlm.capture import linear_inputs
from qvlm.checkpoint import QuantizedLinear
from qvlm.fakequant import FakeQuantLinear, substituted
from qvlm.methods.method import Block
from qvlm.methods.rtn import RoundToNearest
from qvlm.recipe import Recipe

Json = dict[str, Any]

# Largest channels named per layer and kind of token.
CHANNELS = 4


@torch.no_grad()
def describe(block: Block, linears: Mapping[str, QuantizedLinear], recipe: Recipe) -> Json:
    """{"errors": {"nearest" and "final": {"image", "text"}}, "ranges": a row per layer and input}; the
    modules are float.
    """
    floats, ranges = _float_pass(block)
    nearest = _nearest(block, recipe)
    errors = {
        name: _error(block, floats, _simulated(block, chosen))
        for name, chosen in (("nearest", nearest), ("final", linears))
    }
    return {"errors": errors, "ranges": ranges}


def _nearest(block: Block, recipe: Recipe) -> dict[str, QuantizedLinear]:
    """Round to nearest, layer by layer, as the method ``rtn`` does it."""
    found: dict[str, QuantizedLinear] = {}
    # The options are the method's; rtn has one of the same name ("scales").
    plain = replace(recipe, method="rtn", options={})
    hidden = block.quant_inputs
    for index in range(block.start, block.stop):
        linears = block.layer_linears(index)
        formats = {name: block.formats[name] for name in linears}
        layer = Block(block.stream, index, index + 1, linears, formats, hidden, hidden)
        found.update(RoundToNearest().quantize_block(layer, plain, {}).linears)
        if index + 1 < block.stop:
            with _simulated(layer, {name: found[name] for name in linears}):
                hidden = [layer.run(state, sample) for sample, state in enumerate(hidden)]
    return found


def _simulated(
    block: Block, linears: Mapping[str, QuantizedLinear]
) -> AbstractContextManager[None]:
    """While open the block's linears compute as these integers do."""
    if not linears:
        return nullcontext()
    functions = {
        name: FakeQuantLinear.from_quantized(one, block.linears[name].bias).forward
        for name, one in linears.items()
    }
    return substituted(block.linears, functions)


def _float_pass(block: Block) -> tuple[list[Tensor], list[Json]]:
    """The float stream's outputs, and the ranges of what the linears read."""
    maxima: dict[tuple[int, str], dict[str, Tensor]] = {}
    outputs = []
    for sample, hidden in enumerate(block.float_inputs):
        for index in range(block.start, block.stop):
            linears = block.layer_linears(index)
            seen, hidden = linear_inputs(block.stream, index, linears, hidden, sample)
            read = set[int]()
            for name, x in seen.items():
                if x.data_ptr() in read:
                    continue
                read.add(x.data_ptr())
                row = maxima.setdefault((index, name), {})
                for kind, tokens in _tokens(block, sample, x).items():
                    largest = tokens.abs().amax(0)
                    row[kind] = torch.maximum(row[kind], largest) if kind in row else largest
        outputs.append(hidden)
    ranges = [
        {
            "layer": index,
            "linear": name.removeprefix(f"{block.stream.names[index]}."),
            **{kind: _range(values) for kind, values in row.items()},
        }
        for (index, name), row in sorted(maxima.items(), key=lambda item: item[0][0])
    ]
    return outputs, ranges


def _tokens(block: Block, sample: int, x: Tensor) -> dict[str, Tensor]:
    """The rows [tokens, in] of a linear's input by kind; all that tower and projector see are image tokens."""
    rows = x.reshape(-1, x.shape[-1])
    if block.component not in ("text", "head"):
        return {"image": rows}
    image = block.image_masks[sample].reshape(-1)
    return {k: rows[mask] for k, mask in (("image", image), ("text", ~image)) if bool(mask.any())}


def _range(largest: Tensor) -> Json:
    """Median and maximum over channels [hidden], and the largest channels with their values."""
    values, channels = largest.topk(min(CHANNELS, len(largest)))
    return {
        "median": float(largest.median()),
        "largest": float(values[0]),
        "channels": [
            [int(c), float(v)] for c, v in zip(channels.tolist(), values.tolist(), strict=True)
        ],
    }


def _kinds(block: Block, sample: int, hidden: Tensor) -> dict[str, Tensor]:
    """The masks [..., tokens] of a hidden state for those kinds of token that the sample has."""
    image = block.image_masks[sample]
    if block.component == "projector":  # may join tokens: fewer leave it than enter
        image = torch.ones(hidden.shape[:-1], dtype=torch.bool)
    return {k: mask for k, mask in (("image", image), ("text", ~image)) if bool(mask.any())}


def _error(
    block: Block, floats: list[Tensor], simulated: AbstractContextManager[None]
) -> dict[str, float]:
    error: dict[str, float] = {}
    norm: dict[str, float] = {}
    with simulated:
        for sample, hidden in enumerate(block.quant_inputs):
            found, expected = block.run(hidden, sample), floats[sample]
            for kind, mask in _kinds(block, sample, expected).items():
                reference = expected[mask].double()
                difference = found[mask].double() - reference
                error[kind] = error.get(kind, 0.0) + float(difference.square().sum())
                norm[kind] = norm.get(kind, 0.0) + float(reference.square().sum())
    return {kind: error[kind] / norm[kind] if norm[kind] else 0.0 for kind in error}
