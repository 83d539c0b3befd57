"""The torch simulation of a quantized checkpoint: what goldens, evaluation and methods run. No integer kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvlm import affine, modality
from qvlm.checkpoint import QuantizedLinear
from qvlm.models import ADAPTERS
from qvlm.recipe import ActivationScheme

# What a linear with static activations stores besides its weight.
STATIC = ("input_scale", "input_zero_point")


class FakeQuantLinear(nn.Module):
    """A linear with the dequantized weight [out, in] float32 and, if the format says so, a fake-quantized input."""

    weight: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activations: ActivationScheme | None,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.activations = activations
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero_point", input_zero_point)

    @staticmethod
    def from_quantized(quantized: QuantizedLinear, bias: Tensor | None) -> FakeQuantLinear:
        """The simulation of one quantized linear."""

        def optional(array: object) -> Tensor | None:
            return None if array is None else torch.as_tensor(array)

        return FakeQuantLinear(
            torch.from_numpy(quantized.dequantize()),
            None if bias is None else bias.detach(),
            quantized.activations,
            optional(quantized.input_scale),
            optional(quantized.input_zero_point),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self.activations is not None:
            x = affine.fake_quantize_activation(
                x,
                self.activations,
                self.input_scale,
                self.input_zero_point,
                modality.current(x) if self.activations.granularity == "modality" else None,
            )
        return F.linear(x, self.weight, self.bias)


def apply(model: nn.Module, quantized: Mapping[str, QuantizedLinear]) -> None:
    """Replace each named nn.Linear of the model by its simulation, in place.

    With a format that tells image tokens from text, the model follows its ids from now on (``modality``).
    """
    formats = (linear.activations for linear in quantized.values())
    if any(scheme is not None and scheme.granularity == "modality" for scheme in formats):
        adapter = ADAPTERS[str(model.config.model_type)]  # type: ignore[union-attr]
        modality.follow(model, adapter.image_token_id(model.config))
    for name, linear in quantized.items():
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        old = getattr(owner, child)
        setattr(owner, child, FakeQuantLinear.from_quantized(linear, old.bias))


@contextmanager
def substituted(
    linears: Mapping[str, nn.Linear], functions: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """While open, calling ``linears[name]`` calls ``functions[name]`` instead; the modules stay where they are.

    This is how a method tries a candidate inside a block without touching weights.
    """
    for name, function in functions.items():
        linears[name].__dict__["forward"] = function
    try:
        yield
    finally:
        for name in functions:
            linears[name].__dict__.pop("forward", None)
