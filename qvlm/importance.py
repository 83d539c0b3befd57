"""How much each token matters to the layer being quantized: VLMQ's factors, and the guards that make weights of them.

The attention sub-block of a pre-norm layer is Attn(X) = X + attention(norm(X)); the MLP is not part of it. With F the
hidden states on the float stream and U those on the quantized stream,

    L = | Attn(F) - Attn(U) |^2,      g_n(Z) = mean over channels c of | dL / dZ[n, c] |

for each projection output Z of the attention, n a token. One backward pass through the attention gives q, k and v.
For the output projection no backward pass is needed: Attn(U) = U + Z_o, so dL/dZ_o = 2 (Attn(U) - Attn(F)) exactly.

The same of a whole layer (scope "layer"): L = | Layer(F) - Layer(U) |^2. Its MLP reads Attn(U), so the output
projection takes a backward pass too.

Nothing here quantizes; the caller decides which linears are already replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvlm.capture import Stream
from qvlm.fakequant import substituted

# A deviation below this share of the output is float32 rounding: about 2^-23 for each of the few operations that add
# up to it. Its pattern over tokens means nothing.
ROUNDING_NOISE = 2.0**-20
# Bounds on factors, relative to their mean over a sample: Tukey's fences above, this below. A floor keeps H positive
# definite in the directions that only unimportant tokens use.
FLOOR = 0.1
# Equally weighted tokens per input channel that the weights must leave. A choice: fewer make H noisier than it is
# better aimed. Twice as many at two bits is a choice too, and was not measured.
TOKENS_PER_CHANNEL = 4.0
# Exponents tried on the weights until they do.
TEMPERATURES = (1.0, 0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True)
class Attention:
    """A layer's attention: ``inputs`` are the projections that share its input, ``output`` ends it.

    Full names; all linears of the module, quantized or not.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    output: str


def find_attention(
    layer: nn.Module, layer_name: str, stages: Sequence[Sequence[str]]
) -> Attention | None:
    """The submodule that owns the first linears the layer calls and ends with another one; None if there is none.

    stages: all linears of the layer as ``stages.call_stages`` groups them. A projector or a head owns its linears
    itself and has no attention.
    """
    owners = [{name.rpartition(".")[0] for name in names} for names in stages]
    if len(stages) < 2 or len(owners[0]) != 1 or owners[0] != owners[1] or len(stages[1]) != 1:
        return None
    owner = next(iter(owners[0]))
    if owner == layer_name or not owner.startswith(layer_name + "."):
        return None
    return Attention(
        layer.get_submodule(owner[len(layer_name) + 1 :]), tuple(stages[0]), stages[1][0]
    )


class _Stop(Exception):
    """Ends a layer's forward after its attention."""


def attention_output(
    stream: Stream, index: int, attention: Attention, hidden: Tensor, sample: int
) -> Tensor:
    """Attn(X) of layer ``index`` on a hidden state [batch, tokens, hidden]; the MLP is not run."""
    found: list[Tensor] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _Stop

    with ExitStack() as stack:
        stack.callback(attention.module.register_forward_hook(record).remove)
        try:
            stream.forward(index, hidden, sample)
        except _Stop:
            return hidden + found[0]
    raise RuntimeError(f"{stream.names[index]}: the layer did not call its attention")


def scope_output(
    stream: Stream, index: int, attention: Attention, scope: str, hidden: Tensor, sample: int
) -> Tensor:
    """What L compares: Attn(X) for scope "attention", the layer's output [batch, tokens, hidden] for "layer"."""
    if scope == "layer":
        return stream.forward(index, hidden, sample)
    return attention_output(stream, index, attention, hidden, sample)


def output_importance(output: Tensor, target: Tensor) -> Tensor:
    """g [tokens] of the output projection from Attn(U) and Attn(F): the closed form, no backward pass."""
    return (2 * (output - target)).abs().mean(-1).reshape(-1)


def input_importance(
    stream: Stream,
    index: int,
    attention: Attention,
    linears: Mapping[str, nn.Linear],
    hidden: Tensor,
    target: Tensor,
    sample: int,
    scope: str = "attention",
) -> tuple[dict[str, Tensor], Tensor]:
    """g [tokens] by name of some projections from one backward pass, and what L compares on the quantized stream.

    linears: the projections wanted; their outputs are the leaves of the graph, so nothing before them is
    differentiated. target: the same on the float stream.
    """
    leaves: dict[str, Tensor] = {}

    def projection(name: str, linear: nn.Linear) -> Any:
        def run(x: Tensor) -> Tensor:
            with torch.no_grad():
                z = F.linear(x, linear.weight, linear.bias)
            leaves[name] = z.requires_grad_(True)
            return leaves[name]

        return run

    functions = {name: projection(name, linear) for name, linear in linears.items()}
    with torch.enable_grad(), substituted(linears, functions):
        output = scope_output(stream, index, attention, scope, hidden.detach(), sample)
        loss = (output - target).square().sum()
        gradients = torch.autograd.grad(loss, [leaves[name] for name in linears])
    found = {
        name: gradient.abs().mean(-1).reshape(-1)
        for name, gradient in zip(linears, gradients, strict=True)
    }
    return found, output.detach()


def is_noise(output: Tensor, target: Tensor) -> bool:
    """Do the two streams differ by no more than float32 rounding?"""
    return float((output - target).abs().mean()) <= ROUNDING_NOISE * float(target.abs().mean())


def relative(importance: Tensor) -> Tensor:
    """Factors of one sample's tokens relative to their mean, within Tukey's fences and above ``FLOOR``.

    All ones where every factor is zero: both streams agree, so no token is better than another.
    """
    mean = importance.double().mean()
    if not float(mean) > 0:
        return torch.ones_like(importance)
    g = importance.double() / mean
    q1, q3 = torch.quantile(g, torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    reach = 1.5 * (q3 - q1)
    return g.clamp(q1 - reach, q3 + reach).clamp(min=FLOOR).to(importance.dtype)


def effective(weights: Sequence[Tensor]) -> float:
    """(sum c)^2 / sum c^2 over all samples."""
    every = torch.cat(list(weights)).double()
    return float(every.sum().square() / every.square().sum())


def tempered(
    weights: Sequence[Tensor], channels: int, bits: int, samples: Sequence[int]
) -> tuple[list[Tensor], float]:
    """c^t with the largest t of ``TEMPERATURES`` that leaves enough effective tokens in ``samples``, and that t.

    bits: of the weight that is solved. With fewer tokens than ``TOKENS_PER_CHANNEL`` per channel (twice that at two
    bits) all weights become one.
    """
    wanted = TOKENS_PER_CHANNEL * channels * (2 if bits <= 2 else 1)
    for temperature in TEMPERATURES[:-1]:
        found = [c.pow(temperature) for c in weights]
        if effective([found[i] for i in samples]) >= wanted:
            return found, temperature
    return [torch.ones_like(c) for c in weights], TEMPERATURES[-1]
