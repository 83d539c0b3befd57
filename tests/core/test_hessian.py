"""Statistics of a linear's inputs and the factor of the inverse against plain numpy sums and numpy's own inverse.

python -m pytest tests/core/test_hessian.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvlm import hessian as module
from qvlm.errors import CalibrationError
from qvlm.hessian import Statistics, factored, revive_dead, shrunk

# A float32 product over 37 tokens is off by at most 37 half-units in the last place of the sum of magnitudes.
PRODUCT = 37 * 2.0**-24


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(37, 11, generator=generator)
    return (
        u,
        u + 0.1 * torch.randn(37, 11, generator=generator),
        torch.rand(37, generator=generator),
    )


def test_sums_are_the_definitions() -> None:
    u, f, c = inputs()
    found = Statistics(11, asymmetric=True)
    for part in (slice(0, 20), slice(20, 37)):
        found.add(u[None, part], f[None, part], c[part])
    un, fn, cn = (x.double().numpy() for x in (u, f, c))
    hessian = sum(cn[n] * np.outer(un[n], un[n]) for n in range(37))
    cross = sum(cn[n] * np.outer(fn[n] - un[n], un[n]) for n in range(37))
    largest = float(np.abs(un).max() * np.abs(fn).max() * cn.sum())
    assert found.cross is not None
    np.testing.assert_allclose(found.hessian.numpy(), hessian, rtol=0, atol=PRODUCT * largest)
    np.testing.assert_allclose(found.cross.numpy(), cross, rtol=0, atol=PRODUCT * largest)
    assert found.tokens == 37
    expected = cn.sum() ** 2 / (cn**2).sum()
    assert found.effective_tokens == pytest.approx(
        expected, rel=1e-12
    )  # float64 sums of 37 numbers


def test_unit_weights_are_no_weights() -> None:
    u, f, _ = inputs()
    plain, weighted = Statistics(11, True), Statistics(11, True)
    plain.add(u, f)
    weighted.add(u, f, torch.ones(37))
    assert plain.cross is not None and weighted.cross is not None
    assert torch.equal(plain.hessian, weighted.hessian)
    assert torch.equal(plain.cross, weighted.cross)
    assert plain.effective_tokens == weighted.effective_tokens == 37


def test_asymmetric_needs_the_float_input() -> None:
    with pytest.raises(ValueError, match="float stream"):
        Statistics(11, True).add(inputs()[0])


def test_shrinking_adds_to_each_channel_its_own_share() -> None:
    u = inputs()[0].double()
    hessian = u.T @ u
    assert torch.equal(shrunk(hessian, 0.0), hessian)
    found = shrunk(hessian, 0.25)
    assert torch.equal(found.diagonal(), 1.25 * hessian.diagonal())
    assert torch.equal(
        found - torch.diag(found.diagonal()), hessian - torch.diag(hessian.diagonal())
    )
    # In units of the channels, whatever those are: powers of two scale exactly.
    units = torch.tensor([2.0**i for i in range(-5, 6)], dtype=torch.float64)
    scaled = hessian * torch.outer(units, units)
    assert torch.equal(shrunk(scaled, 0.25), found * torch.outer(units, units))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("solved", [256, 2])
def test_factors_are_those_of_the_inverse(
    act_order: bool, solved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SOLVED", solved)  # 2: inverted by halves
    u = inputs()[0].double()
    hessian = u.T @ u
    found = factored(hessian, 0.01, act_order)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(11, dtype=torch.float64)
    assert (found.damping, found.dead) == (0.01, 0)
    torch.testing.assert_close(found.damped, damped, rtol=2.0**-52, atol=0)
    energies = hessian.diagonal()[found.order]
    assert torch.equal(energies, energies.sort(descending=True).values) == act_order
    assert torch.equal(found.order.sort().values, torch.arange(11))
    assert all(torch.equal(m, m.triu()) for m in (found.factor, found.upper))
    inverse = np.linalg.inv(damped.numpy())
    # Backward error of a factorisation: in * eps * condition number (below 1e4 here), in units of the inverse.
    tolerance = 11 * 2.0**-53 * 1e4 * float(np.abs(inverse).max())
    order = found.order.numpy()
    for ours, wanted in (
        ((found.factor.T @ found.factor).numpy(), inverse[order][:, order]),
        (found.inverse_diagonal().numpy(), inverse.diagonal()),
        (found.over(torch.eye(11, dtype=torch.float64)).numpy(), inverse),
    ):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        (found.upper @ found.upper.T).numpy(),
        damped.numpy()[order][:, order],
        rtol=0,
        atol=11 * 2.0**-53 * float(damped.abs().max()),
    )


def test_damping_is_raised_before_giving_up() -> None:
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05], dtype=torch.float64))
    assert factored(indefinite, 0.01).damping == pytest.approx(0.1, rel=1e-15)
    indefinite[3, 3] = -0.9
    with pytest.raises(CalibrationError, match=r"even with damping 1\. Give more samples"):
        factored(indefinite, 0.01)
    with pytest.raises(CalibrationError, match="not finite"):
        factored(torch.full((2, 2), torch.nan, dtype=torch.float64), 0.01)


def test_what_the_float_stream_asks_of_the_outputs() -> None:
    u, f = inputs()[:2]
    sums = Statistics(11, asymmetric=True)
    sums.add(u, f)
    assert sums.cross is not None
    weight = torch.randn(3, 11, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sums.shift(weight), weight.double() @ sums.cross)  # type: ignore[arg-type]
    assert Statistics(11).shift(weight) is None


def test_dead_columns_get_the_mean_of_the_live_ones() -> None:
    u = inputs()[0].double()
    u[:, [2, 7]] = 0
    hessian = u.T @ u
    revived, dead = revive_dead(hessian)
    live = [i for i in range(11) if i not in (2, 7)]
    assert dead == 2
    # A mean of nine float64 numbers, summed in another order.
    assert float(revived[2, 2]) == pytest.approx(
        float(hessian.diagonal()[live].mean()), rel=9 * 2**-53
    )
    assert float(revived[7, 7]) == float(revived[2, 2])
    assert torch.equal(revived[live][:, live], hessian[live][:, live])
    assert revive_dead(torch.zeros(3, 3, dtype=torch.float64))[0].equal(
        torch.eye(3, dtype=torch.float64)
    )
