"""Blocks of the tiny LLaVA as the driver hands them to a method, with a known error on the quantized stream."""

from __future__ import annotations

import torch
from tiny_models import IMAGE_TOKEN, prompts, tiny_llava
from transformers import LlavaForConditionalGeneration

from qvlm import importance
from qvlm.capture import Sample, Stream, capture_stream
from qvlm.checkpoint import QuantizedLinear
from qvlm.fakequant import FakeQuantLinear, substituted
from qvlm.fold import fold_scale, points
from qvlm.importance import Attention
from qvlm.methods import vlmq
from qvlm.methods.method import Block, Context
from qvlm.models import ADAPTERS
from qvlm.plan import resolve
from qvlm.recipe import Recipe, named_format


def tiny_stream(component: str, samples: int, **changes: object) -> Stream:
    """The stream of a component of ``tiny_llava`` over prompts with one and two images."""
    model = tiny_llava(**changes)
    stream = capture_stream(model, ADAPTERS["llava"], component, tiny_samples(model, samples))
    for layer in stream.layers:
        layer.requires_grad_(False)
    return stream


def tiny_samples(model: LlavaForConditionalGeneration, samples: int) -> list[Sample]:
    """Prompts with one and two images; the last three tokens count as the answer."""
    found: list[Sample] = []
    for seed in range(1, samples + 1):
        for ids, pixels in prompts(model, seed)[: samples - len(found)]:
            tokens = torch.tensor([ids])
            answer = torch.arange(len(ids)) >= len(ids) - 3
            found.append(Sample(tokens, pixels, tokens[0] == IMAGE_TOKEN, answer))
    return found


def tiny_context(recipe: Recipe, samples: int = 3, **changes: object) -> Context:
    """``tiny_llava`` with samples, before a method or transform of ``recipe``."""
    model = tiny_llava(**changes).requires_grad_(False)
    adapter = ADAPTERS["llava"]
    formats = resolve(model, adapter, recipe)
    return Context(model, adapter, tiny_samples(model, samples), recipe, formats)


def with_outliers(context: Context, component: str = "text") -> Context:
    """Every 16th channel behind a norm of the component a hundred times larger, its columns smaller; in place."""
    for point in points(context.model, context.adapter, component, context.formats[component]):
        if "norm" in point.source:
            scale = torch.ones(len(context.model.get_parameter(f"{point.source}.weight")))
            scale[::16] = 0.01
            fold_scale(context.model, point, scale)
    return context


def tiny_block(stream: Stream, format_name: str, error: float = 0.0, layer: int = 0) -> Block:
    """Layer ``layer`` of the stream with every linear in one format.

    error: standard deviation of what the quantized stream has on top, relative to each sample's own.
    """
    name = stream.names[layer]
    linears = {
        f"{name}.{key}" if key else name: module
        for key, module in stream.layers[layer].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    formats = {key: named_format(format_name) for key in linears}
    with torch.no_grad():
        floats = [stream.run(0, layer, hidden, i) for i, hidden in enumerate(stream.inputs)]
    generator = torch.Generator().manual_seed(5)
    quant = [
        f + error * f.std() * torch.randn(f.shape, generator=generator) if error else f.clone()
        for f in floats
    ]
    return Block(stream, layer, layer + 1, linears, formats, floats, quant)


def block_error(block: Block, results: dict[str, QuantizedLinear]) -> float:
    """Squared error of the block's output, quantized stream against float stream."""
    functions = {
        name: FakeQuantLinear.from_quantized(q, block.linears[name].bias).forward
        for name, q in results.items()
    }
    total = 0.0
    with torch.no_grad():
        for i, (f, u) in enumerate(zip(block.float_inputs, block.quant_inputs, strict=True)):
            wanted = block.run(f, i)
            with substituted(block.linears, functions):
                total += float((block.run(u, i) - wanted).square().sum())
    return total


def attention_of(block: Block) -> Attention:
    """The attention of a block of one layer."""
    found = vlmq.find_block_attention(block)
    assert found is not None
    return found


def attention_outputs(
    block: Block, attention: Attention, sample: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attn(U) and Attn(F) of a sample."""
    with torch.no_grad():
        return tuple(
            importance.attention_output(
                block.stream, block.start, attention, hidden[sample], sample
            )
            for hidden in (block.quant_inputs, block.float_inputs)
        )  # type: ignore[return-value]
