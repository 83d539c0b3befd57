"""Proves that held-out samples decide: the error they judge by is its definition, what they reject is not kept, and
integers fitted to shrunk statistics hold on inputs that fire rare channels in other proportions.

Run: python -m pytest tests/core/test_held_out.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import problem
from tiny_blocks import tiny_block, tiny_stream

from qvlm import affine
from qvlm.descent import descend, stream_error
from qvlm.hessian import Statistics, damped, factored, shrunk
from qvlm.methods import METHODS
from qvlm.methods.gptq import gptq_matrix
from qvlm.methods.held_out import HELD_OUT_EVERY, Best, split
from qvlm.recipe import WeightScheme, component_recipe
from qvlm.scales import column_importance, search_scales

SCHEME = WeightScheme(3, "group", 16)


def statistics(u: torch.Tensor, f: torch.Tensor | None = None) -> Statistics:
    found = Statistics(u.shape[1], asymmetric=f is not None)
    found.add(u, f)
    return found


def test_split_is_a_partition_and_keeps_a_sample_to_fit() -> None:
    for count in (2, 7, 8, 9, 40):
        fit, held = split(count)
        assert sorted(fit + held) == list(range(count)) and fit and held
        assert len(held) == max(1, count // HELD_OUT_EVERY)
    assert split(1) == ([0], [])


def test_stream_error_is_the_output_error_up_to_that_of_the_weight() -> None:
    weight, f, u, hessian, cross = problem()
    values = affine.dequantize(affine.quantize_weight(weight, SCHEME))

    def output_error(v: torch.Tensor) -> float:
        return float((u @ v.double().T - f @ weight.double().T).square().sum())

    wanted = output_error(values) - output_error(weight)
    # Sums of 300 x 6 products in float64, cancelled to a few per cent of themselves.
    assert stream_error(values, weight, hessian, weight.double() @ cross) == pytest.approx(
        wanted, rel=1e-9
    )
    alone = float((u @ (values - weight).double().T).square().sum())
    assert stream_error(values, weight, hessian, None) == pytest.approx(alone, rel=1e-9)
    assert stream_error(weight, weight, hessian, weight.double() @ cross) == 0.0


def test_best_keeps_what_helps_the_held_out_samples_only() -> None:
    weight, _, u, _, _ = problem()
    good = affine.quantize_weight(weight, WeightScheme(4, "group", 16))
    bad = affine.quantize_weight(weight, WeightScheme(2, "group", 16))
    best = Best(weight, statistics(u))
    for stage, candidate in (("first", bad), ("better", good), ("worse", bad)):
        best.offer(stage, candidate)
    assert best.weight is good
    assert best.errors["better"] < best.errors["first"] == best.errors["worse"]
    unjudged = Best(weight, None)
    for stage, candidate in (("first", good), ("last", bad)):
        unjudged.offer(stage, candidate)
    assert unjudged.weight is bad and not unjudged.errors
    with pytest.raises(ValueError, match="nothing was offered"):
        _ = Best(weight, None).weight


def test_best_judges_by_the_float_streams_outputs() -> None:
    weight, f, u, hessian, cross = problem()
    candidate = affine.quantize_weight(weight, SCHEME)
    best = Best(weight, statistics(u.float(), f.float()))
    best.offer("only", candidate)
    values = affine.dequantize(candidate)
    aimed = stream_error(values, weight, hessian, weight.double() @ cross)
    alone = stream_error(values, weight, hessian, None)
    # H and D are float32 products of 300 tokens there.
    assert best.errors["only"] == pytest.approx(aimed, abs=300 * 2.0**-24 * abs(alone))
    assert abs(aimed - alone) > 0.01 * abs(alone)


def test_fused_reports_every_stage_and_a_stage_that_hurts_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = tiny_block(tiny_stream("projector", 4), "w8a8", error=0.05)
    options: dict[str, Any] = {"solver": "none", "sweeps": 1}
    recipe = component_recipe("w8a8", "w8a8", "w8a8", method="fused", options=options)
    found = METHODS["fused"].quantize_block(block, recipe, {})
    for row in found.report["linears"].values():
        assert list(row["held_out"]) == ["scales max", "scales conditional", "descent", "refit 1"]
    # A re-fit that halves every scale is worse on any sample: the result is the one without re-fit.
    monkeypatch.setattr(
        "qvlm.methods.fused.refit_scales",
        lambda q, *_: affine.QuantizedWeight(q.integers, q.scale / 2, q.zero_point),
    )
    spoilt = METHODS["fused"].quantize_block(block, recipe, {})
    none = METHODS["fused"].quantize_block(block, recipe.with_options(refits=0), {})
    for name, linear in spoilt.linears.items():
        assert np.array_equal(linear.integers, none.linears[name].integers)
        assert np.array_equal(linear.scale, none.linears[name].scale)
        errors = spoilt.report["linears"][name]["held_out"]
        assert errors["refit 1"] > errors["descent"]


def rare(seed: int, tokens: int = 2000, often: int = 8) -> torch.Tensor:
    """Inputs [tokens, 32] of which the first eight channels fire strongly for ``often`` tokens, and together: the
    tokens of calibration all in the same proportions, which only the seed decides.
    """
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(tokens, 32, generator=generator)
    u[:, :8] *= 0.01
    u[:often, :8] += 20 * torch.randn(8, generator=generator)
    return u


@pytest.mark.parametrize("bits", [3, 4])
def test_shrinkage_holds_where_rare_channels_fire_in_other_proportions(bits: int) -> None:
    """The cause of the answers that went badly wrong at four bits: rare spikes of several channels, seen in a few
    proportions only. Twenty unseen proportions are the judge.
    """
    scheme = WeightScheme(bits, "group", 16)
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(5))
    weight[:, 3] *= 4  # widens its group, so that clipping it tempts
    calibration = statistics(rare(0)).hessian
    unseen = [statistics(rare(seed)).hessian for seed in range(100, 120)]
    errors = {}
    for share in (0.0, 0.05):
        hessian = shrunk(calibration, share)
        scale = search_scales(
            weight, scheme, column_importance(factored(hessian, 0.01), "conditional")
        )
        begin = gptq_matrix(weight, hessian, scheme, scales=(scale, None)).quantized
        found = descend(begin, weight.double(), damped(hessian, 0.01), bits, 4)
        values = affine.dequantize(found)
        errors[share] = sum(stream_error(values, weight, h, None) for h in unseen)
    assert errors[0.05] < 0.8 * errors[0.0]
