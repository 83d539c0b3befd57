"""Proves what ``fused`` is made of, part by part and by hand: a linear is its stages in turn, each with the statistics
it is owed; the block's loss weighs tokens; blocks and token weights follow their options.

Run: python -m pytest tests/core/test_fused_parts.py -q
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_blocks import tiny_block, tiny_context, tiny_stream

from qvlm import affine, importance, modality
from qvlm.descent import descend, target
from qvlm.hessian import damped, factored, revive_dead, shrunk
from qvlm.methods import METHODS, block_rounding, fused, gptq, vlmq
from qvlm.methods.block_rounding import BlockLoss
from qvlm.methods.held_out import Best, split
from qvlm.methods.method import Block
from qvlm.methods.stages import StagedLayer
from qvlm.recipe import Recipe, component_recipe
from qvlm.scales import column_importance, search_scales

# No solver and no re-fit: what remains is one linear at a time.
PARTS = {"alpha": 1.0, "scales": "conditional", "start": "residual", "shrinkage": 0.3, "damping": 0.2,
         "sweeps": 1, "refits": 0, "solver": "none"}  # fmt: skip


def recipe(**options: object) -> Recipe:
    return component_recipe("w3a16", "float", "float", method="fused", options=options)


@pytest.fixture(scope="module")
def block() -> Block:
    return tiny_block(tiny_stream("text", 4), "w3a16", error=0.1)


def test_a_linear_is_its_stages_in_turn(block: Block) -> None:
    """q, k and v, which see no linear quantized before them, put together from the kernels."""
    found = METHODS["fused"].quantize_block(block, recipe(**PARTS), {}).linears
    layer = StagedLayer(block)
    names = layer.stages[0]
    kept: list[str] = []
    fits, helds = (
        layer.statistics(names, asymmetric=True, samples=samples) for samples in split(4)
    )
    for name in names:
        weight, scheme = block.linears[name].weight, block.formats[name].weights
        assert scheme is not None
        scheme = replace(scheme, signed_scales=False)  # at three bits
        fit = fits[name]
        hessian = shrunk(revive_dead(fit.hessian)[0], 0.3)
        wanted = target(weight, factored(hessian, 0.2), fit.shift(weight), 1.0)
        best = Best(weight, helds[name])
        largest, _ = affine.weight_scales(weight.detach().float(), scheme)
        importance = column_importance(factored(hessian, 0.2), "conditional")
        for stage, scale in (("max", largest), ("searched", search_scales(weight, scheme, importance))):  # fmt: skip
            solved = gptq.gptq_matrix(
                wanted, hessian, scheme, gptq.Settings(damping=0.2), scales=(scale, None)
            )
            best.offer(stage, solved.quantized)
        cost = damped(hessian, 0.2)
        best.offer("descent", descend(best.weight, wanted, cost, scheme.bits, 1))
        kept.append(min(best.errors, key=lambda stage: best.errors[stage]))
        assert np.array_equal(found[name].integers, best.weight.integers.numpy())
        assert np.array_equal(found[name].scale, best.weight.scale.numpy())
    assert len(kept) == 3 and "descent" in kept


def test_the_loss_weighs_tokens(block: Block) -> None:
    results = METHODS["rtn"].quantize_block(block, recipe(), {}).linears
    weights = {name: torch.from_numpy(q.dequantize()) for name, q in results.items()}
    with torch.no_grad():
        targets = [block.run(h, i) for i, h in enumerate(block.float_inputs)]
        tokens = targets[0].shape[1]
        c = torch.rand(tokens, generator=torch.Generator().manual_seed(1))
        plain = BlockLoss(block, results, targets, None, "output")
        weighed = BlockLoss(block, results, targets, [c], "output")
        ones = BlockLoss(block, results, targets, [torch.ones(tokens)], "output")
        with_first = [float(loss(weights, 0)) for loss in (plain, weighed, ones)]
        functions = plain.functions(weights)
        hidden = block.quant_inputs[0]
        with block_rounding.substituted(block.linears, functions):
            errors = (block.run(hidden, 0) - targets[0])[0].square().sum(-1)
    assert with_first[0] == with_first[2]
    assert with_first == pytest.approx([float(e.mean()) for e in (errors, errors * c, errors)])


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The token weights of every block's loss."""
    found: list[Any] = []

    class Spied(BlockLoss):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            found.append(self.token_weights)

    monkeypatch.setattr(fused, "BlockLoss", Spied)
    return found


FAST: dict[str, Any] = {"start": "nearest", "scales": "max", "sweeps": 0, "steps": 1, "batch": 1}


def test_token_weights_reach_the_loss(block: Block, given: list[Any]) -> None:
    for mix in (0.5, 0.25):
        METHODS["fused"].quantize_block(block, recipe(weights="modality", mix=mix, **FAST), {})
        assert torch.equal(given[-1][0], modality.balanced(block.image_masks[0].reshape(-1), mix))
    assert len(given) == 2 and not torch.equal(given[0][0], given[1][0])


def test_vlmqs_factors_reach_the_loss(given: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the factors of the last layer's q, k, v and o; none where there is no attention."""
    monkeypatch.setattr(importance, "TOKENS_PER_CHANNEL", 0.01)
    solved: dict[str, list[torch.Tensor]] = {}
    token_weights = vlmq.AttentionSolver.token_weights

    def spy(*args: Any) -> Any:
        found = token_weights(*args)
        solved.update(found or {})
        return found

    monkeypatch.setattr(vlmq.AttentionSolver, "token_weights", spy)
    stream = tiny_stream("text", 2)
    first, second = (tiny_block(stream, "w3a16", error=0.1, layer=i) for i in (0, 1))
    linears, formats = (
        {**a, **b} for a, b in ((first.linears, second.linears), (first.formats, second.formats))
    )
    block = replace(first, stop=2, linears=linears, formats=formats)
    METHODS["fused"].quantize_block(block, recipe(weights="vlmq", **FAST), {})
    assert len(solved) == 8
    solved = {name: c for name, c in solved.items() if name in second.linears}  # the last layer's
    for sample, weights in enumerate(given[0]):
        total = np.mean([c[sample].double().numpy() for c in solved.values()], axis=0)
        # float32 sums of four.
        np.testing.assert_allclose(weights.numpy(), total / total.mean(), rtol=4 * 2.0**-23)
        assert weights.std() > 0.05
    # The projector has none; w8a8, since 128 does not divide its inputs.
    projector = tiny_block(tiny_stream("projector", 2), "w8a8")
    options = {**FAST, "weights": "vlmq", "solver_bits": 8}
    METHODS["fused"].quantize_block(projector, recipe(**options), {})
    assert len(given) == 2 and given[1] is None


def test_blocks_and_temper_follow_their_options(block: Block) -> None:
    for depth, blocks in ((1, [(0, 1), (1, 2)]), (2, [(0, 2)])):
        context = tiny_context(recipe(partition="fixed", depth=depth), samples=1)
        state = METHODS["fused"].prepare(context)
        stream = tiny_stream("text", 1)
        assert METHODS["fused"].partition(stream, context.recipe, state) == blocks
    name = next(iter(block.linears))
    sizes = [hidden.shape[:-1].numel() for hidden in block.quant_inputs]
    curvature = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(2)) + 0.1
    settings = fused.Settings(weights="curvature", temper=2.0)
    found = fused.token_weights(block, [name], settings, {f"curvature.{name}": curvature.numpy()})
    assert found is not None and [len(c) for c in found] == sizes
    expected = (curvature / curvature.mean()).square()
    # Float32: two means over these tokens and a square, each a few units in the last place (6e-8).
    torch.testing.assert_close(torch.cat(found), expected / expected.mean(), rtol=1e-5, atol=0)


def test_few_samples_get_fewer_steps() -> None:
    """16 samples: 14 fitted, 5 passes over them in batches of 4 are 17.5 steps; rates follow them."""
    settings = fused.Settings()
    few, many = settings.descent(16, 3), settings.descent(128, 3)
    assert (few.steps, many.steps, many.seed) == (18, 60, 3)
    assert (few.rate, many.rate) == (1 / 18, 1 / 60)
    assert few.scale_rate == pytest.approx(0.1 / 18, rel=1e-15)
    assert fused.Settings(steps=9, passes=1).descent(128, 0).steps == 9
    assert fused.Settings(rate=0.5).descent(16, 0).rate == 0.5
    assert fused.Settings(batch=100, passes=1).descent(2, 0).steps == 1


def test_the_solver_takes_these_steps(block: Block) -> None:
    """4 samples, 3 fitted, 2 passes by one: 6 steps, judged after each 4 and at the end."""
    options = {
        "start": "nearest",
        "scales": "max",
        "sweeps": 0,
        "batch": 1,
        "every": 4,
        "passes": 2,
    }
    result = METHODS["fused"].quantize_block(block, recipe(**options), {})
    assert [step for step, _ in result.report["solver"]["held_out"]] == [0, 4, 6]


def test_joint_rounding_is_left_out_above_three_bits() -> None:
    options = {"start": "nearest", "scales": "max", "sweeps": 0, "steps": 1, "batch": 1}
    for name, solved in (("w3a16", True), ("w4a16", False)):
        block = tiny_block(tiny_stream("text", 2), name, error=0.1)
        rules = component_recipe(name, "float", "float", method="fused", options=options)
        result = METHODS["fused"].quantize_block(block, rules, {})
        assert ("solver" in result.report) is solved
