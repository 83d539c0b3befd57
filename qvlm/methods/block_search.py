"""The candidates of one block and the searches over them: what ``rounding`` searches, on real
layers.

Candidate number c of a layer stands for one choice of its linears' ranges, the same for all of
them: no weight group clipped below ``clip_ratios[c]`` of its range, a static activation at
``percentiles[c]``, or both (``methods.q_vlm``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvlm import entropy
from qvlm.capture import Stream
from qvlm.errors import RecipeError
from qvlm.fakequant import substituted
from qvlm.methods.method import Block, Context
from qvlm.ranges import Observed, Rounding, initial_inputs, initial_weight, observe, simulate
from qvlm.recipe import Format
from qvlm.rounding import Search, joint_search, layerwise_search, squared_error


class BlockSearch:
    """The candidates of one block and its two streams. Step 1 and 4 on tensors.

    known: initial weight clips [out, groups] by linear name, where an earlier step already found
    them.
    """

    def __init__(
        self, block: Block, options: Mapping[str, Any], known: Mapping[str, Tensor] | None = None
    ) -> None:
        self.block = block
        self.options = options
        self.count = options["search_samples"] or len(block.float_inputs)
        self.inputs: list[Tensor] = block.quant_inputs[: self.count]
        self.targets: list[list[Tensor]] = []  # float outputs of each layer of the block
        self.observed: dict[str, Observed] = {}
        self.initial: dict[str, Rounding] = {}
        hidden: Sequence[Tensor] = block.float_inputs
        for index in range(block.start, block.stop):
            linears = block.layer_linears(index)
            seen, outputs = observe(
                block.stream,
                index,
                linears,
                block.formats,
                hidden,
                options["init_norm"],
                options["init"],
            )
            self.observed.update(seen)
            for name, linear in linears.items():
                self.initial[name] = self._initial(name, linear, (known or {}).get(name))
            self.targets.append(outputs[: self.count])
            hidden = outputs
        self._functions: dict[tuple[int, int], dict[str, Any]] = {}

    def _initial(self, name: str, linear: nn.Linear, known: Tensor | None) -> Rounding:
        format_, observed, init = (
            self.block.formats[name],
            self.observed[name],
            self.options["init"],
        )
        clip = (
            known if known is not None else initial_weight(linear.weight, format_, observed, init)
        )
        if self._moves(format_)[1]:
            return Rounding(clip)  # every candidate brings its own activation range
        return Rounding(clip, initial_inputs(format_, observed, init))

    def _moves(self, format_: Format) -> tuple[bool, bool]:
        """Does a candidate move this format's weight range, its activation range?"""
        static = format_.activations is not None and format_.activations.static
        search = self.options["search"]
        if search == "auto":
            search = "both" if static else "weights"
        return search in ("weights", "both"), static and search in ("activations", "both")

    def candidates(self, position: int) -> int:
        """How many rounding functions layer ``position`` of the block has."""
        linears = self.block.layer_linears(self.block.start + position)
        counts = {1}
        for name in linears:
            weights, activations = self._moves(self.block.formats[name])
            if weights:
                counts.add(len(self.options["clip_ratios"]))
            if activations:
                counts.add(len(self.options["percentiles"]))
        if len(counts) > 2:
            raise RecipeError(
                "q-vlm: clip_ratios and percentiles differ in length, but a candidate moves both. "
                "Give as many of each, or choose one with the option search."
            )
        return max(counts)

    def rounding(self, name: str, candidate: int) -> Rounding:
        """Candidate number ``candidate`` of linear ``name``."""
        format_, start = self.block.formats[name], self.initial[name]
        weights, activations = self._moves(format_)
        if weights:
            ratio = self.options["clip_ratios"][candidate]
            full = self.options["init"] == "minmax"
            start = start.scaled(ratio) if full else start.at_least(ratio)
        if activations and format_.activations is not None:
            p = self.options["percentiles"][candidate]
            start = Rounding(start.clip, self.observed[name].percentile(format_.activations, p))
        return start

    def functions(self, position: int, candidate: int) -> dict[str, Any]:
        """The layer's linears under one candidate, by name; kept, as the search comes back to
        them.
        """
        key = (position, candidate)
        if key not in self._functions:
            linears = self.block.layer_linears(self.block.start + position)
            self._functions[key] = {
                name: simulate(linear, self.block.formats[name], self.rounding(name, candidate))
                for name, linear in linears.items()
            }
        return self._functions[key]

    def layer(self, position: int, candidate: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Layer ``position`` of the block under a candidate, on one hidden state per sample."""
        return self.run(position, self.functions(position, candidate), hidden)

    def run(
        self, position: int, functions: Mapping[str, Any], hidden: Sequence[Tensor]
    ) -> list[Tensor]:
        """Layer ``position`` of the block with these linears, on one hidden state per sample."""
        index = self.block.start + position
        linears = self.block.layer_linears(index)
        with torch.no_grad(), substituted(linears, functions):
            return [self.block.stream.forward(index, h, i) for i, h in enumerate(hidden)]

    @property
    def counts(self) -> list[int]:
        """Candidates of each layer of the block."""
        return [self.candidates(i) for i in range(self.block.stop - self.block.start)]

    def joint(self) -> Search:
        """Eq. 3."""
        return joint_search(self.layer, self.counts, self.inputs, self.targets[-1])

    def layerwise(self) -> Search:
        """Eq. 2."""
        return layerwise_search(self.layer, self.counts, self.inputs, self.targets)

    def refined(self, choice: Sequence[int]) -> tuple[dict[str, int], float]:
        """Granularity "linear": candidate per linear and the block's error, never above that of
        ``choice``.
        """
        picked = {
            name: choice[position]
            for position in range(len(choice))
            for name in self.block.layer_linears(self.block.start + position)
        }
        chosen = [dict(self.functions(i, c)) for i, c in enumerate(choice)]

        def error_from(position: int, stream: Sequence[Tensor]) -> float:
            for later in range(position, len(chosen)):
                stream = self.run(later, chosen[later], stream)
            return squared_error(stream, self.targets[-1])

        stream: Sequence[Tensor] = self.inputs
        best = error_from(0, stream)
        for position in range(len(choice)):
            for name in self.block.layer_linears(self.block.start + position):
                if not self._moves(self.block.formats[name])[0]:
                    continue
                for candidate in range(len(self.options["clip_ratios"])):
                    if candidate == picked[name]:
                        continue
                    before = chosen[position][name]
                    chosen[position][name] = self.functions(position, candidate)[name]
                    error = error_from(position, stream)
                    if error < best:
                        best, picked[name] = error, candidate
                    else:
                        chosen[position][name] = before
            stream = self.run(position, chosen[position], stream)
        return picked, best


def dependencies(stream: Stream, bits: int, exponent: int) -> tuple[list[float], list[float]]:
    """D(k, k+1) of consecutive layers and H(k) of every layer's input, one pass, two hidden states
    in memory.
    """
    pairs: list[float] = []
    entropies: list[float] = []
    hidden: list[Tensor] = stream.inputs
    for index in range(len(stream.layers) - 1):
        with torch.no_grad():
            after = [stream.forward(index, h, i) for i, h in enumerate(hidden)]
        found = entropy.dependency(hidden, after, bits, exponent)
        pairs.append(found.conditional)
        entropies.append(found.entropy_before)
        hidden = after
        if index == len(stream.layers) - 2:
            entropies.append(found.entropy_after)
    return pairs, entropies


def pair_block(
    context: Context, stream: Stream, start: int, stop: int, hidden: list[Tensor]
) -> Block:
    """Layers [start, stop) as a block whose quantized stream is the float one: the block's own
    error alone.
    """
    formats = context.formats["text"]
    names = stream.names[start:stop]
    linears = {
        name: linear
        for name, linear in context.adapter.linears(context.model, "text").items()
        if name in formats and any(name.startswith(layer + ".") for layer in names)
    }
    return Block(stream, start, stop, linears, {n: formats[n] for n in linears}, hidden, hidden)


def pair_errors(context: Context, stream: Stream, options: Mapping[str, Any]) -> list[float]:
    """The control's proxy: output error of layers k and k+1 quantized at p = 1, float input,
    relative to the output's
    energy (the paper compares with "quantization error" without saying whose)."""
    scores: list[float] = []
    hidden: list[Tensor] = stream.inputs
    for index in range(len(stream.layers) - 1):
        search = BlockSearch(pair_block(context, stream, index, index + 2, hidden), options)
        outputs = search.layer(1, 0, search.layer(0, 0, search.inputs))
        energy = sum(float(t.double().square().sum()) for t in search.targets[1])
        scores.append(squared_error(outputs, search.targets[1]) / energy)
        with torch.no_grad():
            hidden = [stream.forward(index, h, i) for i, h in enumerate(hidden)]
    return scores
