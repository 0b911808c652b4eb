"""llama.cpp's kernel that draws tokens, and numpy's way: against each other, and against the law."""

from __future__ import annotations

from collections.abc import Callable

import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aisp_local import shipped
from aisp_local.engine import LlamaEngine
from aisp_local.engine.sampling import log_law, pick, picker
from aisp_local.errors import DecodeError
from aisp_local.native import Context, sample_rows
from aisp_local.native.binding import SAMPLE_SYMBOL
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, Sampling

Draw = Callable[[np.ndarray, Sampling, np.ndarray], np.ndarray]
EPSILON = 3e-6  # of a law's mass: what sums of float32 may round


both = pytest.mark.parametrize("draw", [pick, pytest.param(sample_rows, marks=pytest.mark.native)])


def rehash(uniform: float) -> float:
    """splitmix64 of the bits, in Python's integers."""
    mask = 2**64 - 1
    x = (int(np.float64(uniform).view(np.uint64)) + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return float((x ^ (x >> 31)) >> 11) * 2.0**-53


def inverses(law: np.ndarray, uniform: float) -> np.ndarray:
    """The tokens at which the running sum of the law may be first above its share, were it rounded."""
    after = law.cumsum() / law.sum()
    return np.flatnonzero((law > 0) & (after > uniform - EPSILON) & (after - law / law.sum() < uniform + EPSILON))


def allowed(logits: np.ndarray, sampling: Sampling, uniform: float) -> set[int]:
    """What one row may draw, in float64: more than one token only where a comparison is within rounding."""
    x = logits.astype(np.float64) - float(logits.max())
    weights, law = np.exp(x), np.exp(x / sampling.temperature)
    order = np.argsort(-x, kind="stable")
    before = np.empty(len(x))
    before[order] = (weights[order].cumsum() - weights[order]) / weights.sum()

    def kept(slack: float) -> np.ndarray:
        top_p = (before < sampling.top_p + slack) if sampling.top_p < 1 else np.full(len(x), True)
        return (top_p | (np.arange(len(x)) == order[0])) & (weights >= sampling.min_p * (1 - 10 * slack))

    surely, perhaps = kept(-EPSILON), kept(EPSILON)
    if sampling.top_p == 1 and sampling.min_p == 0:
        return set(inverses(law, uniform).tolist())
    found: set[int] = set()
    for _ in range(8):
        drawn = inverses(law, uniform)
        found |= {int(token) for token in drawn if perhaps[token]}
        if surely[drawn].all():
            return found
        uniform = rehash(uniform)
    for mask in (surely, perhaps):
        found |= set(inverses(np.where(mask, law, 0.0), uniform).tolist())
    return found


samplings = st.builds(
    Sampling,
    temperature=st.one_of(st.just(1.0), st.floats(0.05, 3.0)),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(1e-30, 0.9)),  # float32 has no smaller ones
)


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """Logits [k, V]: flat, peaked, far from zero, in ties, and with -inf; V about the sizes of blocks."""
    k = draw(st.integers(1, 9))
    size = draw(st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 511, 512, 513, 1000, 3001])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.normal(
        draw(st.sampled_from([0.0, -40.0, 1000.0])), draw(st.sampled_from([0.0, 0.1, 2.0, 30.0])), (k, size)
    )
    if draw(st.booleans()):
        logits = np.round(logits)
    if draw(st.booleans()):
        logits[:, rng.integers(0, size, size // 2)] = -np.inf
        logits[np.arange(k), rng.integers(0, size, k)] = 1.5
    if draw(st.booleans()):
        logits[np.arange(k), rng.integers(0, size, k)] += 20.0
    return logits.astype(np.float32)


edges = st.sampled_from([0.0, 1e-12, 0.5, 1 - 1e-12, float(np.nextafter(1.0, 0.0))])


@both
@given(data=st.data())
def test_a_token_is_the_definitions_but_for_rounding(draw: Draw, data: st.DataObject) -> None:
    logits, sampling = data.draw(rows()), data.draw(samplings)
    uniform = st.one_of(st.floats(0, 1, exclude_max=True), edges)
    uniforms = np.array(data.draw(st.lists(uniform, min_size=len(logits), max_size=len(logits))))
    for row, token in enumerate(draw(logits, sampling, uniforms)):
        assert int(token) in allowed(logits[row], sampling, uniforms[row])


@pytest.mark.native
@given(rows(), samplings, st.integers(0, 2**32), st.integers(2, 4))
def test_a_row_depends_on_nothing_but_itself(logits: np.ndarray, sampling: Sampling, seed: int, threads: int) -> None:
    rng = np.random.default_rng(seed)
    uniforms, order = rng.random(len(logits)), rng.permutation(len(logits))
    tokens = sample_rows(logits, sampling, uniforms)
    np.testing.assert_array_equal(sample_rows(logits[order], sampling, uniforms[order]), tokens[order])
    np.testing.assert_array_equal(sample_rows(logits, sampling, uniforms, threads), tokens)
    for row in range(len(logits)):
        assert sample_rows(logits[row : row + 1], sampling, uniforms[row : row + 1])[0] == tokens[row]


@pytest.mark.native
def test_both_ways_draw_the_same_tokens_of_a_vocabulary() -> None:
    """32,000 logits, as a model has them: of 600 draws, a number within rounding of a boundary is not among them."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, (60, 32000)).astype(np.float32)
    for temperature in (0.7, 1.0, 1.5):
        for sampling in (Sampling(temperature), Sampling(temperature, top_p=0.9), Sampling(temperature, min_p=0.02)):
            uniforms = rng.random(60)
            np.testing.assert_array_equal(sample_rows(logits, sampling, uniforms), pick(logits, sampling, uniforms))


def peaked(size: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(size).normal(0, 2.5, size), np.float32)


LOGITS = {
    "peaked": peaked(300),
    "flat": np.zeros(40, np.float32),
    "tied": np.repeat(np.float32([2, 2, 1, 0, 1]), 12),
    "cut": np.where(np.arange(300) % 3 == 0, peaked(300), np.float32(-np.inf)),
    "sure": np.where(np.arange(50) == 17, np.float32(80), peaked(50)),
}
LAWS = [
    Sampling(1.0),
    Sampling(0.6),
    Sampling(1.0, top_p=0.9),
    Sampling(0.8, top_p=0.72),
    Sampling(2.0, top_p=0.08),
    Sampling(1.5, min_p=0.3),
    Sampling(0.8, top_p=0.9, min_p=0.02),
]


@both
@pytest.mark.parametrize("sampling", LAWS, ids=lambda s: f"T{s.temperature}-p{s.top_p}-m{s.min_p}")
@pytest.mark.parametrize("name", LOGITS)
def test_many_draws_follow_the_law(draw: Draw, name: str, sampling: Sampling) -> None:
    """Pearson's statistic over tokens that are expected at least ten times, the others together as one."""
    logits, n = LOGITS[name], 20000
    law = np.exp(log_law(logits[None], sampling))[0]
    tokens = draw(np.broadcast_to(logits, (n, len(logits))), sampling, np.random.default_rng(5).random(n))
    assert (law[tokens] > 0).all()
    counts, often = np.bincount(tokens, minlength=len(law)), n * law >= 10
    seen = np.append(counts[often], counts[~often].sum())
    expected = np.append(n * law[often], n * law[~often].sum())
    seen, expected = seen[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    # Five standard deviations of the chi-square law.
    assert ((seen - expected) ** 2 / expected).sum() <= freedom + 5 * np.sqrt(2 * freedom) + 1e-6


@both
@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.3, top_p=0.4), Sampling(0.7, top_p=0.9, min_p=0.2)])
def test_a_row_without_a_law_gives_a_logit_that_shows_it(draw: Draw, sampling: Sampling) -> None:
    good = peaked(600)
    logits = np.stack([good, np.full(600, np.nan, np.float32), np.full(600, -np.inf, np.float32), good, good, good])
    logits[3, 511] = np.nan
    logits[4, [5, 300]] = np.inf
    tokens = draw(logits, sampling, np.full(6, 0.3))
    assert tokens[0] == tokens[5] == draw(good[None], sampling, np.array([0.3]))[0]
    assert tokens[1:5].tolist() == [0, 0, 511, 5]


@pytest.mark.native
def test_arguments_without_a_meaning_are_refused() -> None:
    with pytest.raises(DecodeError, match="could not sample: llama_sample_rows: invalid arguments"):
        sample_rows(np.zeros((1, 8), np.float32), Sampling(0.0), np.zeros(1))


@pytest.mark.native
def test_greedily_and_with_top_k_numpy_goes_on() -> None:
    logits, uniforms = np.stack([peaked(900), peaked(900)[::-1]]), np.array([0.2, 0.7])
    for sampling in (Sampling(), Sampling(0.9, top_k=40), Sampling(0.9, top_k=40, top_p=0.8)):
        np.testing.assert_array_equal(picker()(logits, sampling, uniforms), pick(logits, sampling, uniforms))


@pytest.mark.native
def test_a_build_without_the_kernel_answers_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def responses() -> list[list[int]]:
        controls = Controls(5, sampling=Sampling(0.8, top_p=0.9))
        with LlamaEngine(shipped.model()) as engine:
            out = engine.rollout("Once upon a time", controls, max_tokens=40, seeds=RowSeeds(7))
        return [tokens.tolist() for tokens in out.tokens]

    calls, symbol = [], getattr(llama_cpp, SAMPLE_SYMBOL)
    monkeypatch.setattr(llama_cpp, SAMPLE_SYMBOL, lambda *args: calls.append(args) or symbol(*args))
    found = responses()
    assert calls
    monkeypatch.delattr(llama_cpp, SAMPLE_SYMBOL)
    assert picker() is pick
    assert responses() == found


@pytest.mark.native
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_p=0.9)])
def test_logits_that_are_not_finite_end_the_run(
    monkeypatch: pytest.MonkeyPatch, sampling: Sampling, kernel: bool
) -> None:
    """One NaN among finite logits is enough."""
    logits = Context.logits

    def damaged(context: Context) -> np.ndarray:
        found = logits(context).copy()
        found[1, 700] = np.nan
        return found

    if not kernel:
        monkeypatch.delattr(llama_cpp, SAMPLE_SYMBOL)
    monkeypatch.setattr(Context, "logits", damaged)
    with LlamaEngine(shipped.model()) as engine, pytest.raises(DecodeError, match="not finite at step 1"):
        engine.rollout("Once upon a time", Controls(3, sampling=sampling), max_tokens=4, seeds=RowSeeds(1))
