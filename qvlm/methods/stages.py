"""One layer while it is being quantized stage by stage: what GPTQ, GPTAQ and VLMQ share. Chooses no integers.

A stage is the linears that are given the same tensor (q, k, v of an attention; gate and up of an MLP), in the order
the layer calls them; nothing has to be known about the architecture. Statistics of a stage are measured with every
earlier stage already quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qvlm import affine
from qvlm.affine import ActivationRange, QuantizedWeight
from qvlm.capture import linears_entered
from qvlm.checkpoint import QuantizedLinear
from qvlm.errors import CalibrationError
from qvlm.fakequant import FakeQuantLinear, substituted
from qvlm.hessian import Statistics
from qvlm.methods.method import Block
from qvlm.methods.rtn import input_ranges, quantized_linear
from qvlm.recipe import ActivationScheme

Made = TypeVar("Made")


def call_stages(block: Block, index: int, linears: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names of the given linears of layer ``index``, grouped by the tensor they are given, in calling order."""
    calls: list[tuple[Tensor, list[str]]] = []
    with ExitStack() as stack, torch.no_grad():
        for name, linear in linears.items():

            def record(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                for tensor, names in calls:
                    if tensor is args[0]:
                        names.append(name)
                        return
                calls.append((args[0], [name]))

            stack.callback(linear.register_forward_pre_hook(record).remove)
        block.stream.forward(index, block.quant_inputs[0], 0)
    return [names for _, names in calls]


class StagedLayer:
    """The single layer of a block; its linears are replaced one by one by their simulation, here only.

    results holds the finished linears by name. ``fork`` gives an independent copy to try something on.
    """

    def __init__(self, block: Block) -> None:
        if block.stop != block.start + 1:
            raise ValueError("a staged layer is a block of one layer")
        if not block.quant_inputs:
            raise CalibrationError(
                f"{block.names[0]}: no calibration sample reaches it. Give samples that do (with images, for the "
                "vision part) or keep it in float."
            )
        self.block = block
        self.index = block.start
        self.stages = call_stages(block, block.start, block.linears)
        reached = {name for names in self.stages for name in names}
        if missing := sorted(set(block.linears) - reached):
            raise CalibrationError(
                f"{missing[0]}: calibration sample {block.stream.samples[0]} does not reach this linear, so its "
                "inputs are unknown. Keep it in float or use method rtn for it."
            )
        self.results: dict[str, QuantizedLinear] = {}
        self._simulated: dict[str, Callable[[Tensor], Tensor]] = {}
        self._ranges: dict[str, ActivationRange] = {}

    def fork(self) -> StagedLayer:
        """A copy that shares the block and nothing that changes."""
        other = object.__new__(StagedLayer)
        other.block, other.index, other.stages = self.block, self.index, self.stages
        other.results, other._simulated = dict(self.results), dict(self._simulated)
        other._ranges = dict(self._ranges)
        return other

    @contextmanager
    def quantized(self) -> Iterator[None]:
        """While open, the finished linears of the layer compute as the quantized model will."""
        with substituted(self.block.linears, self._simulated):
            yield

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Puts the linear's name before the message of a CalibrationError."""
        try:
            yield
        except CalibrationError as error:
            raise CalibrationError(f"{name}: {error}") from error

    def per_inputs(
        self, statistics: Mapping[str, Statistics], make: Callable[[Statistics], Made]
    ) -> dict[str, Made]:
        """``make`` of every linear's statistics, called once for those that share them; its errors name the linear."""
        found: dict[int, Made] = {}
        for name, sums in statistics.items():
            if id(sums) not in found:
                with self.naming(name):
                    found[id(sums)] = make(sums)
        return {name: found[id(sums)] for name, sums in statistics.items()}

    def statistics(
        self,
        names: Sequence[str],
        *,
        asymmetric: bool = False,
        weights: Mapping[str, Sequence[Tensor]] | None = None,
        samples: Sequence[int] | None = None,
    ) -> dict[str, Statistics]:
        """H (and D if ``asymmetric``) of each linear of a stage over ``samples`` (default: all).

        weights[name][sample] is c [tokens]. Linears whose inputs and weights are the same share one object.
        CalibrationError naming the linear and the sample if what it is given there, on either stream, is not finite.
        """
        block = self.block
        linears = {name: block.linears[name] for name in names}
        self._find_ranges(names)
        keys: dict[str, Any] = {
            name: (block.formats[name].activations, None if weights is None else id(weights[name]))
            for name in names
        }
        shared = {
            keys[name]: Statistics(linear.in_features, asymmetric)
            for name, linear in linears.items()
        }
        for sample in range(len(block.quant_inputs)) if samples is None else samples:
            with self.quantized():
                quant = linears_entered(
                    block.stream, self.index, linears, block.quant_inputs[sample], sample
                )
            target: dict[str, Tensor] = {}
            if asymmetric:
                target = linears_entered(
                    block.stream, self.index, linears, block.float_inputs[sample], sample
                )
            for key, name in {keys[name]: name for name in names}.items():
                c = None if weights is None else weights[name][sample]
                u = self._rounded(name, quant[name], block.image_masks[sample])
                for side, x in (("quantized", u), ("float", target.get(name))):
                    if x is not None and not bool(torch.isfinite(x).all()):
                        raise CalibrationError(
                            f"{name}: on calibration sample {block.stream.samples[sample]} its inputs on the {side} "
                            "stream are not finite, expected numbers. Look for an overflow in the float model on this "
                            "sample, or leave it out."
                        )
                shared[key].add(u, target.get(name), c)
        return {name: shared[keys[name]] for name in names}

    def _find_ranges(self, names: Sequence[str]) -> None:
        """Ranges of static activations of a stage, on all samples of the quantized stream (as rtn takes them)."""
        wanted = {name: self.block.linears[name] for name in names if name not in self._ranges}
        with self.quantized():
            part = replace(self.block, linears=wanted)
            self._ranges.update(input_ranges(part, self.index, self.block.quant_inputs))

    def _parameters(
        self, name: str
    ) -> tuple[ActivationScheme | None, Tensor | None, Tensor | None]:
        scheme, found = self.block.formats[name].activations, self._ranges.get(name)
        if scheme is None or found is None:
            return scheme, None, None
        return (scheme, *affine.activation_parameters(found.low, found.high, scheme))

    def _rounded(self, name: str, x: Tensor, image: Tensor) -> Tensor:
        """The linear's input as the quantized model sees it."""
        scheme, scale, zero_point = self._parameters(name)
        if scheme is None:
            return x
        return affine.fake_quantize_activation(x, scheme, scale, zero_point, image)

    def finish(self, name: str, weight: QuantizedWeight) -> None:
        """Give linear ``name`` its integers; later statistics see them."""
        _, scale, zero_point = self._parameters(name)
        result = quantized_linear(weight, self.block.formats[name], scale, zero_point)
        self.results[name] = result
        bias = self.block.linears[name].bias
        self._simulated[name] = FakeQuantLinear.from_quantized(result, bias).forward
