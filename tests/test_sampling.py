"""Token choice against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aisp_local.engine.sampling import log_law, pick
from aisp_local.types import Sampling


def reference_law(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The sampled law of one row, by loops: top-k, top-p, min-p, then temperature."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    p = np.exp(logits[order].astype(np.float64) - logits.max())
    p /= p.sum()
    kept, mass = [], 0.0
    for token, probability in zip(order, p, strict=True):
        if kept and (mass >= sampling.top_p or probability < sampling.min_p * p[0]):
            break
        kept.append(token)
        mass += probability
    law = np.zeros(len(logits))
    law[kept] = np.exp((logits[kept].astype(np.float64) - logits.max()) / sampling.temperature)
    return np.asarray(law / law.sum())


samplings = st.builds(
    Sampling,
    temperature=st.floats(0.2, 2.0),
    top_k=st.sampled_from([0, 1, 3, 7]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    min_p=st.sampled_from([0.0, 0.05, 0.3]),
)


@given(st.integers(0, 2**31), samplings)
def test_law(seed: int, sampling: Sampling) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, (3, 40)).astype(np.float32)
    law = np.exp(log_law(logits, sampling))
    for row in range(3):
        np.testing.assert_allclose(law[row], reference_law(logits[row], sampling), atol=1e-6)


@given(st.integers(0, 2**31), samplings, st.lists(st.floats(0, 1, exclude_max=True), min_size=3, max_size=3))
def test_pick_draws_what_the_law_allows(seed: int, sampling: Sampling, uniforms: list[float]) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, (3, 40)).astype(np.float32)
    tokens = pick(logits, sampling, np.array(uniforms))
    for row, token in enumerate(tokens):
        assert reference_law(logits[row], sampling)[token] > 0


@pytest.mark.parametrize("sampling", [Sampling(0.8), Sampling(1.0, top_k=5), Sampling(0.7, top_p=0.8)])
def test_frequencies(sampling: Sampling) -> None:
    logits = np.random.default_rng(1).normal(0, 1.5, 30).astype(np.float32)
    n = 20000
    uniforms = np.random.default_rng(2).random(n)
    tokens = pick(np.broadcast_to(logits, (n, 30)), sampling, uniforms)
    frequencies = np.bincount(tokens, minlength=30) / n
    # Four standard errors of a proportion.
    np.testing.assert_allclose(frequencies, reference_law(logits, sampling), atol=4 * 0.5 / np.sqrt(n))


def test_greedy_is_the_first_maximum() -> None:
    logits = np.array([[0, 3, 3], [5, 1, 2]], np.float32)
    np.testing.assert_array_equal(pick(logits, Sampling(), np.zeros(2)), [1, 0])


def test_large_vocabularies_without_top_k_are_not_cut_short() -> None:
    """A flat law over more tokens than the first candidate list still reaches its top-p mass."""
    logits = np.zeros((1, 5000), np.float32)
    law = np.exp(log_law(logits, Sampling(1.0, top_p=0.5)))
    assert np.count_nonzero(law) == pytest.approx(2500, abs=1)
