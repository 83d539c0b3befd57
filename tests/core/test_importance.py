"""VLMQ's importance of tokens: where the attention is, against autograd and finite differences, and its guards.

python -m pytest tests/core/test_importance.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_blocks import attention_of, attention_outputs, tiny_block, tiny_stream

from qvlm import importance
from qvlm.fakequant import substituted
from qvlm.methods import vlmq
from qvlm.methods.method import Block


@pytest.fixture(scope="module")
def text_block() -> Block:
    return tiny_block(tiny_stream("text", 3), "w3a16", error=0.1)


@pytest.mark.parametrize(("component", "output"), [("text", "o_proj"), ("vision", "out_proj")])
def test_attention_is_found(component: str, output: str) -> None:
    block = tiny_block(tiny_stream(component, 1), "w8a8")
    found = attention_of(block)
    prefix = f"{block.names[0]}.self_attn."
    assert set(found.inputs) == {f"{prefix}{k}_proj" for k in "qkv"}
    assert found.output == prefix + output


def test_projector_has_no_attention() -> None:
    assert vlmq.find_block_attention(tiny_block(tiny_stream("projector", 1), "w8a8")) is None


def test_output_factor_is_the_closed_form(text_block: Block) -> None:
    """dL/dZ_o by autograd through the real layer equals 2 (Attn(U) - Attn(F))."""
    block, attention = text_block, attention_of(text_block)
    linear = block.linears[attention.output]
    for sample in range(len(block.quant_inputs)):
        output, target = attention_outputs(block, attention, sample)
        leaves: list[torch.Tensor] = []

        def run(x: torch.Tensor, leaves: list[torch.Tensor] = leaves) -> torch.Tensor:
            leaves.append(
                torch.nn.functional.linear(x, linear.weight, linear.bias).detach().requires_grad_()
            )
            return leaves[0]

        with torch.enable_grad(), substituted(block.linears, {attention.output: run}):
            again = importance.attention_output(
                block.stream, block.start, attention, block.quant_inputs[sample], sample
            )
            loss = (again - target).square().sum()
        gradient = torch.autograd.grad(loss, leaves[0])[0]
        expected = gradient.abs().mean(-1).reshape(-1)
        assert torch.equal(importance.output_importance(output, target), expected)


def test_the_attentions_output_has_the_residual(text_block: Block) -> None:
    """Attn(X) is what the second norm of the layer is given."""
    layer = text_block.layers[0]
    entered: list[torch.Tensor] = []
    norm = layer.get_submodule("post_attention_layernorm")
    with norm.register_forward_pre_hook(lambda m, args: entered.append(args[0])), torch.no_grad():
        text_block.run(text_block.quant_inputs[0], 0)
        found = importance.attention_output(
            text_block.stream, 0, attention_of(text_block), text_block.quant_inputs[0], 0
        )
    assert torch.equal(found, entered[0])


def test_input_factors_are_the_gradient(text_block: Block) -> None:
    """Central differences of L in float64 along the outputs of q, k and v of some tokens and channels."""
    block, attention = text_block, attention_of(text_block)
    sample = 1
    _, target = attention_outputs(block, attention, sample)
    linears = {name: block.linears[name] for name in attention.inputs}
    found, output = importance.input_importance(
        block.stream, block.start, attention, linears, block.quant_inputs[sample], target, sample
    )
    assert torch.equal(output, attention_outputs(block, attention, sample)[0])
    tokens = output.shape[1]
    token = tokens // 2
    for name, linear in linears.items():
        assert found[name].shape == (tokens,)
        moves = torch.zeros(linear.out_features)
        for channel in range(linear.out_features):
            losses = []
            for step in (1e-2, -1e-2):

                def run(
                    x: torch.Tensor, linear: Any = linear, c: int = channel, s: float = step
                ) -> Any:
                    z = torch.nn.functional.linear(x, linear.weight, linear.bias)
                    z[0, token, c] += s
                    return z

                with torch.no_grad(), substituted(linears, {name: run}):
                    moved = importance.attention_output(
                        block.stream, block.start, attention, block.quant_inputs[sample], sample
                    )
                losses.append(float((moved.double() - target.double()).square().sum()))
            moves[channel] = (losses[0] - losses[1]) / 2e-2
        # The loss is near 1e3 with float32 forwards (1e-7 relative) divided by the step, and curvature is second
        # order: two digits of the mean are what central differences can show.
        assert float(found[name][token]) == pytest.approx(float(moves.abs().mean()), rel=0.02)


def test_relative_factors() -> None:
    assert torch.equal(importance.relative(torch.zeros(5)), torch.ones(5))
    assert torch.equal(importance.relative(torch.full((5,), 0.3)), torch.ones(5))
    g = torch.tensor([1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 0.01, 40.0])
    found = importance.relative(g)
    mean = g.double().mean()
    q1, q3 = np.quantile((g.double() / mean).numpy(), [0.25, 0.75])
    # float32 of a float64 value.
    assert float(found[-1]) == pytest.approx(q3 + 1.5 * (q3 - q1), rel=2**-24)
    assert float(found[-2]) == pytest.approx(importance.FLOOR, rel=2**-24)
    assert torch.equal(found[:6].argsort(), g[:6].argsort())


def test_temper_keeps_enough_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    heavy = [torch.rand(50, generator=generator).pow(8) + 1e-3 for _ in range(4)]
    for channels in (1, 10, 30, 45, 49):
        found, temperature = importance.tempered(heavy, channels, 4, range(4))
        assert importance.effective(found) >= importance.TOKENS_PER_CHANNEL * channels
        if temperature < 1:
            step = importance.TEMPERATURES[importance.TEMPERATURES.index(temperature) - 1]
            before = [c.pow(step) for c in heavy]
            assert importance.effective(before) < importance.TOKENS_PER_CHANNEL * channels
    found, temperature = importance.tempered(heavy, 60, 4, range(4))
    assert temperature == 0.0 and all(torch.equal(c, torch.ones(50)) for c in found)
    # Two bits want twice the tokens: what is enough for twice the channels.
    for channels in (2, 6, 20):
        two, four = (
            importance.tempered(heavy, n, b, range(4))
            for n, b in ((channels, 2), (2 * channels, 4))
        )
        assert two[1] == four[1]
    assert (
        importance.tempered(heavy, 6, 2, range(4))[1]
        < importance.tempered(heavy, 6, 3, range(4))[1]
    )


def test_rounding_noise_is_no_importance() -> None:
    target = torch.randn(1, 9, 32)
    assert importance.is_noise(target, target)
    assert importance.is_noise(target * (1 + 2.0**-22), target)
    assert not importance.is_noise(target * (1 + 2.0**-12), target)
