"""Scale search: against a search by loops, against the maximum, and where there is nothing to search.

python -m pytest tests/core/test_scales.py
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from problems import error, problem

from qvlm import affine
from qvlm.errors import RecipeError
from qvlm.hessian import factored
from qvlm.methods.gptq import gptq_matrix
from qvlm.recipe import WeightScheme
from qvlm.scales import FACTORS, column_importance, search_scales


@pytest.mark.parametrize(
    "scheme",
    [
        WeightScheme(2, "group", 8),
        WeightScheme(3, "channel", None),
        WeightScheme(2, "group", 8, signed_scales=True),
    ],
)
def test_search_is_the_textbook(scheme: WeightScheme) -> None:
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    importance = np.linspace(0.5, 2.0, 16)
    found = search_scales(weight, scheme, torch.from_numpy(importance))
    qmin, qmax = affine.integer_range(scheme.bits)
    for row in range(3):
        for group, columns in oracles.group_columns(16, scheme.group_size):
            values = weight[row].double().numpy()
            top = max(abs(values[c]) for c in columns)
            costs = {}
            signs = (1.0, -1.0) if scheme.signed_scales else (1.0,)
            for factor, sign in itertools.product(FACTORS, signs):
                size = float(np.float16(np.float32(top) * np.float32(factor) / np.float32(qmax)))
                scale = sign * size
                costs[scale] = sum(
                    importance[c]
                    * (
                        min(max(oracles.round_half_even(values[c] / scale), qmin), qmax) * scale
                        - values[c]
                    )
                    ** 2
                    for c in columns
                )
            assert float(found[row, group]) == min(costs, key=lambda s: costs[s])


def test_a_mirrored_weight_takes_the_mirrored_scale() -> None:
    """-2, -1, 0, 1 times s: a group that reaches far up is the mirror image of one that reaches far down."""
    scheme = WeightScheme(2, "group", 8, signed_scales=True)
    down = torch.tensor([[-2.0, -1.0, 0.0, 1.0, -1.0, 1.0, 0.0, -2.0]])
    importance = torch.ones(8)
    # The candidates are 0.2 to 1 times 2, in steps of 0.04: 1 is one of them, and exact.
    assert search_scales(down, scheme, importance).item() == 1.0
    assert search_scales(-down, scheme, importance).item() == -1.0
    assert search_scales(-down, replace(scheme, signed_scales=False), importance).item() > 0


@pytest.mark.parametrize("bits", [2, 3])
def test_signs_never_cost(bits: int) -> None:
    weight, _, _, hessian, _ = problem()
    scheme = WeightScheme(bits, "group", 16)
    importance = hessian.diagonal()
    costs = []
    for one in (scheme, replace(scheme, signed_scales=True)):
        scale = search_scales(weight, one, importance)
        values = affine.fake_quantize_weight(weight, one, scale)
        costs.append(affine.grouped((values - weight).square() * importance, one).sum(-1))
    # float32 sums of 16 terms, in one order or another.
    assert (costs[1] <= costs[0] * (1 + 1e-5)).all()
    # A grid of n points is lopsided by one of them: the fewer there are, the more it is worth.
    assert costs[1].sum() < (0.85 if bits == 2 else 0.99) * costs[0].sum()


def test_conditional_importance_is_the_schur_complement() -> None:
    *_, hessian, _ = problem(columns=12)
    found = column_importance(factored(hessian, 1e-9), "conditional")
    for c in range(12):
        rest = [i for i in range(12) if i != c]
        left = np.linalg.inv(hessian[rest][:, rest].numpy())
        wanted = hessian[c, c] - hessian[c, rest].numpy() @ left @ hessian[rest, c].numpy()
        # Damping of 1e-9 moves it by about 1e-9 times the condition number of 1e4.
        assert float(found[c]) == pytest.approx(float(wanted), rel=1e-4)


def test_uncorrelated_inputs_make_both_objectives_one() -> None:
    hessian = torch.diag(torch.rand(24).double() + 0.1)
    plain, conditional = (
        column_importance(factored(hessian, 1e-12), o) for o in ("diagonal", "conditional")
    )
    torch.testing.assert_close(plain, conditional, rtol=1e-10, atol=0)


def test_weights_on_the_grid_keep_their_scale() -> None:
    """Integers up to qmax times a float16 scale: the maximum is exact, so nothing beats it."""
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-7, 8, (5, 32), generator=generator)
    integers[:, ::16] = 7
    scheme = WeightScheme(4, "group", 16)
    found = search_scales(integers * 0.125, scheme, torch.ones(32))
    assert torch.equal(found, torch.full((5, 2), 0.125))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_the_maximum_before_and_after_gptq_on_held_out_tokens(bits: int) -> None:
    scheme = WeightScheme(bits, "channel", None)
    for seed in range(2):
        weight, f, *_ = problem(rows=32, columns=128, tokens=2000, seed=seed)
        hessian, held = f[:1500].T @ f[:1500], f[1500:].T @ f[1500:]

        def swept(scale: torch.Tensor) -> float:
            found = gptq_matrix(weight, hessian, scheme, scales=(scale, None)).quantized  # noqa: B023
            return float(error(found, weight.double(), held).sum())  # noqa: B023

        def nearest(scale: torch.Tensor) -> float:
            found = affine.quantize_weight(weight, scheme, scale)  # noqa: B023
            return float(error(found, weight.double(), held).sum())  # noqa: B023

        largest, _ = affine.weight_scales(weight, scheme)
        diagonal, conditional = (
            search_scales(weight, scheme, column_importance(factored(hessian, 0.01), o))
            for o in ("diagonal", "conditional")
        )
        assert swept(conditional) < swept(largest)
        assert nearest(diagonal) < nearest(largest)


def test_refusals() -> None:
    weight = torch.ones(2, 16)
    with pytest.raises(RecipeError, match="expected a symmetric one"):
        search_scales(weight, WeightScheme(4, "group", 16, symmetric=False), torch.ones(16))
    with pytest.raises(RecipeError, match="option scales: 'mse', expected one of conditional"):
        column_importance(factored(torch.eye(16).double(), 0.01), "mse")
