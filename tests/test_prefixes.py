"""Responses that begin with given tokens, and the laws that rollouts report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import synthetic
from test_engine import CHAT

from aisp_local import shipped
from aisp_local.engine import LlamaEngine
from aisp_local.engine.sampling import log_law, sparse_law
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds
from aisp_local.testing import FakeEngine
from aisp_local.types import Controls, Rollouts, Sampling, Want

pytestmark = pytest.mark.native

STEPS = 24
WARM = Sampling(0.8, min_p=0.05)


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine(shipped.model()) as made:
        yield made


def roll(engine: LlamaEngine, controls: Controls, *want: Want, tokens: int = STEPS, stop: str = "") -> Rollouts:
    stops = (stop,) if stop else ()
    return engine.rollout(
        CHAT, controls, max_tokens=tokens, seeds=RowSeeds(3), stop_strings=stops, want=frozenset(want)
    )


def control(engine: LlamaEngine, n: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n, 1, engine.d)).astype(np.float32)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("want", [(), ("logprobs",)])
def test_a_response_goes_on_from_what_it_is_given(engine: LlamaEngine, held: bool, want: tuple[Want, ...]) -> None:
    """Its own beginning gives the same response again, read at once or step by step, with and without a control."""
    v = control(engine, 4) if held else None
    whole = roll(engine, Controls(n=4, vectors=v, held=held, sampling=WARM))
    cuts = [0, 1, 7, STEPS - 1]
    prefixes = [tokens[:cut] for tokens, cut in zip(whole.tokens, cuts, strict=True)]
    again = roll(engine, Controls(n=4, vectors=v, held=held, sampling=WARM, prefixes=prefixes), *want)
    assert again.texts == whole.texts
    assert again.finish_reasons == whole.finish_reasons
    # Read at once, they are not steps of the decode loop.
    assert again.n_tokens == (whole.n_tokens if want else whole.n_tokens - sum(cuts))


@pytest.mark.parametrize("arch", ["gemma2", "mamba", "rwkv6", "t5", "jamba"])
def test_every_kind_of_memory_goes_on_from_what_it_is_given(tmp_path: Path, arch: str) -> None:
    """Sliding windows, recurrent states and decoders with an encoder; other rows hold other beginnings meanwhile."""
    path = synthetic.write(tmp_path / f"{arch}.gguf", arch, vocab="bpe")
    with LlamaEngine(path, threads=1) as small:

        def go(prefixes: list[np.ndarray] | None) -> Rollouts:
            controls = Controls(n=3, sampling=Sampling(1.0, min_p=0.05), prefixes=prefixes)
            return small.rollout("ab", controls, max_tokens=12, seeds=RowSeeds(1))

        whole = go(None)
        cuts = [0, 4, len(whole.tokens[2]) - 1]
        again = go([tokens[:cut] for tokens, cut in zip(whole.tokens, cuts, strict=True)])
        for before, after in zip(whole.tokens, again.tokens, strict=True):
            np.testing.assert_array_equal(before, after)


def test_prefixes_of_other_responses_and_of_many_rows(engine: LlamaEngine) -> None:
    """More prefixes than fit into one batch, more rollouts than rows."""
    first = roll(engine, Controls(n=1, sampling=WARM))
    prefix = first.tokens[0][:20]
    with LlamaEngine(shipped.model(), parallel=30, n_ubatch=64) as small:
        rollouts = roll(small, Controls(n=70, sampling=WARM, prefixes=[prefix] * 70))
    assert all(np.array_equal(tokens[:20], prefix) for tokens in rollouts.tokens)
    assert len({tuple(tokens) for tokens in rollouts.tokens}) > 10


def test_a_prefix_is_cut_below_the_limit_and_counts_for_stop_strings(engine: LlamaEngine) -> None:
    whole = roll(engine, Controls(n=1))
    short = roll(engine, Controls(n=1, prefixes=[whole.tokens[0]]), tokens=8)
    np.testing.assert_array_equal(short.tokens[0], whole.tokens[0][:8])
    # The stop string begins within what was given.
    words = whole.texts[0].split()
    stop = f"{words[2]} {words[3]}"
    stopped = roll(engine, Controls(n=1), stop=stop)
    cut = len(stopped.tokens[0]) - 1
    again = roll(engine, Controls(n=1, prefixes=[whole.tokens[0][:cut]]), stop=stop)
    assert again.texts == stopped.texts and again.finish_reasons == ["stop"]


def test_as_many_prefixes_as_rollouts() -> None:
    with pytest.raises(InputError, match="1 prefixes were given for 2 rollouts"):
        Controls(n=2, prefixes=[np.zeros(1, np.int32)])


@pytest.mark.parametrize("held", [False, True])
def test_laws_are_those_that_tokens_were_drawn_from(engine: LlamaEngine, held: bool) -> None:
    v = control(engine, 3) if held else None
    given = roll(engine, Controls(n=3, vectors=v, held=held, sampling=WARM)).tokens
    prefixes = [given[0][:5], given[1][:0], given[2][:2]]
    controls = Controls(
        n=3, vectors=v, held=held, sampling=WARM, prefixes=prefixes, want=frozenset({"laws", "prelogits"})
    )
    rollouts = roll(engine, controls)
    laws = rollouts.laws
    assert laws is not None and rollouts.prelogits is not None and len(laws) > 100
    for i, (tokens, z) in enumerate(zip(rollouts.tokens, rollouts.prelogits, strict=True)):
        assert not (laws.step[laws.row == i] < len(prefixes[i])).any(), "what was given was not drawn"
        for t in range(len(prefixes[i]), len(tokens)):
            mine = (laws.row == i) & (laws.step == t)
            p = np.zeros(engine.head.n_vocab)
            p[laws.token[mine]] = laws.probability[mine]
            assert p.sum() == pytest.approx(1, abs=1e-5)
            assert p[tokens[t]] > 0
            # Quantised matrices: the host's product of them differs a little, and so may what min-p cuts.
            expected = np.exp(log_law(engine.head.project(z[t : t + 1] + (0 if v is None else v[i])), WARM))[0]
            assert np.abs(p - expected).max() < 0.05


def test_the_nats_of_a_prefix_are_not_counted(engine: LlamaEngine) -> None:
    v = control(engine, 2)
    v[1] = v[0]
    whole = roll(engine, Controls(n=2, vectors=v, held=True, sampling=WARM), "kl")
    prefixes = [whole.tokens[0][:12], whole.tokens[1][:0]]
    controls = Controls(n=2, vectors=v, held=True, sampling=WARM, prefixes=prefixes)
    for want in (("kl",), ("kl", "logprobs")):
        part = roll(engine, controls, *want)  # type: ignore[arg-type]
        assert part.texts == whole.texts and part.kl is not None and whole.kl is not None
        assert part.kl[1] == pytest.approx(whole.kl[1], rel=1e-3)
        assert 0 < part.kl[0] < 0.9 * whole.kl[0]


def test_laws_of_the_fake_and_of_steps_read_at_once(engine: LlamaEngine) -> None:
    prefix = roll(engine, Controls(n=1, sampling=WARM)).tokens[0][:6]
    laws = roll(engine, Controls(n=1, sampling=WARM, prefixes=[prefix], want=frozenset({"laws"}))).laws
    assert laws is not None and laws.step.min() == 6
    fake = FakeEngine()
    token = np.array([3, 4], np.int32)
    asked = Controls(n=2, sampling=WARM, prefixes=[token, token[:0]], want=frozenset({"laws"}))
    rollouts = fake.rollout("", asked, max_tokens=5, seeds=RowSeeds(0))
    assert rollouts.laws is not None and list(rollouts.tokens[0][:2]) == [3, 4]
    assert rollouts.laws.step[rollouts.laws.row == 0].min() == 2
    assert rollouts.laws.step[rollouts.laws.row == 1].min() == 0


@pytest.mark.parametrize("sampling", [Sampling(0.7, min_p=0.1), Sampling(1.0, min_p=0.02), Sampling(1.3)])
def test_sparse_laws_are_the_dense_ones(sampling: Sampling) -> None:
    logits = (np.random.default_rng(0).standard_normal((5, 300)) * 3).astype(np.float32)
    rows, tokens, p, base = sparse_law(logits, sampling)
    np.testing.assert_array_equal(p, base)
    dense = np.zeros(logits.shape)
    dense[rows, tokens] = p
    np.testing.assert_allclose(dense, np.exp(log_law(logits, sampling)), atol=1e-6 if sampling.min_p else 2e-2)
    assert (np.diff(rows) >= 0).all()


def test_of_a_flat_law_the_likeliest_tokens_are_kept() -> None:
    logits = (np.random.default_rng(0).standard_normal((3, 2000)) * 0.1).astype(np.float32)
    logits[1, :1500] = -50.0
    rows, tokens, p, _ = sparse_law(logits, Sampling(1.0, min_p=0.02))
    for row in range(3):
        assert set(tokens[rows == row]) == set(np.argsort(-logits[row])[:256])
        assert p[rows == row].sum() == pytest.approx(1, abs=1e-5)


def test_sparse_laws_have_the_base_laws_tokens_too() -> None:
    rng, sampling = np.random.default_rng(0), Sampling(0.8, min_p=0.05)
    base = (rng.standard_normal((4, 200)) * 3).astype(np.float32)
    shift = (rng.standard_normal(200) * 4).astype(np.float32)
    rows, tokens, p, q = sparse_law(base + shift, sampling, shift)
    sampled, expected = np.zeros(base.shape), np.exp(log_law(base, Sampling(0.8)))
    sampled[rows, tokens] = p
    np.testing.assert_allclose(sampled, np.exp(log_law(base + shift, sampling)), atol=1e-5)
    for row in range(4):
        mine = rows == row
        assert set(np.flatnonzero(np.exp(log_law(base, sampling))[row])) <= set(tokens[mine])
        inside = expected[row, tokens[mine]]
        np.testing.assert_allclose(q[mine], inside / inside.sum(), rtol=1e-4)
    assert (p == 0).any()


def test_head_law_score_and_fisher_against_differences() -> None:
    """The score is the gradient of the log-law, the Fisher matrix its covariance; soft-cap and gain included."""
    head, rng = FakeEngine(d=6, vocabulary=9).head, np.random.default_rng(2)
    plain = head.logits
    head.softcap, head.gain = 3.0, 0.7
    head.logits = lambda z: np.tanh(head.gain * plain(z) / 3.0) * 3.0  # type: ignore[method-assign]
    z, token = rng.standard_normal((1, 6)), np.array([4])
    found = head.score(z, token, 0.6)[0]
    step = 1e-5
    for j in range(6):
        ends = [np.log(head.law(z + s * step * np.eye(6)[j], 0.6)[0, 4]) for s in (1, -1)]
        assert found[j] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-5)
    head.softcap, head.logits = 0.0, lambda z: head.gain * plain(z)  # type: ignore[method-assign]
    p = head.law(z, 0.6)
    scores = np.stack([head.score(z, np.array([k]), 0.6)[0] for k in range(9)])
    covariance = (scores * p.T).T @ scores
    u = rng.standard_normal((1, 6))
    np.testing.assert_allclose(head.fisher(u, p, 0.6)[0], covariance @ u[0], rtol=1e-5)
