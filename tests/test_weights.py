"""Weights, effective sample size and lambda (arXiv 2510.26219, Eq. 13)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aisp_local.controllers.weights import effective_sample_size, importance_weights, lambda_for_ess

REWARDS = np.array([0.0, 1.0, 2.0, 0.5, -1.0, 3.0, 0.0, 0.25, 1.5, -2.0])

finite = st.floats(-1e6, 1e6, allow_nan=False)
reward_lists = st.lists(finite, min_size=1, max_size=40).map(np.array)


def test_ten_trajectories_by_hand() -> None:
    # exp(r) over its sum with a pocket calculator's ten digits.
    expected = [
        0.024931112,
        0.0677697888,
        0.1842173853,
        0.0411044547,
        0.0091716436,
        0.5007547709,
        0.024931112,
        0.0320121815,
        0.1117334922,
        0.0033740591,
    ]
    weights = importance_weights(REWARDS, 1.0)
    np.testing.assert_allclose(weights, expected, atol=1e-10)
    np.testing.assert_allclose(weights[5] / weights[2], np.e, rtol=1e-12)


def test_prior_term_lowers_the_weight() -> None:
    prior = np.array([0.0, np.log(2.0)])
    np.testing.assert_allclose(importance_weights(np.zeros(2), 1.0, prior=prior), [2 / 3, 1 / 3])


def test_lambda_to_zero_is_one_hot_and_splits_ties() -> None:
    np.testing.assert_array_equal(importance_weights(np.array([1.0, 3.0, 2.0]), 1e-6), [0, 1, 0])
    np.testing.assert_array_equal(importance_weights(np.array([3.0, 3.0, 2.0]), 1e-6), [0.5, 0.5, 0])


@pytest.mark.parametrize("lambda_", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1.0, 1e6, -1e6])
def test_no_overflow(lambda_: float, scale: float) -> None:
    with np.errstate(over="raise", invalid="raise"):
        weights = importance_weights(REWARDS * scale, lambda_)
    np.testing.assert_allclose(weights.sum(), 1.0)


def test_not_finite_has_no_weight() -> None:
    rewards = np.array([np.nan, 1.0, np.inf, 1.0, -np.inf])
    np.testing.assert_allclose(importance_weights(rewards, 0.3), [0, 0.5, 0, 0.5, 0])
    np.testing.assert_array_equal(importance_weights(np.array([np.nan]), 0.3), [0])


@given(reward_lists, st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_a_constant_changes_nothing(rewards: np.ndarray, lambda_: float, constant: float) -> None:
    # The shift itself rounds the rewards, by up to 1e6 * 2^-52 in units of lambda.
    tolerance = 1e-9 + 1e6 * 4e-16 / lambda_ * 10
    np.testing.assert_allclose(
        importance_weights(rewards + constant, lambda_), importance_weights(rewards, lambda_), atol=tolerance
    )


@given(reward_lists, st.floats(1e-3, 1e3))
def test_weights_are_a_distribution(rewards: np.ndarray, lambda_: float) -> None:
    weights = importance_weights(rewards, lambda_)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(), 1.0)
    assert 1 - 1e-9 <= effective_sample_size(weights) <= len(rewards) + 1e-9


@pytest.mark.parametrize("target", [1.5, 2.5, 5.0, 9.0])
def test_lambda_reaches_the_target(target: float) -> None:
    lambda_ = lambda_for_ess(REWARDS, target)
    assert lambda_ is not None
    np.testing.assert_allclose(effective_sample_size(importance_weights(REWARDS, lambda_)), target, rtol=1e-6)


def test_lambda_keeps_its_floor_on_ties() -> None:
    tied = np.array([2.0, 2.0, 1.0, 0.0])  # an effective sample size below 2 cannot be reached
    lambda_ = lambda_for_ess(tied, 1.0, floor=0.02)
    np.testing.assert_allclose(lambda_, 0.02 * tied.std())


@pytest.mark.parametrize(
    "rewards",
    [[1.0], [1.0, 1.0, 1.0], [np.nan, 2.0], [np.nan, np.nan], [3.000001, 3.0, 2.999999], [0.0, 0.0]],
)
def test_no_lambda_without_a_difference(rewards: list[float]) -> None:
    assert lambda_for_ess(np.array(rewards), 1.0) is None


@given(reward_lists, st.floats(1.0, 40.0))
def test_lambda_is_positive(rewards: np.ndarray, target: float) -> None:
    lambda_ = lambda_for_ess(rewards, target)
    assert lambda_ is None or lambda_ > 0


def test_rewards_beyond_all_bounds_of_lambda_weigh_nothing() -> None:
    weights = importance_weights(np.array([-1e30, 0.0, 1e30]), 1e-300)
    np.testing.assert_array_equal(weights, [0.0, 0.0, 1.0])
