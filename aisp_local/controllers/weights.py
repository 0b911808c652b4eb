"""Importance weights of adaptive importance sampling (arXiv 2510.26219, Eq. 13), in pure numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

NOISE = 1e-5
"""Of a reward's size: a float32 network gives one text scores this far apart in batches of other shapes."""


def log_weights(rewards: Array, lambda_: float, *, prior: Array | None = None) -> Array:
    """``r_i / lambda - prior_i`` (Eq. 13) up to a constant, [n]; -inf where the reward is not finite.

    ``prior`` [n] is the log-ratio of proposal to prior, ``(1 - alpha) / sigma^2 * sum_t <u_t, v_t^i>`` for
    responses of one length (section 3.6); None for zero.
    ``lambda_`` is positive.
    """
    finite = np.isfinite(rewards)
    result = np.full(len(rewards), -np.inf)
    if finite.any():
        # The maximum first: (r - max) / lambda cannot overflow upwards whatever lambda is; downwards it is -inf.
        with np.errstate(over="ignore"):
            result[finite] = (rewards[finite] - rewards[finite].max()) / lambda_
        if prior is not None:
            result[finite] -= prior[finite]
    return result


def normalise(log_w: Array) -> Array:
    """Weights that sum to 1 over the first axis, by log-sum-exp; all 0 where every log-weight is -inf."""
    top = log_w.max(axis=0)
    w = np.exp(log_w - np.where(np.isneginf(top), 0.0, top))
    total = w.sum(axis=0)
    return np.asarray(w / np.where(total > 0, total, 1.0))


def importance_weights(rewards: Array, lambda_: float, *, prior: Array | None = None) -> Array:
    """Normalised weights [n] ``w_i ~ exp(r_i / lambda - prior_i)`` (Eq. 13); see ``log_weights``."""
    return normalise(log_weights(rewards, lambda_, prior=prior))


def length(u: npt.NDArray[np.float32]) -> float:
    """The Euclidean norm of all entries.

    By einsum: numpy's own asks BLAS, whose threads wait for more work in a busy loop, on the cores that decode next.
    """
    flat = u.ravel()
    return float(np.sqrt(np.einsum("i,i->", flat, flat, dtype=np.float64)))


def effective_sample_size(weights: Array) -> float:
    """``1 / sum w_i^2`` of normalised weights: from 1 (one rollout decides) to n; 0 without weights."""
    total = float(np.square(weights).sum())
    return 1.0 / total if total > 0 else 0.0


def lambda_for_ess(rewards: Array, target: float, *, floor: float = 0.02) -> float | None:
    """The lambda whose plain softmax weights have an effective sample size of ``target``.

    None when finite rewards do not differ by more than ``NOISE``: there is nothing to learn. ``floor`` is in
    standard deviations of the rewards: ties among the best, or a tiny n, would otherwise drive lambda to 0.
    Bisection in log lambda: the effective sample size grows with lambda.
    """
    r = rewards[np.isfinite(rewards)]
    if len(r) < 2:
        return None
    spread = float(r.std())
    if spread <= NOISE * float(np.abs(r).max()):
        return None
    target = min(max(target, 1.0), float(len(r)))
    low, high = np.log(floor * spread), np.log(1e6 * spread)
    if effective_sample_size(importance_weights(r, float(np.exp(low)))) >= target:
        return float(np.exp(low))
    for _ in range(60):
        middle = 0.5 * (low + high)
        if effective_sample_size(importance_weights(r, float(np.exp(middle)))) < target:
            low = middle
        else:
            high = middle
    return float(np.exp(high))
