"""The contract between a quantization method and the driver (``quantize.py``).

The driver walks the components (vision, projector, text, head). For each it asks the method how to cut the layers
into blocks, then gives it one block at a time with the float stream and the quantized stream that enter it; the
method answers with integers. A block is a list of consecutive layers: one layer for round to nearest, GPTQ and AWQ;
as ``entropy`` cuts them for Q-VLM. That is how all methods share one driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt
from torch import Tensor, nn

from qvlm.capture import Sample, Stream
from qvlm.checkpoint import QuantizedLinear
from qvlm.models.adapter import Adapter
from qvlm.progress import Progress
from qvlm.recipe import Format, Recipe

# What ``prepare`` found, by name; kept in the work directory so that a resumed run does not prepare again.
State = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Context:
    """What a method may look at before the first block: the float model and every sample.

    formats: for each component, full linear name -> format, quantized linears only. The model's weights must be as
    found when ``prepare`` returns.
    """

    model: nn.Module
    adapter: Adapter
    samples: list[Sample]
    recipe: Recipe
    formats: Mapping[str, Mapping[str, Format]]


@dataclass(frozen=True)
class Block:
    """Consecutive layers [start, stop) of a stream, and the two hidden-state streams that enter them.

    linears and formats hold the linears to quantize only, by full name, in module order; the modules are still float.
    float_inputs[i] comes from the float model, quant_inputs[i] from the model with everything before the block
    already quantized; i counts the stream's samples; shapes [batch, tokens, hidden].
    """

    stream: Stream
    start: int
    stop: int
    linears: Mapping[str, nn.Linear]
    formats: Mapping[str, Format]
    float_inputs: list[Tensor]
    quant_inputs: list[Tensor]

    @property
    def component(self) -> str:
        """vision, projector, text or head."""
        return self.stream.component

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the block's layers."""
        return self.stream.names[self.start : self.stop]

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The block's layers."""
        return self.stream.layers[self.start : self.stop]

    @property
    def image_masks(self) -> list[Tensor]:
        """For each sample bool [batch, tokens], True on image tokens."""
        return self.stream.image_masks

    def layer_linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears to quantize in layer ``index`` of the stream (start <= index < stop)."""
        prefix = self.stream.names[index]
        return {
            name: linear
            for name, linear in self.linears.items()
            if name == prefix or name.startswith(prefix + ".")
        }

    def run(self, hidden: Tensor, sample: int) -> Tensor:
        """The whole block on one hidden state with the modules as they now are."""
        return self.stream.run(self.start, self.stop, hidden, sample)


@dataclass(frozen=True)
class BlockResult:
    """One block's integers by full linear name, and what the method reports about it (JSON values)."""

    linears: dict[str, QuantizedLinear]
    report: dict[str, Any]


class Method(Protocol):
    """A quantization method. Every function is deterministic in (weights, samples, recipe)."""

    # Options a recipe may give this method, with their defaults; the driver refuses others.
    options: Mapping[str, Any]

    def check(self, recipe: Recipe) -> None:
        """RecipeError for an option's value that makes no sense."""
        ...

    def prepare(self, context: Context) -> State:
        """Work that needs the whole model (e.g. clip ranges of the visual encoder); {} for none."""
        ...

    def partition(self, stream: Stream, recipe: Recipe, state: State) -> list[tuple[int, int]]:
        """Half-open ranges of layer indices, consecutive, that together cover the stream."""
        ...

    def quantize_block(self, block: Block, recipe: Recipe, state: State) -> BlockResult:
        """Integers for every linear of ``block.linears``. The modules must be float again on return."""
        ...


class Transform(Protocol):
    """An equivalent change of the float model before a method (``qvlm.transform``). Deterministic like a method."""

    # Options a recipe may give it, with their defaults.
    options: Mapping[str, Any]

    def check(self, model: nn.Module, adapter: Adapter, recipe: Recipe) -> None:
        """RecipeError for a model (maybe without weights) or options it cannot work with."""
        ...

    def find(self, context: Context, progress: Progress) -> State:
        """The decisions, from the model as earlier transforms left it; the model's weights stay as found."""
        ...

    def apply(self, context: Context, state: State) -> dict[str, Any]:
        """Change ``context.model`` in place by ``find``'s decisions; the report (JSON values)."""
        ...
