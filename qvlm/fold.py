"""Channel scales folded into a float model: the model computes the same function with other weights.

With s one positive number per channel of what some linears read, W' = W diag(s) reads x / s as W reads x. The
operation before gives x / s itself: a norm with gain g / s and bias b / s, a linear with rows W / s and bias b / s.
Nothing is added at run time. Where that is possible in an architecture is data (``models.adapter.ScalePair``); this
file reads it and changes the weights. It chooses no scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.models.adapter import Adapter, ScalePair


@dataclass(frozen=True)
class Heads:
    """An attention's value projection: ``shared`` query heads read each of its heads of ``width`` channels."""

    shared: int
    width: int


@dataclass(frozen=True)
class Point:
    """A scale pair in layer ``index`` of a component, all names full.

    heads is None unless the source is a value projection.
    """

    component: str
    index: int
    source: str
    targets: tuple[str, ...]
    owner: str
    heads: Heads | None = None

    def branch(self, layer: str) -> str:
        """Full name of the layer's child that holds the owner: the attention or the MLP; the layer if it is it."""
        child = self.owner[len(layer) + 1 :].partition(".")[0]
        return f"{layer}.{child}" if child else layer

    def spread(self, scale: Tensor) -> Tensor:
        """The targets' scale [in] from the source's [channels]."""
        if self.heads is None:
            return scale
        values = scale.reshape(-1, 1, self.heads.width)
        return values.expand(-1, self.heads.shared, -1).reshape(-1)

    def gathered(self, channels: Tensor) -> Tensor:
        """For each channel of the source the target channels [channels, shared] that read it, from [in]."""
        if self.heads is None:
            return channels[:, None]
        return (
            channels.reshape(-1, self.heads.shared, self.heads.width).transpose(1, 2).flatten(0, 1)
        )


def points(
    model: nn.Module, adapter: Adapter, component: str, quantized: Iterable[str]
) -> list[Point]:
    """Where scales fold for the linears ``quantized`` (full names) of a component, in the order layers run.

    A pair none of whose targets is quantized is left out.
    """
    chosen = set(quantized)
    found = []
    for index, layer in enumerate(adapter.layer_names(model, component)):
        for pair in adapter.scale_pairs:
            if pair.component == component:
                point = _point(model, adapter, pair, layer, index)
                if chosen & set(point.targets):
                    found.append(point)
    return found


def value_points(model: nn.Module, adapter: Adapter, component: str) -> list[Point]:
    """The value projections of a component, quantized or not."""
    return [
        _point(model, adapter, pair, layer, index)
        for index, layer in enumerate(adapter.layer_names(model, component))
        for pair in adapter.scale_pairs
        if pair.component == component and pair.values
    ]


def _point(model: nn.Module, adapter: Adapter, pair: ScalePair, layer: str, index: int) -> Point:
    source = full_name(layer, pair.source)
    targets = tuple(full_name(layer, path) for path in pair.targets)
    heads = None
    if pair.values:
        width = adapter.head_dim(model.config, pair.component)
        value, output = (model.get_submodule(name) for name in (source, targets[0]))
        assert isinstance(value, nn.Linear) and isinstance(output, nn.Linear)
        heads = Heads(output.in_features // value.out_features, width)
    return Point(pair.component, index, source, targets, full_name(layer, pair.owner), heads)


def full_name(layer: str, path: str) -> str:
    """A path of ``ScalePair`` in a layer as a full module name."""
    if path.startswith("/"):
        return path[1:]
    return f"{layer}.{path}" if path else layer


def unfolded(adapter: Adapter, names: Iterable[str], found: Iterable[Point]) -> dict[str, str]:
    """The linears of ``names`` that no point of ``found`` scales, with the reason."""
    folded = {name for point in found for name in point.targets}
    reasons = {}
    for name in names:
        if name not in folded:
            known = (why for pattern, why in adapter.unfolded.items() if fnmatchcase(name, pattern))
            reasons[name] = next(known, "no scale pair is known for it")
    return reasons


@torch.no_grad()
def fold_scale(model: nn.Module, point: Point, scale: Tensor) -> None:
    """Fold a scale [channels of the source], positive, into the point's weights, in place.

    Products are formed in float64 and rounded once; a scale of one changes no bit.
    """
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"{point.source}: a channel scale is not positive and finite")
    s = scale.double()
    source: Any = model.get_submodule(point.source)
    rows = s[:, None] if source.weight.ndim == 2 else s
    source.weight.copy_(source.weight.double() / rows)
    if getattr(source, "bias", None) is not None:
        source.bias.copy_(source.bias.double() / s)
    for name in point.targets:
        target: Any = model.get_submodule(name)
        target.weight.copy_(target.weight.double() * point.spread(s))


def fold_scales(
    model: nn.Module, found: Iterable[Point], scales: Mapping[str, Any]
) -> dict[str, float]:
    """Fold the scale of every point, by the source's name; how far each reaches (largest over smallest)."""
    spreads = {}
    for point in found:
        scale = torch.as_tensor(scales[point.source])
        fold_scale(model, point, scale)
        spreads[point.source] = float(scale.max() / scale.min())
    return spreads
