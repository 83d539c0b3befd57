"""Q-VLM's searches: joint = brute force, never worse than layer-wise, equal to it on one layer,
prefixes shared.

Run: python -m pytest tests/core/test_rounding.py -q
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qvlm.rounding import Search, joint_search, layerwise_search, squared_error

GRID = (1.0, 0.9, 0.8, 0.7, 0.5)


class Chain:
    """Layers y = relu(x W) whose candidate rounds W to four bits with the grid's clip; counts
    runs.
    """

    def __init__(self, seed: int, layers: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = [torch.randn(6, 6, generator=generator).double() for _ in range(layers)]
        self.inputs = [torch.randn(5, 6, generator=generator).double() for _ in range(3)]
        self.runs = 0

    def rounded(self, position: int, candidate: int) -> Tensor:
        weight = self.weights[position]
        scale = GRID[candidate] * weight.abs().max() / 7
        return torch.clamp(torch.round(weight / scale), -8, 7) * scale

    def layer(self, position: int, candidate: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        self.runs += 1
        return [torch.relu(h @ self.rounded(position, candidate)) for h in hidden]

    def targets(self) -> list[list[Tensor]]:
        outputs, hidden = [], self.inputs
        for weight in self.weights:
            hidden = [torch.relu(h @ weight) for h in hidden]
            outputs.append(hidden)
        return outputs

    def error(self, choice: Sequence[int]) -> float:
        hidden: Sequence[Tensor] = self.inputs
        for position, candidate in enumerate(choice):
            hidden = self.layer(position, candidate, hidden)
        return squared_error(hidden, self.targets()[-1])


def both(chain: Chain, counts: list[int]) -> tuple[Search, Search]:
    targets = chain.targets()
    return (
        joint_search(chain.layer, counts, chain.inputs, targets[-1]),
        layerwise_search(chain.layer, counts, chain.inputs, targets),
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_joint_is_the_brute_force_optimum(seed: int, layers: int) -> None:
    chain = Chain(seed, layers)
    joint, layerwise = both(chain, [5] * layers)
    errors = {choice: chain.error(choice) for choice in itertools.product(range(5), repeat=layers)}
    assert joint.choice == min(errors, key=lambda choice: (errors[choice], choice))
    assert joint.error == errors[joint.choice]
    assert layerwise.error == errors[layerwise.choice]
    assert joint.error <= layerwise.error


def test_joint_beats_layerwise_somewhere() -> None:
    """Otherwise the test above would hold for a search that is layer-wise in disguise."""
    gains = [b.error - a.error for a, b in (both(Chain(s, 3), [5, 5, 5]) for s in range(10))]
    assert sum(gain > 0 for gain in gains) >= 3


@pytest.mark.parametrize("seed", range(5))
def test_one_layer_blocks_equal_the_layerwise_search(seed: int) -> None:
    chain = Chain(seed, 3)
    targets, hidden = chain.targets(), chain.inputs
    choice: tuple[int, ...] = ()
    for position in range(3):

        def one(
            _: int, candidate: int, stream: Sequence[Tensor], at: int = position
        ) -> list[Tensor]:
            return chain.layer(at, candidate, stream)

        found = joint_search(one, [5], hidden, targets[position])
        choice += found.choice
        hidden = chain.layer(position, found.choice[0], hidden)
    layerwise = layerwise_search(chain.layer, [5, 5, 5], chain.inputs, targets)
    assert choice == layerwise.choice
    assert found.error == layerwise.error


@pytest.mark.parametrize(
    ("counts", "runs"), [([5, 5, 5], 155), ([5], 5), ([2, 3, 4], 32), ([1, 5], 6)]
)
def test_prefixes_are_shared(counts: list[int], runs: int) -> None:
    chain = Chain(0, len(counts))
    joint = joint_search(chain.layer, counts, chain.inputs, chain.targets()[-1])
    assert joint.runs == chain.runs == runs


def test_layerwise_runs() -> None:
    chain = Chain(0, 3)
    found = layerwise_search(chain.layer, [5, 5, 5], chain.inputs, chain.targets())
    assert found.runs == chain.runs == 15


def test_a_tie_clips_less() -> None:
    def same(position: int, candidate: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        return list(hidden)

    x = [torch.ones(2, 2)]
    assert joint_search(same, [5, 5], x, x) == Search((0, 0), 0.0, 30)
    assert layerwise_search(same, [5, 5], x, [x, x]) == Search((0, 0), 0.0, 10)


def test_only_one_stream_per_layer_is_alive() -> None:
    """Memory: depth first, so at most one stream per layer of the block besides the input."""
    import weakref

    chain = Chain(0, 3)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(position: int, candidate: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        nonlocal most
        outputs = chain.layer(position, candidate, hidden)
        alive.extend(weakref.ref(t) for t in outputs)
        alive[:] = [ref for ref in alive if ref() is not None]
        most = max(most, len(alive))
        return outputs

    joint_search(watched, [5, 5, 5], chain.inputs, chain.targets()[-1])
    assert most <= 3 * len(chain.inputs)
