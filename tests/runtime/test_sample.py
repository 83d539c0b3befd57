"""Proves the sampling rules: limits are greedy exactly, kept sets equal a textbook loop, draws
follow the distribution: python -m pytest tests/runtime/test_sample.py
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qvlm_runtime.errors import PromptError, SessionError
from qvlm_runtime.sample import Sampling, candidates, draw

# Few distinct values make many ties.
TIED = arrays(np.float32, st.integers(1, 30), elements=st.sampled_from([-3.0, 0.0, 0.5, 2.0]))


def textbook(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> list[int]:
    if top_p == 1 and (not top_k or top_k >= len(logits)):
        return list(range(len(logits)))
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    weights = [math.exp((float(logits[i]) - float(logits.max())) / temperature) for i in order]
    kept, mass = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        kept.append(token)
        mass += weight
        if top_p < 1 and mass >= top_p * sum(weights):
            break
    return kept


@given(TIED, st.sampled_from([0.3, 1.0, 4.0]), st.integers(0, 33), st.sampled_from([0.3, 0.77, 1]))
@settings(max_examples=300, deadline=None)
def test_kept_tokens_equal_a_textbook_loop(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float
) -> None:
    ids, weights = candidates(logits, temperature, top_k, top_p)
    assert ids.tolist() == textbook(logits, temperature, top_k, top_p)
    expected = np.exp((logits[ids].astype(np.float64) - logits.max()) / temperature)
    np.testing.assert_array_equal(weights, expected)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999999])
def test_a_nucleus_larger_than_the_first_sorted_part(top_p: float) -> None:
    flat = np.random.default_rng(0).normal(0, 0.2, 20_000).astype(np.float32)
    assert candidates(flat, 1.0, 0, top_p)[0].tolist() == textbook(flat, 1.0, 0, top_p)


@given(TIED, st.floats(0, 1, exclude_max=True))
@settings(max_examples=200, deadline=None)
def test_limits_are_greedy_exactly(logits: np.ndarray, uniform: float) -> None:
    greedy = int(np.argmax(logits))
    assert Sampling().chooser()(logits) == greedy
    assert Sampling(temperature=2.0, top_k=1).chooser()(logits) == greedy
    for temperature, top_k, top_p in ((1.0, 1, 1.0), (1.0, 0, 1e-9)):
        ids, weights = candidates(logits, temperature, top_k, top_p)
        assert draw(ids, weights, uniform) == greedy
    ids, weights = candidates(logits, 1e-6, 0, 1.0)
    assert logits[draw(ids, weights, uniform)] == logits.max()


def test_top_k_and_top_p_at_their_widest_change_nothing() -> None:
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32)
    all_ids, all_weights = candidates(logits, 0.7, 0, 1.0)
    for top_k in (50, 51, 10**9):
        ids, weights = candidates(logits, 0.7, top_k, 1.0)
        assert ids.tolist() == all_ids.tolist() and weights.tolist() == all_weights.tolist()


def test_a_draw_inverts_the_cumulative_weight() -> None:
    ids, weights = np.array([7, 3, 9]), np.array([4.0, 3.0, 1.0])
    edges = {0.0: 7, 0.4999: 7, 0.5: 3, 0.8749: 3, 0.875: 9, 1 - 2**-53: 9}
    assert {u: draw(ids, weights, u) for u in edges} == edges
    assert draw(ids, np.array([1.0, 0.0, 0.0]), 1 - 2**-53) == 7


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    choose, draws = Sampling(temperature=1.0, seed=5).chooser(), 4000
    counts = np.bincount([choose(logits) for _ in range(draws)], minlength=4)
    expected = draws * np.exp(logits.astype(np.float64))
    # Chi-square with 3 degrees of freedom exceeds 16.3 with probability 0.001; the seed is fixed.
    assert ((counts - expected) ** 2 / expected).sum() < 16.3


def test_a_seed_repeats_and_another_differs() -> None:
    logits = np.zeros(1000, np.float32)

    def sequence(seed: int | None) -> list[int]:
        choose = Sampling(temperature=1.0, seed=seed).chooser()
        return [choose(logits) for _ in range(8)]

    assert sequence(3) == sequence(3) != sequence(4)
    assert sequence(None) != sequence(None)  # equal with probability 1e-24


def test_minus_infinity_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    choose = Sampling(temperature=5.0, seed=0).chooser()
    assert {choose(logits) for _ in range(50)} == {1, 3}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = np.array([0.0, value, 1.0], np.float32)
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        with pytest.raises(SessionError, match="logit of token 1"):
            sampling.chooser()(logits)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"seed": -1},
    ],
)
def test_options_out_of_range_name_themselves(option: dict) -> None:
    with pytest.raises(PromptError, match=next(iter(option))):
        Sampling(**option)
