"""Q-VLM's search of rounding functions over the layers of one block; knows candidates by number,
not what they are.

Joint search (Eq. 3):       the tuple of candidates whose block output is nearest to the float
output, all tuples tried. Layer-wise search (Eq. 2):  each layer in order takes the candidate whose
own output is nearest to the float output.

Both run on the quantized stream: a layer's input is what the layers before it, quantized, produced.
With c candidates and d layers the joint search runs c + c^2 + ... + c^d layers instead of d c^d,
because tuples with the same beginning share it (5 candidates, 3 layers: 155 instead of 375). It
goes depth first and holds one stream per layer of the block, whatever c is.

Error: sum of squared differences over all samples, tokens and channels, float64. Ties go to the
tuple that comes first in lexicographic order; candidate 0 is the widest range (no clipping) by
convention, so a tie clips less.

Source: Q-VLM (NeurIPS 2024, arXiv 2410.08119v3), Eq. 2 and 3. The paper does not say that its
search is exhaustive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

# (position in the block, candidate, one hidden state per sample) -> one hidden state per sample.
Layer = Callable[[int, int, Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Search:
    """Result: the choice per layer, its error at the block's output, and how many layer runs it
    took.
    """

    choice: tuple[int, ...]
    error: float
    runs: int


def squared_error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Sum over samples of |output - target|^2, float64."""
    return sum(
        float((output.double() - target.double()).square().sum())
        for output, target in zip(outputs, targets, strict=True)
    )


def joint_search(
    layer: Layer, candidates: Sequence[int], inputs: Sequence[Tensor], targets: Sequence[Tensor]
) -> Search:
    """Eq. 3. ``candidates[i]``: how many layer i of the block has; ``targets``: the float block's
    outputs.
    """
    best: list[tuple[float, tuple[int, ...]]] = []
    runs = 0

    def descend(prefix: tuple[int, ...], stream: Sequence[Tensor]) -> None:
        nonlocal runs
        if len(prefix) == len(candidates):
            error = squared_error(stream, targets)
            if not best or error < best[0][0]:
                best[:] = [(error, prefix)]
            return
        for candidate in range(candidates[len(prefix)]):
            runs += 1
            descend((*prefix, candidate), layer(len(prefix), candidate, stream))

    descend((), inputs)
    error, choice = best[0]
    return Search(choice, error, runs)


def layerwise_search(
    layer: Layer,
    candidates: Sequence[int],
    inputs: Sequence[Tensor],
    targets: Sequence[Sequence[Tensor]],
) -> Search:
    """Eq. 2. ``targets[i]``: float outputs of layer i; the returned error is that of the last
    layer's output.
    """
    choice: tuple[int, ...] = ()
    stream, error, runs = inputs, 0.0, 0
    for position, count in enumerate(candidates):
        found: tuple[float, int, list[Tensor]] | None = None
        for candidate in range(count):
            outputs = layer(position, candidate, stream)
            runs += 1
            distance = squared_error(outputs, targets[position])
            if found is None or distance < found[0]:
                found = (distance, candidate, outputs)
        assert found is not None, "every layer has at least one candidate"
        error, selected, stream = found
        choice = (*choice, selected)
    return Search(choice, error, runs)
