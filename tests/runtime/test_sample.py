"""Proves the sampling rules: limits are greedy exactly, kept sets and penalties equal textbook loops,
draws follow the distribution, log-probabilities are the model's: python -m pytest
tests/runtime/test_sample.py
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


def textbook(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> list[int]:
    share = [math.exp((float(value) - float(logits.max())) / temperature) for value in logits]
    if top_p == 1 and (not top_k or top_k >= len(logits)):
        return [i for i in range(len(logits)) if share[i] >= min_p]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    weights = [math.exp((float(logits[i]) - float(logits.max())) / temperature) for i in order]
    kept, mass, total = [], 0.0, sum(weights)
    for token, weight in zip(order, weights, strict=True):
        kept.append(token)
        mass += weight
        if top_p < 1 and mass >= top_p * total:
            break
    return [i for i in kept if share[i] >= min_p]


@given(
    TIED,
    st.sampled_from([0.3, 1.0, 4.0]),
    st.integers(0, 33),
    st.sampled_from([0.3, 0.77, 1]),
    st.sampled_from([0.0, 0.05, 0.4, 1.0]),
)
@settings(max_examples=400, deadline=None)
def test_kept_tokens_equal_a_textbook_loop(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    ids, weights = candidates(logits, temperature, top_k, top_p, min_p)
    assert ids.tolist() == textbook(logits, temperature, top_k, top_p, min_p)
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
        {"min_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": {3: 1e9}},
        {"logprobs": -1},
        {"temperature": "hot"},
        {"top_k": 2.5},
        {"seed": "a"},
        {"logprobs": 1.5},
        {"logit_bias": {"3": 1.0}},
        {"logit_bias": {3: "much"}},
    ],
)
def test_options_out_of_range_name_themselves(option: dict) -> None:
    with pytest.raises(PromptError, match=next(iter(option))):
        Sampling(**option)


# --- penalties, bias, log-probabilities ----------------------------------------------------------

ANSWERS = st.lists(st.integers(0, 11), max_size=6)
TWELVE = arrays(np.float32, 12, elements=st.sampled_from([-3.0, -0.5, 0.0, 0.25, 2.0]))


@given(TWELVE, ANSWERS, ANSWERS, st.sampled_from([0.5, 1.0, 1.5]), st.sampled_from([0.0, 0.75]),
       st.sampled_from([0.0, -0.5]), st.dictionaries(st.integers(0, 11), st.sampled_from([-9.0, 1.5])))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_a_greedy_choice_under_penalties_equals_a_textbook_loop(
    logits: np.ndarray, prompt: list[int], answer: list[int], repetition: float, presence: float,
    frequency: float, bias: dict[int, float],
) -> None:  # fmt: skip
    """The prompt counts for repetition only; all numbers are exact in float32."""
    forced = np.full(12, -100.0, np.float32)
    choose = Sampling(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    ).chooser(prompt)
    for token in answer:  # a peak that no penalty can reach makes the chooser say this answer
        peak = forced.copy()
        peak[token] = 1e5
        assert choose(peak) == token
    expected = []
    for token in range(12):
        value = float(logits[token])
        if token in prompt or token in answer:
            value = value / repetition if value > 0 else value * repetition
        if token in answer:
            value -= presence + frequency * answer.count(token)
        expected.append(np.float32(value + bias.get(token, 0.0)))
    before = logits.copy()
    chosen = choose(logits)
    np.testing.assert_array_equal(logits, before)
    # float32 rounds 2 / 1.5 before the comparison; equal largest values may fall to either token.
    assert expected[chosen] >= max(expected) - 4 * 2.0**-24 * 10


def test_neutral_penalties_and_bias_change_nothing() -> None:
    logits = np.random.default_rng(2).normal(size=40).astype(np.float32)
    plain = Sampling(temperature=1.0, seed=3).chooser([1, 2])
    neutral = Sampling(temperature=1.0, seed=3, logit_bias={5: 0.0}, repetition_penalty=1.0)
    choose = neutral.chooser([1, 2])
    assert [plain(logits) for _ in range(20)] == [choose(logits) for _ in range(20)]


def test_a_bias_forbids_and_forces() -> None:
    logits = np.zeros(50, np.float32)
    logits[7] = 3
    assert Sampling(logit_bias={7: -100.0}).chooser()(logits) == 0
    hot = Sampling(temperature=2.0, seed=0, logit_bias={9: 1e3}).chooser()
    assert {hot(logits) for _ in range(30)} == {9}


def test_repetition_penalty_ends_a_loop_that_greedy_decoding_repeats() -> None:
    logits = np.array([1.0, 0.9, 0.8, -1.0], np.float32)
    greedy, penal = Sampling().chooser(), Sampling(repetition_penalty=1.5).chooser()
    assert [greedy(logits) for _ in range(3)] == [0, 0, 0]
    assert [penal(logits) for _ in range(3)] == [0, 1, 2]


def test_log_probabilities_are_the_model_s_own() -> None:
    probabilities = np.array([0.5, 0.25, 0.125, 0.125])
    logits = (np.log(probabilities) + 3).astype(np.float32)
    choose = Sampling(
        temperature=7.0, seed=1, logprobs=3, logit_bias={0: -50.0}, presence_penalty=1.0
    ).chooser()
    tokens = [choose(logits) for _ in range(5)]
    # A float32 logit near 3 is off by up to 2^-23; the log-sum-exp adds as much.
    for token, score in zip(tokens, choose.scores, strict=True):
        assert score.token_id == token != 0
        assert abs(score.logprob - math.log(probabilities[token])) <= 2**-22
        assert [i for i, _ in score.top] == [0, 1, 2], "ties towards the lower id"
        for i, value in score.top:
            assert abs(value - math.log(probabilities[i])) <= 2**-22
    silent = Sampling().chooser()
    silent(logits)
    assert silent.scores == []
    bare = Sampling(logprobs=0).chooser()
    bare(logits)
    assert bare.scores[0].top == ()
