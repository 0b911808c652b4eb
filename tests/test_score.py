"""The score-function controller: its gradient, its trust region, its budget of nats, and what it takes over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aisp_local import Aligner, controllers, shipped
from aisp_local.controllers.guard import Guard
from aisp_local.controllers.score import FULL_KL, Score
from aisp_local.controllers.tilts import Steps
from aisp_local.controllers.weights import length
from aisp_local.engine import LlamaEngine
from aisp_local.engine.sampling import log_law
from aisp_local.errors import InputError
from aisp_local.loop import search
from aisp_local.rewards import Composite
from aisp_local.rewards.rules import Length
from aisp_local.seeds import RowSeeds
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.types import Controls, FloatArray, Laws, Limits, Prompt, Result, Rollouts, Sampling

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


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def test_one_step_against_its_formula_in_float64() -> None:
    engine, temperature = FakeEngine(d=D, vocabulary=V), 3.0
    w = engine.head.weight.astype(np.float64)
    controller = score(engine, temperature=temperature, min_p=0.001, step=0.3, strength=1.0, selection=0.0)
    rewards = np.array([1.0, -0.5, 2.0, np.nan, 0.25])
    before, length, usual = np.zeros(D), float(T), 0.0
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
            uncontrolled = np.where(q >= (1 - 1e-6) * 0.001 ** (1 / temperature) * q.max(), q, 0.0)
            uncontrolled /= uncontrolled.sum()
            expected += divergence(p, q) - divergence(uncontrolled, q)
            # The base law, from the sampled one and what the control added.
            inside = p > 0
            untilted = np.where(inside, p, 1) * np.exp(-(w @ before) / temperature) * inside
            np.testing.assert_allclose(untilted / untilted.sum(), q * inside / (q * inside).sum(), rtol=1e-3, atol=1e-6)
        share = length / len(laws)  # a step's, times a response's steps: the limit, then the mean of the last
        usual = length = max(usual, float(np.mean([len(row) for row in rollouts.tokens])))
        info = controller.tell(rollouts, rewards)
        moved = controller.held - before
        np.testing.assert_allclose(moved, g * np.linalg.norm(moved) / np.linalg.norm(g), rtol=1e-3, atol=1e-4)
        assert 0.5 * moved @ fisher @ moved * share == pytest.approx(0.3, rel=1e-3)
        assert info.kl == pytest.approx(expected / 5, rel=1e-4, abs=1e-5)
        before = controller.held.astype(np.float64)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 5))
def test_divergences_of_tilted_laws(seed: int, steps: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.dirichlet(np.ones(size), steps).astype(np.float32)
    index = np.repeat(np.arange(steps), size).astype(np.int32)
    tokens = np.tile(np.arange(size), steps).astype(np.int32)
    found = Steps(Laws(index // 2, index, tokens, base.ravel(), base.ravel()), Sampling(1.0))
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
    controller = score(engine, strength=strength, step=0.5, selection=0.0, min_p=0.0, temperature=3.0)
    kls = []
    for iteration in range(1, 13):
        asked = roll(engine, controller, 64, iteration)
        info = controller.tell(asked, np.array(vowels("", asked.texts)))
        kls.append(info.kl or 0.0)
    budget = FULL_KL * strength**2
    assert max(kls) <= 1.4 * budget + 1e-6, "the next iteration's own steps differ a little from those of the bound"
    assert kls[-1] >= 0.6 * budget
    if strength == 0:
        assert not controller.held.any()


def test_it_learns() -> None:
    engine = FakeEngine(d=D, vocabulary=V)
    controller = score(engine, max_tokens=T, selection=0.0, temperature=3.0, min_p=0.0, step=2.0)
    result = search(engine, controller, FakeReward(vowels), "", method="score", budget=256, n=16, max_tokens=T, seed=1)
    first, last = result.iterations[0], result.iterations[-1]
    assert last.mean > first.mean + first.std
    assert [s.kl is not None and s.kl >= 0 for s in result.iterations] == [True] * 16


def test_nothing_to_learn_moves_nothing() -> None:
    engine = FakeEngine(d=D, vocabulary=V)
    for rewards in (np.ones(4), np.full(4, np.nan), np.array([np.nan, 2.0, np.nan, np.nan])):
        controller = score(engine)
        controller.tell(roll(engine, controller, 4, 1), rewards)
        assert not controller.held.any()
    alone = score(engine)
    alone.tell(roll(engine, alone, 1, 1), np.array([3.0]))
    assert not alone.held.any()


def test_the_guard_sees_worse_and_repetitive_answers() -> None:
    rng, lively = np.random.default_rng(0), [np.arange(30, dtype=np.int32)] * 4
    for times, seen in ((8, True), (3, False)):  # of few an iteration, all of one parent, the spread is no measure
        guard = Guard()
        assert guard.look(np.array([0.0, 1.0, 2.0, np.nan] * times), lively) is None
        bad = np.array([-1.0, 0.0, 0.0, 0.0] * times) - 1.0
        assert guard.look(bad, lively) is None, "one bad iteration may be chance"
        assert guard.look(np.full(4 * times, 1.0), lively) is None
        assert guard.look(np.full(4 * times, -1.0), lively) is None
        worse = guard.look(np.full(4 * times, -1.0), lively)
        assert (worse is not None) == seen
        assert worse is None or (worse.factor == 0 and "worse" in worse.note)
    dull = [np.tile(rng.integers(0, 9, 3), 10).astype(np.int32)] * 4
    repetitive = guard.look(np.array([5.0, 6.0, 7.0, 8.0]), dull)
    assert repetitive is not None and repetitive.factor == 0.5 and "repeat" in repetitive.note
    assert guard.look(np.full(4, np.nan), dull) is None
    assert guard.look(np.array([5.0, 6.0, 7.0, 8.0]), [row[:12] for row in dull]) is None, "too short to tell"


def test_the_guard_glances_at_what_loops_within_an_iteration() -> None:
    lively, dull = np.arange(30, dtype=np.int32), np.tile(np.arange(5, dtype=np.int32), 6)
    guard = Guard()
    assert guard.glance([lively] * 3) is None and guard.glance([dull[:20]] * 4) is None, "too short to tell"
    assert guard.glance([dull, *[dull[:20]] * 2]) is None, "most are too short to tell"
    assert guard.glance([dull, lively, dull, lively]) is None, "some may"
    verdict = guard.glance([dull] * 3 + [dull[:20]])
    assert verdict is not None and verdict.factor == 0.5 and "repeat" in verdict.note
    assert guard.glance([dull] * 4) is None, "once an iteration"
    assert guard.look(np.arange(4.0), [dull] * 4) is None
    assert guard.glance([dull] * 4) is not None


def test_an_iteration_that_loops_is_steered_less_before_it_ends() -> None:
    dull = [np.tile(np.arange(5, dtype=np.int32), 6)] * 4
    controller = score(FakeEngine(d=D, vocabulary=V), steering=np.ones(D, np.float32))
    controller.ask(4)
    info = controller.tell(Rollouts(dull, [""] * 4, ["paused"] * 4, 0.0, 0), np.arange(4.0))
    assert info.note is not None and "repeat" in info.note
    np.testing.assert_array_equal(controller.held, np.full(D, 0.5, np.float32))
    controller.ask(4)
    assert controller.tell(Rollouts(dull, [""] * 4, ["paused"] * 4, 0.0, 0), np.arange(4.0)).note is None
    still = score(FakeEngine(d=D, vocabulary=V))
    still.ask(4)
    told = still.tell(Rollouts(dull, [""] * 4, ["paused"] * 4, 0.0, 0), np.arange(4.0))
    assert told.note is None, "nothing is steered yet: it is the model that repeats itself"


def test_the_guard_tells_rewards_of_noise_by_siblings() -> None:
    rng = np.random.default_rng(0)
    for heritable, told in ((0.0, [False, True, False]), (1.0, [False, False, False])):
        guard, said = Guard(), []
        for _ in range(3):
            for _ in range(3):  # nine families each: too few in the first third
                parents = np.repeat(np.arange(4), 4)
                rewards = heritable * rng.normal(size=4)[parents] + rng.normal(size=16)
                guard.compare(parents, np.append(rewards, np.nan)[:16])
            said.append(guard.noise() is not None)
        assert said == told, heritable
    for rewards in (np.ones(16), np.full(16, np.nan)):  # what does not differ says nothing
        guard.compare(parents, rewards)
    guard = Guard()
    guard.compare(np.arange(16), rng.normal(size=16))  # nobody has a sibling
    assert guard.noise() is None


def test_a_reward_of_noise_is_told_from_one_that_leads_somewhere() -> None:
    def noise(prompt: Prompt, responses: Sequence[str]) -> list[float]:
        return [float(np.random.default_rng(list(text.encode())).normal()) for text in responses]

    for reward, told in ((noise, True), (letters, False)):
        found = find(reward, n=64, budget=256)
        assert any("noise" in (s.note or "") for s in found.iterations) is told


def test_the_guard_shortens_the_control_and_says_so() -> None:
    engine = FakeEngine(d=D, vocabulary=V)
    controller = score(engine, selection=0.0, temperature=3.0, min_p=0.0)
    notes = []
    for iteration in range(1, 6):
        rollouts = roll(engine, controller, 16, iteration)
        before = controller.held
        # Rewards that fall with every iteration, whatever is done.
        info = controller.tell(rollouts, np.array(vowels("", rollouts.texts)) - 20.0 * iteration)
        notes.append(info.note)
    assert notes[:2] == [None, None] and notes[2] is not None and "begun anew" in notes[2]
    assert before.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.5}, "strength is 1.5"),
        ({"nats": -1.0}, "nats is -1.0"),
        ({"nats": float("inf")}, "nats is inf"),
        ({"step": 0.0}, "step is 0.0"),
        ({"step": 1e7}, "1000000 at most"),
        ({"selection": -0.1}, "selection is -0.1"),
        ({"blocks": 0}, "blocks is 0"),
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
    with LlamaEngine(shipped.model()) as engine:
        prompt: Prompt = [{"role": "user", "content": "Tell me a story about a fox."}]
        controller = score(engine, max_tokens=32, step=3.0, temperature=1.0, min_p=0.001, selection=0.0)
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


def find(reward: Any = vowels, engine: Any = None, **options: Any) -> Result:
    engine = engine or FakeEngine(d=D, vocabulary=30)
    budget, n = options.pop("budget", 48), options.pop("n", 16)
    search_options = {name: options.pop(name) for name in ("stop", "time_limit", "clock", "want") if name in options}
    controller = score(engine, max_tokens=40, **{"temperature": 2.0, "min_p": 0.0, **options})
    given = reward if isinstance(reward, FakeReward) else FakeReward(reward)
    return search(
        engine, controller, given, "", method="score", budget=budget, n=n, max_tokens=40, seed=1, **search_options
    )


def letters(prompt: Prompt, responses: Sequence[str]) -> list[float]:
    """What each part adds does not depend on the rest: the score of a beginning tells of the whole."""
    return [float(sum(c in "aeiou" for c in r)) for r in responses]


def test_blocks_are_one_iteration_and_every_rollout_counts_once() -> None:
    result = find(letters)
    assert result.status == "complete" and len(result.candidates) == 48
    assert [(s.iteration, s.n) for s in result.iterations] == [(1, 16), (2, 16), (3, 16)]
    for iteration in (1, 2, 3):
        mine = [c for c in result.candidates if c.iteration == iteration]
        assert sorted(c.row for c in mine) == list(range(1, 17))
        assert all(c.n_given == 0 and c.finish_reason in ("stop", "length") for c in mine)
    assert result.n_tokens == sum(s.n_tokens for s in result.iterations)
    assert all(c.reward == letters("", [c.text])[0] for c in result.candidates)


def test_selection_finds_more_than_the_control_alone() -> None:
    rewards = [find(letters, selection=share, seed=seed).reward for share in (0.5, 0.0) for seed in range(4)]
    assert np.mean(rewards[:4]) > np.mean(rewards[4:]) + 1


def test_its_nats_are_the_controls_and_the_selections() -> None:
    kls = [s.kl or 0.0 for s in find(letters, strength=0.4).iterations]
    assert 0 < max(kls) <= 1.05 * FULL_KL * 0.4**2
    only = [s.kl or 0.0 for s in find(letters, strength=0.4, selection=1.0).iterations]
    assert 0 < max(only) <= FULL_KL * 0.4**2
    # Asked for, the control's are those of the engine, from the model at temperature 1.
    alone: dict[str, Any] = {"strength": 0.4, "selection": 1.0, "temperature": 1.0}
    counted = [s.kl or 0.0 for s in find(letters, **alone).iterations]
    exact = [s.kl or 0.0 for s in find(letters, **alone, want=frozenset({"kl"})).iterations]
    assert exact == pytest.approx(counted)


@pytest.mark.parametrize("min_p", [0.0, 0.02])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("nats", [3.0, 12.0])
def test_a_budget_in_nats_holds_in_every_iteration(temperature: float, nats: float, min_p: float) -> None:
    """Of a random model, where every state is another: what a block spent the next ones do without."""
    for seed in range(3):
        engine = FakeEngine(d=D, vocabulary=30, seed=seed)
        result = find(letters, engine=engine, nats=nats, temperature=temperature, budget=128, min_p=min_p)
        assert 0.3 * nats < max(s.kl or 0.0 for s in result.iterations) <= 1.08 * nats


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_its_nats_are_those_of_the_law_that_min_p_leaves(temperature: float) -> None:
    """Counted on a step's few tokens; here from whole laws, at the states that were visited."""
    engine, sampling = FakeEngine(d=D, vocabulary=V), Sampling(temperature, min_p=0.1)
    u, w = 0.4 * np.ones(D, np.float32), engine.head.weight.astype(np.float64)
    controller = score(engine, temperature=temperature, min_p=0.1, selection=0.0, nats=1e6, steering=u)
    controls = controller.ask(32)
    rollouts = engine.rollout("", controls, max_tokens=T, seeds=RowSeeds(1), want=frozenset({"laws", "prelogits"}))
    assert rollouts.prelogits is not None
    total = 0.0
    for states in rollouts.prelogits:
        base, sampled, uncontrolled = (
            np.exp(log_law((states + v) @ w.T, law))
            for v, law in ((0 * u, Sampling(temperature)), (u, sampling), (0 * u, sampling))
        )
        total += divergence(sampled, base) - divergence(uncontrolled, base)
    info = controller.tell(rollouts, np.zeros(32))
    assert info.kl == pytest.approx(total / 32, rel=1e-3)


@pytest.mark.parametrize("size", [3.0, 1e3, 1e20])
@pytest.mark.parametrize("selection", [0.0, 0.5])
def test_a_steering_that_is_too_long_is_shortened_whatever_rewards_say(size: float, selection: float) -> None:
    steering = np.full(D, size, np.float32)

    def all_alike(prompt: Prompt, responses: Sequence[str]) -> list[float]:
        return [1.0] * len(responses)

    found = find(all_alike, steering=steering, selection=selection, min_p=0.02, n=16, budget=64)
    assert all((s.kl or 0.0) <= 1.15 * FULL_KL * 0.5**2 for s in found.iterations[1:])
    # Without selection nothing is told before the first iteration has ended.
    assert (found.iterations[0].kl or 0.0) > (0.0 if selection else 21.0)


@pytest.mark.parametrize("selection", [0.0, 0.5])
def test_a_steering_that_is_known_to_be_too_long_is_shortened_before_anything_is_told(selection: float) -> None:
    """Of a search with twenty times the nats; with the nats that it was learnt with it starts as it is."""
    engine = FakeEngine(d=D, vocabulary=V)

    def learnt(nats: float) -> tuple[FloatArray, float]:
        controller = score(engine, nats=nats, selection=0.0, min_p=0.0, max_tokens=40)
        for i in range(4):
            rollouts = engine.rollout(
                "", (controls := controller.ask(32)), max_tokens=40, seeds=RowSeeds(i), want=controls.want
            )
            controller.tell(rollouts, np.array([float(np.sum(row == 5)) for row in rollouts.tokens]))
        assert controller.held_nats is not None
        return controller.held, controller.held_nats

    u, nats = learnt(20.0)
    assert 10 < nats <= 20.0
    # What it says of itself is what it does.
    controls = Controls(64, vectors=np.tile(u, (64, 1, 1)), held=True, sampling=Sampling(1.0))
    found = engine.rollout("", controls, max_tokens=40, seeds=RowSeeds(9), want=frozenset({"kl"}))
    assert found.kl is not None and float(np.mean(found.kl)) == pytest.approx(nats, rel=0.35)
    for budget in (1.0, 5.0, 40.0):
        part = budget * (1 - selection)
        begun = score(engine, nats=budget, selection=selection, steering=u, steering_nats=nats)
        np.testing.assert_allclose(begun.held, u * min(1.0, math.sqrt(part / nats)), rtol=1e-6)
        assert begun.held_nats == pytest.approx(min(part, nats))
        unknown = score(engine, nats=budget, selection=selection, steering=u)
        np.testing.assert_array_equal(unknown.held, u)
        assert unknown.held_nats is None


def test_what_the_guard_takes_within_an_iteration_is_of_what_is_left() -> None:
    engine = FakeEngine(d=D, vocabulary=30)
    controller = score(engine, max_tokens=80, nats=20.0, min_p=0.0, steering=np.full(D, 0.5, np.float32))
    spent, strength = [], []
    controls = controller.ask(8)
    while True:
        end = controls.pause
        rollouts = engine.rollout("", controls, max_tokens=80, seeds=RowSeeds(1), want=controls.want)
        dull = np.tile(np.array([5, 6], np.int32), end or 40)[: end or 80]  # which the guard takes for a loop
        reasons: Any = ["paused" if end else "length"] * 8
        info = controller.tell(replace(rollouts, tokens=[dull] * 8, finish_reasons=reasons), np.arange(8.0))
        spent.append(info.note)
        if end is None:
            break
        controls = controller.ask(8)
        strength.append(0.0 if controls.vectors is None else float(np.abs(controls.vectors).max()))
    assert any(note and "repeat" in note for note in spent[:-1]), "the guard spoke before the iteration ended"
    assert all(size > 0 for size in strength), "a quarter of what was left, not nothing"


def test_short_answers_do_not_make_room_for_long_ones() -> None:
    """The nats are a response's: where answers were short for an iteration, a step does not get more of them."""
    engine = FakeEngine(d=D, vocabulary=V)
    controller = score(engine, strength=0.4, step=50.0, selection=0.0, min_p=0.0, temperature=3.0, max_tokens=40)
    norms = []
    for iteration, tokens in enumerate((40, 40, 40, 40, 3, 3), 1):
        rollouts = roll(engine, controller, 64, iteration, tokens)
        controller.tell(rollouts, np.array(vowels("", rollouts.texts)))
        norms.append(length(controller.held))
    assert norms[-1] < 2 * norms[3]


@pytest.mark.native
@pytest.mark.parametrize("nats", [4.0, 20.0])
def test_a_budget_in_nats_holds_on_a_real_model(nats: float) -> None:
    """In the mean over iterations; a single one may find states of which the control makes more."""
    with Aligner.load(shipped.talker(), shipped.talker_reward()) as aligner:
        prompt: Prompt = [{"role": "user", "content": "Thank you for the cake, it was lovely."}]
        result = aligner.generate(prompt, method="score", nats=nats, budget=256, n=32, max_tokens=48)
    kls = [stats.kl for stats in result.iterations if stats.kl is not None]
    assert len(kls) == 8 and 0.2 * nats < np.mean(kls) <= nats and max(kls) <= 1.25 * nats


def test_a_budget_in_nats_is_the_strength_that_has_it() -> None:
    given = find(letters, nats=FULL_KL * 0.4**2, strength=1.0)
    same = find(letters, strength=0.4)
    assert [c.text for c in given.candidates] == [c.text for c in same.candidates]
    kls = [s.kl or 0.0 for s in find(letters, nats=3.0, selection=1.0).iterations]
    assert 0 < max(kls) <= 3.0
    assert all((s.kl or 0.0) == 0.0 for s in find(letters, nats=0.0).iterations)


@pytest.mark.parametrize("nats", [1e-8, 1e-12, 1e-16, 1e-40, 1e-300])
def test_a_budget_that_rounding_takes_for_nothing(nats: float) -> None:
    """What many interventions of the guard leave."""
    assert all(0.0 <= (s.kl or 0.0) <= 1e-6 for s in find(letters, nats=nats, selection=0.0).iterations)


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"selection": 0.0}, {"unfinished": False}])
def test_nothing_pauses_where_nothing_is_selected(options: dict[str, Any]) -> None:
    controls = score(FakeEngine(), max_tokens=40, **options).ask(16)
    assert controls.pause is None and (("laws" in controls.want) == (options.get("strength") != 0.0))


def test_rewards_that_cannot_tell_yet_are_asked_at_the_end_only() -> None:
    """How long a response becomes, its beginning does not say."""
    lengths: list[int] = []

    class Seen(Length):
        def score(self, prompt: Prompt, responses: Sequence[str]) -> Any:
            lengths.extend(map(len, responses))
            return super().score(prompt, responses)

    rules: list[Any] = [Seen(characters=[3, 5]), Composite([FakeReward(letters), Seen(characters=[3, 5])])]
    for rule in rules:
        for method in ("score", "smc"):
            lengths.clear()
            aligner = Aligner(FakeEngine(d=D, vocabulary=30), rule)
            result = aligner.generate("p", method=method, budget=16, n=8, max_tokens=30, temperature=2.0, min_p=0.0)
            assert len(lengths) == 16 == len(result.candidates)


def test_an_end_between_blocks_gives_the_best_unfinished_answer() -> None:
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 14

    result = find(letters, stop=stop)
    assert result.status == "interrupted" and result.answer and result.seconds > 0
    assert [(s.iteration, s.n) for s in result.iterations] == [(1, len(result.candidates))]
    assert result.reward == max(c.reward for c in result.candidates)
    assert {c.finish_reason for c in result.candidates} <= {"interrupted", "stop"}
    ticks = iter(range(10_000))
    late = find(letters, clock=lambda: float(next(ticks)), time_limit=60.0)
    assert late.status == "time-limit" and late.answer


def test_an_interrupt_in_the_only_iteration_is_told() -> None:
    """Wherever it comes: what there is then does not make the budget complete."""
    for calls in range(2, 30):
        left = iter(range(calls))
        engine = FakeEngine(d=D, vocabulary=30)
        controller = score(engine, max_tokens=40, temperature=2.0, min_p=0.0)
        result = search(
            engine, controller, FakeReward(letters), "", method="score", budget=16, n=16, max_tokens=40, seed=1,
            stop=lambda left=left: next(left, None) is None,
        )  # fmt: skip
        whole = all(c.finish_reason != "interrupted" for c in result.candidates) and len(result.candidates) == 16
        assert result.status == ("complete" if whole else "interrupted")
        assert len(result.iterations) == 1 and result.iterations[0].n == len(result.candidates)


def test_patience_counts_iterations_not_blocks() -> None:
    engine = FakeEngine(d=D, vocabulary=30)
    controller = score(engine, max_tokens=40, temperature=2.0, min_p=0.0)

    def shorter(prompt: Prompt, responses: Sequence[str]) -> list[float]:
        return [-float(len(r)) for r in responses]

    result = search(
        engine, controller, FakeReward(shorter), "", method="score", budget=160, n=8, max_tokens=40, seed=1,
        limits=Limits(patience=2),
    )  # fmt: skip
    assert result.status == "patience" and len(result.iterations) == 3
    assert [s.best_so_far for s in result.iterations] == [result.reward] * 3


def test_rewards_that_are_not_finite_go_on_with_nothing() -> None:
    def some(prompt: Prompt, responses: Sequence[str]) -> list[float]:
        return [float("nan") if r.startswith("b") else len(r) for r in responses]

    result = find(some)
    assert np.isfinite(result.reward) and len(result.candidates) == 48


@pytest.mark.native
def test_on_the_shipped_model_blocks_are_better_than_best_of_n() -> None:
    prompts: list[Prompt] = [
        [{"role": "user", "content": f"Tell me a story about a {animal}."}] for animal in ("fox", "boat")
    ]
    common: dict[str, Any] = {"budget": 32, "n": 32, "max_tokens": 48, "seed": 2}
    with Aligner.load() as aligner:
        ours = aligner.generate_many(prompts, method="score", **common)
        base = aligner.generate_many(prompts, method="best-of-n", temperature=1.0, min_p=0.05, **common)
        means = [np.mean([result.reward for result in found if isinstance(result, Result)]) for found in (ours, base)]
    assert means[0] > means[1] + 0.5


def test_no_strength_is_the_base_model_block_by_block_too() -> None:
    aligner = Aligner(FakeEngine(), FakeReward(lambda prompt, texts: [float(len(text)) for text in texts]))
    ways: list[dict[str, Any]] = [{"strength": 0.0}, {"strength": 0.0, "commit": True}, {"nats": 0.0, "commit": True}]
    found = [aligner.generate("p", budget=8, n=8, max_tokens=40, **way) for way in ways]
    texts = [[c.text for c in result.candidates] for result in found]
    assert texts[0] == texts[1] == texts[2] and [r.iterations[0].kl for r in found] == [found[0].iterations[0].kl] * 3
    assert aligner.generate("p", budget=8, n=8, max_tokens=40, commit=True).iterations[0].kl > 1.0
