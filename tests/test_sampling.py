"""Token choice against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aisp_local.engine.sampling import log_law, pick, sparse_law
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


@pytest.mark.parametrize("size", [64, 65, 4000, 4096])
def test_large_vocabularies_are_sampled_as_small_ones(size: int) -> None:
    """The token at which the running sum of the law passes the uniform number, up to the sum's rounding."""
    rng = np.random.default_rng(size)
    logits = rng.normal(0, 3, (200, size)).astype(np.float32)
    logits[::7, rng.integers(0, size, size // 3)] = -np.inf
    uniforms = rng.random(200)
    uniforms[:4] = [0.0, np.nextafter(1.0, 0.0), 1e-12, 1 - 1e-12]
    tokens = pick(logits, Sampling(0.9), uniforms)
    x = logits.astype(np.float64) / 0.9
    law = np.exp(x - x.max(axis=1, keepdims=True))
    law /= law.sum(axis=1, keepdims=True)
    rows = np.arange(200)
    assert (law[rows, tokens] > 0).all()
    after = law.cumsum(axis=1)[rows, tokens]
    assert (after > uniforms - 1e-6).all() and (after - law[rows, tokens] < uniforms + 1e-6).all()


@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("sampling", [Sampling(1.0, top_p=0.9), Sampling(0.7, top_p=0.97, min_p=0.3)])
def test_a_law_that_is_flat_is_cut_at_the_same_token(spread: float, sampling: Sampling) -> None:
    """More tokens stay than are ever sorted; where sums tie to rounding, one token more or less."""
    logits = np.random.default_rng(0).normal(0, spread, (3, 3000)).astype(np.float32)
    logits[1, 5:900] = -np.inf
    logits[2, 7] = 30.0  # one row in which a single token stays
    law = np.exp(log_law(logits, sampling))
    tokens = pick(logits, sampling, np.array([0.0, 0.5, 0.999]))
    for row in range(3):
        expected = reference_law(logits[row], sampling)
        assert abs(np.count_nonzero(law[row]) - np.count_nonzero(expected)) <= 1
        np.testing.assert_allclose(law[row], expected, atol=2 * expected.max() if spread == 0 else 1e-3)
        assert law[row, tokens[row]] > 0
    assert tokens[2] == 7


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("min_p", [1e-8, 0.02])
def test_a_law_on_its_few_tokens(temperature: float, min_p: float) -> None:
    """Also where it is so cold that all but the likeliest have next to nothing."""
    rng, sampling = np.random.default_rng(3), Sampling(temperature, min_p=min_p)
    logits, shift = (rng.normal(0, scale, (4, 50)).astype(np.float32) for scale in (3, 1))
    for shifted in (None, shift):
        rows, tokens, p, base = sparse_law(logits, sampling, shifted)
        law = np.zeros(logits.shape)
        law[rows, tokens] = p
        np.testing.assert_allclose(law, np.exp(log_law(logits, sampling)), atol=1e-5)
        np.testing.assert_allclose(np.bincount(rows, base), 1.0, rtol=1e-5)
