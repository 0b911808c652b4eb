"""The score-function controller: its gradient, its trust region, its budget of nats, and what it takes over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aisp_local import controllers, shipped
from aisp_local.controllers.beginnings import Beginnings
from aisp_local.controllers.guard import Guard
from aisp_local.controllers.score import FULL_KL, Score
from aisp_local.controllers.tilts import Steps
from aisp_local.engine import LlamaEngine
from aisp_local.errors import InputError
from aisp_local.loop import search
from aisp_local.seeds import RowSeeds
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.types import Controls, Laws, Prompt, Rollouts

D, V, T = 8, 12, 10


def score(engine: Any, **options: Any) -> Score:
    settings: dict[str, Any] = {"d": engine.d, "max_tokens": T, "seed": 4} | options
    made = controllers.create("score", head=lambda: engine.head, **settings)
    assert isinstance(made, Score)
    return made


def roll(engine: Any, controller: Score, n: int, iteration: int, tokens: int = T, prompt: Prompt = "") -> Rollouts:
    seeds = RowSeeds(2, iteration=iteration)
    rollouts = engine.rollout(prompt, controller.ask(n), max_tokens=tokens, seeds=seeds)
    assert isinstance(rollouts, Rollouts)
    return rollouts


def vowels(prompt: Prompt, responses: Sequence[str]) -> list[float]:
    return [sum(c in "aei" for c in r) - 0.1 * len(r) for r in responses]


def dense(laws: Laws) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Probabilities [V] by row and step, of the law sampled from and of the base law."""
    found: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    for row, step, token, p, q in zip(laws.row, laws.step, laws.token, laws.probability, laws.base, strict=True):
        here = found.setdefault((int(row), int(step)), (np.zeros(V), np.zeros(V)))
        here[0][token], here[1][token] = p, q
    return found


def test_one_step_against_its_formula_in_float64() -> None:
    engine, temperature = FakeEngine(d=D, vocabulary=V), 3.0
    w = engine.head.weight.astype(np.float64)
    controller = score(engine, temperature=temperature, min_p=0.001, step=0.3, strength=1.0, reuse=0.0)
    rewards = np.array([1.0, -0.5, 2.0, np.nan, 0.25])
    before = np.zeros(D)
    for iteration in (1, 2, 3):
        rollouts = roll(engine, controller, 5, iteration)
        assert rollouts.laws is not None
        laws, finite = dense(rollouts.laws), np.isfinite(rewards)
        advantages = np.where(finite, rewards - np.nanmean(rewards), 0.0)
        advantages /= advantages.std()
        g, fisher, expected = np.zeros(D), np.zeros((D, D)), 0.0
        for (row, step), (p, q) in laws.items():
            token = rollouts.tokens[row][step]
            g += advantages[row] * w.T @ (np.eye(V)[token] - p) / temperature / 5
            mean = w.T @ q
            fisher += ((w.T * q) @ w - np.outer(mean, mean)) / temperature**2
            tilted = q * np.exp(w @ before / temperature)
            tilted /= tilted.sum()
            expected += float((tilted[q > 0] * np.log(tilted[q > 0] / q[q > 0])).sum())
            # The base law, from the sampled one and what the control added.
            inside = p > 0
            untilted = np.where(inside, p, 1) * np.exp(-(w @ before) / temperature) * inside
            np.testing.assert_allclose(untilted / untilted.sum(), q * inside / (q * inside).sum(), rtol=1e-3, atol=1e-6)
        share = np.mean([len(row) for row in rollouts.tokens]) / len(laws)  # a step's, times a response's steps
        info = controller.tell(rollouts, rewards)
        moved = controller.mean - before
        np.testing.assert_allclose(moved, g * np.linalg.norm(moved) / np.linalg.norm(g), rtol=1e-3, atol=1e-4)
        assert 0.5 * moved @ fisher @ moved * share == pytest.approx(0.3, rel=1e-3)
        assert info.kl == pytest.approx(expected * share, rel=1e-4, abs=1e-5)
        before = controller.mean.astype(np.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 5))
def test_divergences_of_tilted_laws(seed: int, steps: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.dirichlet(np.ones(size), steps).astype(np.float32)
    index = np.repeat(np.arange(steps), size).astype(np.int32)
    tokens = np.tile(np.arange(size), steps).astype(np.int32)
    found = Steps(Laws(index // 2, index, tokens, base.ravel(), base.ravel()))
    y = rng.standard_normal((steps, size)).astype(np.float32) * 3

    def kl(a: np.ndarray) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            return pytest.approx(np.where(a > 0, a * np.log(a / base), 0.0).sum(axis=1).mean(), abs=2e-5)

    weights = base * np.exp(y.astype(np.float64))
    assert found.count == steps
    assert found.divergence(y.ravel()) == kl(weights / weights.sum(axis=1, keepdims=True))
    assert found.divergence(np.zeros(y.size, np.float32)) == pytest.approx(0, abs=1e-6)
    variance = ((base * y**2).sum(1) - (base * y).sum(1) ** 2).mean()
    assert found.variance(y.ravel()) == pytest.approx(variance, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.2])
def test_the_budget_of_nats_is_kept(strength: float) -> None:
    engine = FakeEngine(d=D, vocabulary=V)
    controller = score(engine, strength=strength, step=0.5, reuse=0.0, min_p=0.0, temperature=3.0)
    kls = []
    for iteration in range(1, 13):
        asked = roll(engine, controller, 64, iteration)
        info = controller.tell(asked, np.array(vowels("", asked.texts)))
        kls.append(info.kl or 0.0)
    budget = FULL_KL * strength**2
    assert max(kls) <= 1.4 * budget + 1e-6, "the next iteration's own steps differ a little from those of the bound"
    assert kls[-1] >= 0.6 * budget
    if strength == 0:
        assert not controller.mean.any()


def test_it_learns() -> None:
    engine = FakeEngine(d=D, vocabulary=V)
    controller = score(engine, max_tokens=T, reuse=0.0, temperature=3.0, min_p=0.0)
    result = search(engine, controller, FakeReward(vowels), "", method="score", budget=256, n=16, max_tokens=T, seed=1)
    first, last = result.iterations[0], result.iterations[-1]
    assert last.mean > first.mean + first.std
    assert [s.kl is not None and s.kl >= 0 for s in result.iterations] == [True] * 16


def test_nothing_to_learn_moves_nothing() -> None:
    engine = FakeEngine(d=D, vocabulary=V)
    for rewards in (np.ones(4), np.full(4, np.nan), np.array([np.nan, 2.0, np.nan, np.nan])):
        controller = score(engine)
        controller.tell(roll(engine, controller, 4, 1), rewards)
        assert not controller.mean.any()
    alone = score(engine)
    alone.tell(roll(engine, alone, 1, 1), np.array([3.0]))
    assert not alone.mean.any()


def test_later_rollouts_begin_as_the_best_did() -> None:
    engine = FakeEngine(d=D, vocabulary=V)
    controller = score(engine, reuse=0.5, elite=2)
    first = roll(engine, controller, 6, 1)
    rewards = np.array([0.0, 5.0, 1.0, 4.0, np.nan, 2.0])
    controller.tell(first, rewards)
    asked = controller.ask(6)
    assert asked.prefixes is not None
    assert [len(prefix) for prefix in asked.prefixes[:3]] == [0, 0, 0]
    parents = [list(first.tokens[1]), list(first.tokens[3])]
    for prefix in asked.prefixes[3:]:
        assert any(list(prefix) == parent[: len(prefix)] and len(prefix) < len(parent) for parent in parents)
    same = score(engine, reuse=0.5, elite=2)
    same.tell(roll(engine, same, 6, 1), rewards)
    again = same.ask(6).prefixes
    assert again is not None and all(np.array_equal(a, b) for a, b in zip(asked.prefixes, again, strict=True))


def test_the_guard_sees_worse_and_repetitive_answers() -> None:
    rng, lively = np.random.default_rng(0), [np.arange(30, dtype=np.int32)] * 4
    guard = Guard()
    assert guard.look(np.array([0.0, 1.0, 2.0, np.nan]), lively) is None
    assert guard.look(np.array([-1.0, 0.0, 0.0, 0.0]), lively) is None, "one bad iteration may be chance"
    assert guard.look(np.array([1.0, 1.0, 1.0, 1.0]), lively) is None
    assert guard.look(np.full(4, -1.0), lively) is None
    worse = guard.look(np.full(4, -1.0), lively)
    assert worse is not None and worse.factor == 0 and "worse" in worse.note
    dull = [np.tile(rng.integers(0, 9, 3), 10).astype(np.int32)] * 4
    repetitive = guard.look(np.array([5.0, 6.0, 7.0, 8.0]), dull)
    assert repetitive is not None and repetitive.factor == 0.5 and "repeat" in repetitive.note
    assert guard.look(np.full(4, np.nan), dull) is None
    assert guard.look(np.array([5.0, 6.0, 7.0, 8.0]), [row[:12] for row in dull]) is None, "too short to tell"


def test_the_guard_shortens_the_control_and_says_so() -> None:
    engine = FakeEngine(d=D, vocabulary=V)
    controller = score(engine, reuse=0.0, temperature=3.0, min_p=0.0)
    notes = []
    for iteration in range(1, 6):
        rollouts = roll(engine, controller, 8, iteration)
        before = controller.mean
        # Rewards that fall with every iteration, whatever is done.
        info = controller.tell(rollouts, np.array(vowels("", rollouts.texts)) - 20.0 * iteration)
        notes.append(info.note)
    assert notes[:2] == [None, None] and notes[2] is not None and "begun anew" in notes[2]
    assert before.any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.floats(-5, 5), st.just(float("nan"))), min_size=1, max_size=9), st.integers(1, 4))
def test_beginnings_are_of_the_best(rewards: list[float], size: int) -> None:
    kept = Beginnings(size)
    for i, reward in enumerate(rewards):  # one after another, as over iterations
        kept.add(np.array([reward]), [np.full(3, i, np.int32)])
    finite = sorted((r for r in rewards if np.isfinite(r)), reverse=True)
    assert len(kept) == min(size, len(finite))
    if len(kept):
        rng = np.random.default_rng(0)
        drawn = [kept.draw(rng) for _ in range(60)]
        assert {len(tokens) for tokens in drawn} == {0, 1, 2}
        assert all(rewards[tokens[0]] >= finite[len(kept) - 1] for tokens in drawn if len(tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.5}, "strength is 1.5"),
        ({"step": 0.0}, "step is 0.0"),
        ({"reuse": -0.1}, "reuse is -0.1"),
        ({"elite": 0}, "elite is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"min_p": 1.0}, "min_p is 1.0"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(FakeEngine(), **options)


@pytest.mark.native
def test_its_nats_are_those_of_the_engine() -> None:
    """On the shipped model, against llama.cpp's own logits and the whole base law."""
    with LlamaEngine(shipped.model(), threads=2) as engine:
        prompt: Prompt = [{"role": "user", "content": "Tell me a story about a fox."}]
        controller = score(engine, max_tokens=32, step=3.0, temperature=1.0, min_p=0.001, reuse=0.0)
        rollouts = roll(engine, controller, 8, 1, 32, prompt)
        controller.tell(rollouts, np.array([text.count("a") for text in rollouts.texts], np.float64))
        asked = controller.ask(8)
        assert asked.vectors is not None and asked.held

        def kl(controls: Controls) -> tuple[Rollouts, float]:
            rollouts = engine.rollout(
                prompt, controls, max_tokens=32, seeds=RowSeeds(2, iteration=2), want=frozenset({"kl"})
            )
            assert rollouts.kl is not None
            return rollouts, float(rollouts.kl.mean())

        again, whole = kl(asked)
        info = controller.tell(again, np.zeros(8))
        # The engine's base law is not truncated: min-p alone costs about this.
        _, cut = kl(replace(asked, vectors=np.zeros_like(asked.vectors)))
        assert info.kl is not None and info.kl > 1.5
        assert info.kl == pytest.approx(whole - cut, rel=0.2)
