"""Round to nearest: the baseline every other method has to beat.

Objective: none beyond the range. Each weight goes to the nearest point of a uniform grid that spans its group.

1. Scale of each group of a weight: s = max|w| / (2^(bits-1) - 1), rounded to float16. With option ``scales``
   "search": the scale of least sum_c H_cc (w_c - Q(w_c))^2, H_cc the energy of input channel c over all tokens
   (``scales.search_scales``; symmetric formats).
2. Integers: q = clip(round_half_even(w / s)).
3. If the format fixes activation scales (static), the range of each linear's input is its minimum and maximum over
   all calibration tokens; the layers before it are quantized, the linears of its own layer not yet.

Layers are independent, so a block is one layer. Samples matter to step 3 and to the search only. Cost: one forward
per layer and sample for each of these, otherwise one pass over the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qvlm import affine
from qvlm.affine import ActivationRange, QuantizedWeight
from qvlm.capture import Stream, linears_entered
from qvlm.checkpoint import QuantizedLinear
from qvlm.errors import RecipeError
from qvlm.methods.method import Block, BlockResult, Context, State
from qvlm.recipe import Format, Recipe
from qvlm.scales import search_scales

OPTIONS: Mapping[str, Any] = {"scales": "max"}  # max, search


def quantized_linear(
    weight: QuantizedWeight,
    format_: Format,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> QuantizedLinear:
    """Torch integers as the checkpoint's numpy form."""
    return QuantizedLinear(
        weight.integers.numpy(),
        weight.scale.numpy(),
        format_,
        None if weight.zero_point is None else weight.zero_point.numpy(),
        None if input_scale is None else input_scale.float().numpy(),
        None if input_zero_point is None else input_zero_point.to(torch.int32).numpy(),
    )


def round_to_nearest(
    weight: Tensor,
    format_: Format,
    inputs: ActivationRange | None = None,
    clip: float = 1.0,
    scale: Tensor | None = None,
) -> QuantizedLinear:
    """One weight [out, in] by steps 1 and 2; ``inputs`` is needed if the format's activations are static.

    scale: searched scales of a symmetric format, in place of ``clip`` times the maximum.
    """
    scheme, activations = format_.weights, format_.activations
    if scheme is None:
        raise ValueError(f"format {format_.name!r} quantizes no weight")
    quantized = affine.quantize_weight(weight.detach(), scheme, scale, clip=clip)
    if activations is None or not activations.static:
        return quantized_linear(quantized, format_)
    if inputs is None:
        raise ValueError(f"format {format_.name!r} needs the range of the inputs")
    scale, zero_point = affine.activation_parameters(inputs.low, inputs.high, activations)
    return quantized_linear(quantized, format_, scale, zero_point)


def static_linears(
    linears: Mapping[str, nn.Linear], formats: Mapping[str, Format]
) -> dict[str, nn.Linear]:
    """Those linears whose format fixes the activation scale by calibration."""
    return {
        name: linear
        for name, linear in linears.items()
        if (activations := formats[name].activations) is not None and activations.static
    }


def input_ranges(block: Block, index: int, hidden: list[Tensor]) -> dict[str, ActivationRange]:
    """Minimum and maximum over all samples of what each static linear of layer ``index`` sees, given its inputs."""
    linears = static_linears(block.layer_linears(index), block.formats)
    ranges: dict[str, ActivationRange] = {}
    if not linears:
        return ranges
    for sample, state in enumerate(hidden):
        seen = linears_entered(block.stream, index, linears, state, sample)
        for name, x in seen.items():
            activations = block.formats[name].activations
            assert activations is not None
            found = affine.activation_range(x, activations, block.image_masks[sample])
            ranges[name] = found.union(ranges[name]) if name in ranges else found
    return ranges


def searched_scales(block: Block, index: int, hidden: list[Tensor]) -> dict[str, Tensor]:
    """Step 1's search for every symmetric linear of layer ``index``, given its inputs."""
    linears = {
        name: linear
        for name, linear in block.layer_linears(index).items()
        if (scheme := block.formats[name].weights) is not None and scheme.symmetric
    }
    energy: dict[str, Tensor] = {}
    for sample, state in enumerate(hidden):
        seen = linears_entered(block.stream, index, linears, state, sample)
        for name, x in seen.items():
            part = x.reshape(-1, x.shape[-1]).float().square().sum(0)
            energy[name] = energy[name] + part if name in energy else part
    found = {}
    for name, sums in energy.items():
        scheme = block.formats[name].weights
        assert scheme is not None
        # A positive scale in every format: what the baseline is in engines, it is in simulation.
        positive = replace(scheme, signed_scales=False)
        found[name] = search_scales(linears[name].weight, positive, sums)
    return found


class RoundToNearest:
    """The method ``rtn``."""

    options: Mapping[str, Any] = OPTIONS

    def check(self, recipe: Recipe) -> None:
        """RecipeError for a value that makes no sense."""
        scales = recipe.options.get("scales", OPTIONS["scales"])
        if scales not in ("max", "search"):
            raise RecipeError(f"option scales: {scales!r}, expected max or search")

    def prepare(self, context: Context) -> State:
        """Prepares nothing."""
        return {}

    def partition(self, stream: Stream, recipe: Recipe, state: State) -> list[tuple[int, int]]:
        """One layer per block."""
        return [(i, i + 1) for i in range(len(stream.layers))]

    def quantize_block(self, block: Block, recipe: Recipe, state: State) -> BlockResult:
        """Each linear on its own."""
        ranges = input_ranges(block, block.start, block.quant_inputs)
        scales: dict[str, Tensor] = {}
        if recipe.options.get("scales", OPTIONS["scales"]) == "search":
            scales = searched_scales(block, block.start, block.quant_inputs)
        return BlockResult(
            {
                name: round_to_nearest(
                    linear.weight, block.formats[name], ranges.get(name), scale=scales.get(name)
                )
                for name, linear in block.linears.items()
            },
            {},
        )
