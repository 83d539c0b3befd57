"""Blocks of the tiny LLaVA as the driver hands them to a method, with a known error on the quantized stream."""

from __future__ import annotations

import torch
from tiny_models import IMAGE_TOKEN, prompts, tiny_llava

from qvlm.capture import Sample, Stream, capture_stream
from qvlm.methods.method import Block
from qvlm.models import ADAPTERS
from qvlm.recipe import named_format


def tiny_stream(component: str, samples: int, **changes: object) -> Stream:
    """The stream of a component of ``tiny_llava`` over prompts with one and two images."""
    model = tiny_llava(**changes)
    found: list[Sample] = []
    for seed in range(1, samples + 1):
        for ids, pixels in prompts(model, seed)[: samples - len(found)]:
            tokens = torch.tensor([ids])
            mask = tokens[0] == IMAGE_TOKEN
            found.append(Sample(tokens, pixels, mask, torch.zeros_like(mask)))
    stream = capture_stream(model, ADAPTERS["llava"], component, found)
    for layer in stream.layers:
        layer.requires_grad_(False)
    return stream


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
