"""Quantizing in memory, component by component: what experiments use instead of the driver.

No checkpoint, no goldens, no resume. A ``Job`` can be copied half way, so that trials which share
their beginning do it once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qvlm import embedding, fakequant
from qvlm.capture import Sample, Stream, capture_inputs, capture_stream
from qvlm.methods import METHODS, Block, Context, Method, State
from qvlm.models.adapter import Adapter
from qvlm.plan import resolve
from qvlm.recipe import Recipe
from qvlm.transform import chosen, transform
from qvlm.untie import untied


def context_of(
    model: nn.Module, adapter: Adapter, samples: list[Sample], recipe: Recipe
) -> Context:
    """Where a job on the float ``model`` begins; RecipeError as ``plan.resolve``."""
    model = untied(model, adapter, recipe)
    return Context(model, adapter, samples, recipe, resolve(model, adapter, recipe))


@dataclass
class Job:
    """A model on its way from float to quantized, with the float streams of every component."""

    context: Context
    model: nn.Module
    streams: dict[str, Stream]

    @staticmethod
    def begin(context: Context) -> Job:
        """A copy of the context's float model, after the recipe's transforms, its embeddings as the recipe has them.

        ``context`` of the job is the one to prepare a method with: with transforms its model is the changed one.
        """
        if chosen(context.recipe):
            context = replace(context, model=copy.deepcopy(context.model))
            transform(context)
        model = copy.deepcopy(context.model)
        streams = {
            component: capture_stream(model, context.adapter, component, context.samples)
            for component in context.formats
        }
        # Behind the float streams, and in front of the first quantized one.
        embedded = embedding.resolve(model, context.adapter, context.recipe)
        embedding.apply(model, embedding.quantize(model, embedded, context.samples))
        return Job(context, model, streams)

    def copied(self) -> Job:
        """The same state on modules of its own."""
        model = copy.deepcopy(self.model)
        streams = {
            component: replace(
                stream, layers=tuple(model.get_submodule(name) for name in stream.names)
            )
            for component, stream in self.streams.items()
        }
        return Job(self.context, model, streams)

    def entering(self, component: str, layer: int = 0) -> list[Tensor]:
        """The quantized stream that enters a component, or one of its layers that stand side by side."""
        stream = self.streams[component]
        samples = [self.context.samples[i] for i in stream.samples]
        return capture_inputs(self.model, stream.layers[layer], samples)

    def block(
        self, component: str, start: int, stop: int, floats: list[Tensor], quants: list[Tensor]
    ) -> Block:
        """Layers [start, stop) as the method wants them."""
        stream, formats = self.streams[component], self.context.formats[component]
        linears: dict[str, nn.Linear] = {}
        for layer in stream.names[start:stop]:
            for name in formats:
                module = self.model.get_submodule(name)
                if (name == layer or name.startswith(layer + ".")) and isinstance(
                    module, nn.Linear
                ):
                    linears[name] = module
        chosen = {name: formats[name] for name in linears}
        return Block(stream, start, stop, linears, chosen, floats, quants)

    def run_component(self, component: str, method: Method, state: State) -> None:
        """Quantize one component in place."""
        stream = self.streams[component]
        floats, quants = stream.inputs, self.entering(component)
        for start, stop in method.partition(stream, self.context.recipe, state):
            if stream.entries and start:
                floats, quants = stream.entries[start], self.entering(component, start)
            block = self.block(component, start, stop, floats, quants)
            linears = method.quantize_block(block, self.context.recipe, state).linears
            floats = propagate(block, floats)
            fakequant.apply(self.model, linears)
            quants = propagate(block, quants)


def quantized(context: Context) -> Job:
    """A finished job: ``model`` has every component quantized by the recipe's method, ``context.model`` is the float
    model it was made from.
    """
    method = METHODS[context.recipe.method]
    job = Job.begin(context)
    state = method.prepare(job.context)
    for component in context.formats:
        job.run_component(component, method, state)
    return job


@torch.no_grad()
def propagate(block: Block, hidden: Sequence[Tensor]) -> list[Tensor]:
    """The block's outputs with its modules as they are."""
    return [block.run(h, i) for i, h in enumerate(hidden)]
