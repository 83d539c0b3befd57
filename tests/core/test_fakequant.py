"""Proves that the simulation is the checkpoint's arithmetic: a simulated linear is x^ times the dequantized weight plus
bias, in place or as a substitute, and substitutes leave no trace.

Run: python -m pytest tests/core/test_fakequant.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from qvlm import affine, fakequant
from qvlm.methods.rtn import round_to_nearest
from qvlm.recipe import FORMATS, ActivationScheme, Format, WeightScheme

GROUP = Format("g16", WeightScheme(4, "group", 16))


@pytest.mark.parametrize(
    "format_",
    [
        GROUP,
        FORMATS["w8a8"],
        FORMATS["w8a8-static"],
        Format("a4", WeightScheme(3, "tensor", None, False), ActivationScheme(4, "channel", False)),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_simulated_linear_is_the_dequantized_product(format_: Format, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 5, bias=bias))
    linear = model[0]
    assert isinstance(linear, nn.Linear)
    x = torch.randn(2, 3, 32)
    activations = format_.activations
    found = None if activations is None else affine.activation_range(x, activations)
    quantized = round_to_nearest(linear.weight, format_, found)
    offset = linear.bias.detach().double().numpy() if bias else 0.0
    fakequant.apply(model, {"0": quantized})
    x_hat = x
    if activations is not None:
        scale = None if quantized.input_scale is None else torch.from_numpy(quantized.input_scale)
        zero = quantized.input_zero_point
        x_hat = affine.fake_quantize_activation(
            x, activations, scale, None if zero is None else torch.from_numpy(zero)
        )
    expected = x_hat.double().numpy() @ quantized.dequantize().astype(np.float64).T + offset
    # 32 products and a bias summed in float32: each step rounds by 2^-24 of the absolute sum.
    absolute = np.abs(x_hat.numpy()) @ np.abs(quantized.dequantize()).T + np.abs(offset)
    assert (np.abs(model(x).numpy() - expected) <= 33 * 2.0**-24 * absolute).all()


def test_numpy_and_torch_dequantize_alike() -> None:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    for symmetric in (True, False):
        format_ = Format("f", WeightScheme(5, "group", 16, symmetric))
        quantized = round_to_nearest(weight, format_)
        assert format_.weights is not None
        values = affine.dequantize(affine.quantize_weight(weight, format_.weights))
        assert quantized.dequantize().tolist() == values.tolist()


def test_a_substitute_acts_while_open_and_is_gone_after_an_error() -> None:
    linear = nn.Linear(4, 4)
    x = torch.ones(1, 4)
    before = linear(x)
    with fakequant.substituted({"a": linear}, {"a": lambda x: x + 1}):
        assert torch.equal(linear(x), x + 1)
    with pytest.raises(ZeroDivisionError), fakequant.substituted({"a": linear}, {"a": torch.relu}):
        raise ZeroDivisionError
    assert torch.equal(linear(x), before)
