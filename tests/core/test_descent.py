"""Coordinate descent never raises its objective, ends where no single integer helps, and knows the true optimum.

python -m pytest tests/core/test_descent.py
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from problems import error, problem

from qvlm import affine
from qvlm.affine import QuantizedWeight
from qvlm.descent import coordinate_optima, descend, refit_scales, target
from qvlm.hessian import damped, factored
from qvlm.methods.gptq import gptq_matrix
from qvlm.recipe import WeightScheme

SCHEMES = (
    WeightScheme(2, "group", 16),
    WeightScheme(4, "group", 16),
    WeightScheme(3, "channel", None),
    WeightScheme(4, "tensor", None),
    WeightScheme(3, "group", 16, symmetric=False),
)


def test_target_is_the_least_squares_solution() -> None:
    weight, f, u, hessian, cross = problem()
    found = target(weight, factored(hessian, 0.0), weight.double() @ cross, 1.0)
    # The continuous minimiser of |t U' - W F'|, by numpy from the tokens themselves.
    wanted = np.linalg.lstsq(u.numpy(), (f @ weight.double().T).numpy(), rcond=None)[0].T
    # Condition number of H about 1e6 times float64's 1e-16 and a margin of ten.
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-9)


def test_no_drift_or_no_alpha_is_the_weight() -> None:
    weight, _, _, hessian, cross = problem()
    factors, shift = factored(hessian, 0.01), weight.double() @ cross
    assert torch.equal(target(weight, factors, None, 1.0), weight.double())
    assert torch.equal(target(weight, factors, shift, 0.0), weight.double())
    assert torch.equal(target(weight, factors, 0 * shift, 1.0), weight.double())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_step_lowers_the_error_from_any_start(scheme: WeightScheme) -> None:
    weight, _, _, hessian, cross = problem()
    wanted = target(weight, factored(hessian, 0.01), weight.double() @ cross, 1.0)
    for begin in (
        affine.quantize_weight(weight, scheme),
        gptq_matrix(weight, hessian, scheme).quantized,
    ):
        before = error(begin, wanted, hessian)
        after = error(moved := descend(begin, wanted, hessian, scheme.bits, 3), wanted, hessian)
        # dequantize is float32: its rounding of each value is 2^-24 of it.
        assert (after <= before * (1 + 1e-5)).all() and after.sum() < before.sum()
        assert torch.equal(moved.scale, begin.scale)
        fitted = refit_scales(moved, wanted, hessian)
        assert (error(fitted, wanted, hessian) <= after * (1 + 1e-5)).all()
        assert torch.equal(fitted.scale, fitted.scale.half().float())
        if scheme.granularity != "tensor":
            assert error(fitted, wanted, hessian).sum() < after.sum()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_ends_where_no_integer_helps(scheme: WeightScheme) -> None:
    weight, _, _, hessian, _ = problem(rows=4)
    wanted = weight.double()
    begin = affine.quantize_weight(weight, scheme)
    found = descend(begin, wanted, hessian, scheme.bits, 100)
    least = error(found, wanted, hessian)
    qmin, qmax = affine.integer_range(scheme.bits)
    for c in range(weight.shape[1]):  # brute force: every other integer in every place
        for q in range(qmin, qmax + 1):
            integers = found.integers.clone()
            integers[:, c] = q
            other = error(QuantizedWeight(integers, found.scale, found.zero_point), wanted, hessian)
            assert (other >= least * (1 - 1e-5)).all()
    nearest = coordinate_optima(found, wanted, hessian).round().clamp(qmin, qmax)
    assert torch.equal(nearest, found.integers.double())


@pytest.mark.parametrize("bits", [2, 3])
def test_a_negative_scale_is_the_mirror_image(bits: int) -> None:
    """Scale -s and target -t are the problem of s and t: sweep, descent, re-fit and optima give the same integers."""
    weight, _, _, hessian, _ = problem()
    scheme, wanted = WeightScheme(bits, "group", 16), weight.double()
    scale, _ = affine.weight_scales(weight, scheme, 0.7)
    found = []
    for sign in (1, -1):
        begin = gptq_matrix(sign * weight, hessian, scheme, scales=(sign * scale, None)).quantized
        moved = descend(begin, sign * wanted, hessian, bits, 3)
        fitted = refit_scales(moved, sign * wanted, hessian)
        optima = coordinate_optima(fitted, sign * wanted, hessian)
        found.append((begin.integers, moved.integers, fitted.integers, fitted.scale * sign, optima))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][3], scale)


def test_tiny_problem_against_all_combinations() -> None:
    """Two columns of two bits: descent from round to nearest, against the best of all 16 pairs."""
    scheme, hessian = (
        WeightScheme(2, "channel", None),
        torch.tensor([[1.0, 0.3], [0.3, 1.0]]).double(),
    )
    weight = torch.tensor([[0.9, -0.44], [0.2, 0.8], [-1.3, 0.6]])
    begin = affine.quantize_weight(weight, scheme)
    found = error(descend(begin, weight.double(), hessian, 2, 10), weight.double(), hessian)
    best = torch.full((3,), torch.inf, dtype=torch.float64)
    for a in range(-2, 2):
        for b in range(-2, 2):
            pair = torch.tensor([[a, b]], dtype=torch.int8).expand(3, 2)
            best = torch.minimum(
                best, error(QuantizedWeight(pair, begin.scale), weight.double(), hessian)
            )
    torch.testing.assert_close(found, best, rtol=1e-5, atol=0)


def test_a_move_that_gains_nothing_is_not_made() -> None:
    """The middle of two integers: both cost the same, whichever even one rounding prefers."""
    begin = QuantizedWeight(torch.ones(1, 2, dtype=torch.int8), torch.ones(1, 1))
    wanted = torch.tensor([[0.5, 1.5]]).double()
    found = descend(begin, wanted, torch.eye(2).double(), 4, 3)
    assert torch.equal(found.integers, begin.integers)


def test_blocks_of_columns_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, _, hessian, _ = problem()
    scheme = WeightScheme(3, "group", 16)
    begin = affine.quantize_weight(weight, scheme)
    results = []
    for columns in (1, 7, 48, 64):
        monkeypatch.setattr("qvlm.descent.COLUMNS", columns)
        results.append(descend(begin, weight.double(), hessian, 3, 5).integers)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_uncorrelated_inputs_leave_round_to_nearest() -> None:
    weight, *_ = problem()
    hessian = torch.diag(torch.rand(48).double() + 0.1)
    begin = affine.quantize_weight(weight, WeightScheme(4, "group", 16))
    assert torch.equal(descend(begin, weight.double(), hessian, 4, 5).integers, begin.integers)


def test_scales_of_an_exact_weight_are_found_again() -> None:
    """Integers times scales is the target: the re-fit of other scales returns the true ones."""
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-7, 8, (5, 32), generator=generator).to(torch.int8)
    true = torch.tensor([0.25, 0.5]).expand(5, 2).contiguous()
    wanted = affine.dequantize(QuantizedWeight(integers, true)).double()
    *_, hessian, _ = problem(columns=32)
    found = refit_scales(QuantizedWeight(integers, true * 1.25), wanted, hessian)
    assert torch.equal(found.scale, true)


def test_refitted_scales_are_the_least_squares_solution() -> None:
    """By numpy from the tokens: one unknown per group, its regressor the group's integers times the inputs."""
    weight, _, u, hessian, _ = problem(tokens=400)
    begin = affine.quantize_weight(weight, WeightScheme(4, "group", 16))
    found = refit_scales(begin, weight.double(), hessian)
    for row in range(len(weight)):
        grid = begin.integers[row].double().reshape(3, 16)
        regressors = torch.stack([u[:, 16 * g : 16 * g + 16] @ grid[g] for g in range(3)], 1)
        aimed = u @ weight[row].double()
        wanted, *_ = np.linalg.lstsq(regressors.numpy(), aimed.numpy(), rcond=None)
        assert np.array_equal(
            found.scale[row].numpy(), wanted.astype(np.float16).astype(np.float32)
        )


def test_scales_better_than_the_rounded_solution_are_kept() -> None:
    """The nearest float16 scales are not always those of least E: where a neighbour is better, a row keeps it."""
    weight, _, _, hessian, _ = problem(rows=8)
    begin = affine.quantize_weight(weight, WeightScheme(4, "group", 16))
    rounded = refit_scales(begin, weight.double(), hessian).scale.half()
    least = error(QuantizedWeight(begin.integers, rounded.float()), weight.double(), hessian)
    better = torch.zeros(8, dtype=torch.bool)
    for ulps in itertools.product((-1, 0, 1), repeat=3):
        near = (rounded.view(torch.int16) + torch.tensor(ulps, dtype=torch.int16)).view(
            torch.float16
        )
        tried = QuantizedWeight(begin.integers, near.float())
        cost = error(tried, weight.double(), hessian)
        found = error(refit_scales(tried, weight.double(), hessian), weight.double(), hessian)
        # E is a sum of 48 x 48 products of float32 values in float64.
        assert (found <= torch.minimum(cost, least) * (1 + 1e-9)).all()
        better |= cost < least * (1 - 1e-9)
    assert better.any()  # else this test could not fail


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_gptq_and_round_to_nearest_on_held_out_tokens(bits: int) -> None:
    scheme = WeightScheme(bits, "group", 16)
    for seed in range(3):
        weight, f, _, _, _ = problem(rows=32, tokens=4000, seed=seed)
        hessian, held = f[:2000].T @ f[:2000], f[2000:].T @ f[2000:]
        nearest = affine.quantize_weight(weight, scheme)
        swept = gptq_matrix(weight, hessian, scheme).quantized
        found = descend(swept, weight.double(), damped(hessian, 0.01), bits, 10)
        errors = [float(error(q, weight.double(), held).sum()) for q in (found, swept, nearest)]
        assert errors[0] < errors[1] < errors[2]


def test_a_scale_that_would_change_its_sign_stays() -> None:
    """Integers q of scale 1 for a target of -q / 2: least squares says -1/2, which is another grid."""
    integers = torch.tensor([[1, -2, 1, 0]], dtype=torch.int8)
    for sign in (1.0, -1.0):
        begin = QuantizedWeight(integers, torch.full((1, 1), sign))
        wanted = -0.5 * sign * integers.double()
        assert torch.equal(refit_scales(begin, wanted, torch.eye(4).double()).scale, begin.scale)
        fitted = refit_scales(begin, -wanted, torch.eye(4).double())
        assert fitted.scale.item() == 0.5 * sign
