"""The driver: budget, best so far, interrupts, broken rewards."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from aisp_local import Aligner, controllers
from aisp_local.errors import InputError, ScoreError
from aisp_local.loop import search
from aisp_local.seeds import RowSeeds
from aisp_local.testing import FakeEngine, FakeReward, needed
from aisp_local.types import Controls, Limits, Progress, Prompt, Result, Rollouts, Sampling


def vowels(prompt: Prompt, responses: Sequence[str]) -> list[float]:
    return [float(sum(c in "aeiou" for c in r)) for r in responses]


def run(method: str = "aisp", reward: Any = vowels, **options: Any) -> Result:
    settings: dict[str, Any] = {"budget": 12, "n": 4, "max_tokens": 10, "seed": 0} | options
    engine = settings.pop("engine", None) or FakeEngine()
    controller = controllers.create(
        method,
        d=engine.d,
        max_tokens=settings["max_tokens"],
        seed=settings["seed"],
        head=lambda: engine.head,
        score=lambda texts: np.array(reward("p", texts)),
        text=engine.text,
        **needed(method, engine.d),
        **settings.pop("options", {}),
    )
    return search(engine, controller, FakeReward(reward), "p", method=method, **settings)


@pytest.mark.parametrize("method", sorted(controllers.METHODS))
def test_the_same_seed_is_the_same_run(method: str) -> None:
    def key(result: Result) -> list[tuple[str, float, int, int]]:
        return [(c.text, c.reward, c.iteration, c.row) for c in result.candidates]

    assert key(run(method)) == key(run(method))
    if method != "best-of-n":
        norms = [s.control_norm for s in run(method).iterations]
        assert norms == [s.control_norm for s in run(method).iterations]


@pytest.mark.parametrize("method", sorted(controllers.METHODS))
@pytest.mark.parametrize("budget", [12, 10])
def test_noise_drawn_while_the_device_decodes_is_the_same(
    method: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, bool]] = []
    real = controllers.Aisp.prepare

    def prepare(self: controllers.Aisp, n: int) -> None:
        drawn.append((n, threading.current_thread() is threading.main_thread()))
        real(self, n)

    monkeypatch.setattr(controllers.Aisp, "prepare", prepare)
    here = run(method, budget=budget)
    assert drawn == []
    engine = FakeEngine()
    engine.offloaded = True
    there = run(method, budget=budget, engine=engine)
    assert [(c.text, c.reward, c.row) for c in there.candidates] == [(c.text, c.reward, c.row) for c in here.candidates]
    assert [s.control_norm for s in there.iterations] == [s.control_norm for s in here.iterations]
    assert drawn == ([(4, False), (budget - 8, False)] if method == "aisp" else [])


@pytest.mark.parametrize(("budget", "n", "sizes"), [(12, 4, [4, 4, 4]), (10, 4, [4, 4, 2]), (3, 4, [3]), (1, 1, [1])])
def test_every_rollout_counts(budget: int, n: int, sizes: list[int]) -> None:
    scored: list[int] = []

    def count(prompt: Prompt, responses: Sequence[str]) -> list[float]:
        scored.append(len(responses))
        return vowels(prompt, responses)

    result = run(reward=count, budget=budget, n=n)
    assert scored == sizes
    assert [s.n for s in result.iterations] == sizes
    assert [s.iteration for s in result.iterations] == list(range(1, len(sizes) + 1))
    assert result.rollouts == budget
    assert result.status == "complete"


def test_the_best_ever_wins_even_if_it_came_first() -> None:
    calls = [0]

    def falling(prompt: Prompt, responses: Sequence[str]) -> list[float]:
        calls[0] += 1
        return [-10.0 * calls[0] - i for i in range(len(responses))]

    result = run(reward=falling)
    assert result.reward == -10.0
    assert (result.candidates[0].iteration, result.candidates[0].row) == (1, 1)
    assert result.answer == result.candidates[0].text
    rewards = [c.reward for c in result.candidates]
    assert rewards == sorted(rewards, reverse=True)
    assert [s.best_so_far for s in result.iterations] == [-10.0] * 3


def test_statistics() -> None:
    result = run()
    for s in result.iterations:
        mine = [c.reward for c in result.candidates if c.iteration == s.iteration]
        assert s.best == max(mine)
        assert s.mean == pytest.approx(np.mean(mine))
        assert s.std == pytest.approx(np.std(mine))
        assert s.ess is not None and 1 <= s.ess <= 4
    assert result.n_tokens == sum(c.n_tokens for c in result.candidates)


def test_kl_is_reported_when_asked() -> None:
    asked = run(want=frozenset({"kl", "logprobs"}))
    assert all(c.kl is not None and c.kl > 0 and c.logprob is not None for c in asked.candidates)
    assert all(c.kl is None for c in run().candidates)


class StopAfter:
    """True from the given call on."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_stop_between_iterations_keeps_the_best() -> None:
    seen: list[Progress] = []
    result = run(
        budget=400,
        stop=lambda: any(p.stats is not None and p.stats.iteration == 2 for p in seen),
        on_progress=seen.append,
    )
    assert result.status == "interrupted"
    assert [s.iteration for s in result.iterations] == [1, 2]


@pytest.mark.parametrize("calls", range(1, 12))
def test_a_stop_while_decoding_returns_an_answer(calls: int) -> None:
    result = run(budget=400, stop=StopAfter(calls))
    assert result.status == "interrupted"
    assert result.reward == max(c.reward for c in result.candidates)
    finished = [c for c in result.candidates if c.finish_reason != "interrupted"]
    assert not finished or len(finished) == len(result.candidates)


def test_a_stop_before_anything_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stop=lambda: True)


def test_unfinished_rows_count_only_when_no_row_has_finished() -> None:
    """Rows of iteration 2 are cut: finished ones of iteration 1 stand, even if none of them had a finite score."""
    scored: list[int] = []
    seen: list[Progress] = []

    def count(value: float) -> Any:
        def score(prompt: Prompt, responses: Sequence[str]) -> list[float]:
            scored.append(len(responses))
            return [value] * len(responses)

        return score

    def second() -> bool:
        return bool(seen) and seen[-1].iteration == 2 and seen[-1].step == 1

    result = run(reward=count(1.0), stop=second, on_progress=seen.append)
    assert {c.iteration for c in result.candidates} == {1} and scored == [4]
    scored.clear(), seen.clear()
    with pytest.raises(ScoreError, match="no finite score in 4 rollouts"):
        run(reward=count(np.nan), stop=second, on_progress=seen.append)
    assert scored == [4]
    # Nothing has finished: what was cut short is all there is.
    result = run(reward=count(1.0), stop=StopAfter(1))
    assert [c.finish_reason for c in result.candidates] == ["interrupted"] * 4
    assert {c.n_tokens for c in result.candidates} == {1}


def test_rows_that_finished_before_a_cut_are_the_only_ones_scored() -> None:
    engine = FakeEngine(vocabulary=4)  # token 0, the end, is drawn often
    result = run("best-of-n", engine=engine, n=12, stop=StopAfter(2))
    assert result.status == "interrupted"
    assert 0 < len(result.candidates) < 12
    assert {c.finish_reason for c in result.candidates} == {"stop"}


def test_an_interrupt_while_scoring_keeps_the_best() -> None:
    calls = [0]

    def interrupted(prompt: Prompt, responses: Sequence[str]) -> list[float]:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return vowels(prompt, responses)

    result = run(reward=interrupted)
    assert result.status == "interrupted"
    assert result.rollouts == 4


def test_the_time_limit_ends_the_search() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    result = run(budget=4000, time_limit=200.0, clock=clock)
    assert result.status == "time-limit"
    assert 1 <= len(result.iterations) < 1000
    with pytest.raises(InputError, match="time limit of 1.0 seconds passed before the first token"):
        run(time_limit=1.0, clock=clock)


@pytest.mark.parametrize("limit", [0.0, -1.0, np.nan])
def test_time_limits_that_are_none(limit: float) -> None:
    with pytest.raises(InputError, match="must be greater than 0"):
        run(time_limit=limit)


def test_a_target_reward_ends_the_search() -> None:
    whole = run(budget=24)
    target = whole.iterations[2].best_so_far
    reached = next(s.iteration for s in whole.iterations if s.best_so_far >= target)
    result = run(budget=24, limits=Limits(target_reward=target))
    assert (result.status, result.rollouts, result.reward) == ("target", 4 * reached, target)
    assert run(budget=24, limits=Limits(target_reward=1e9)).status == "complete"


def test_patience_ends_a_search_that_finds_nothing_better() -> None:
    rising = iter(range(10_000))
    assert run(budget=40, limits=Limits(patience=1), reward=lambda p, r: [next(rising) for _ in r]).status == "complete"
    falling = iter(range(10_000, 0, -1))
    result = run(budget=40, limits=Limits(patience=2), reward=lambda p, r: [next(falling) for _ in r])
    assert (result.status, len(result.iterations)) == ("patience", 3)


def test_a_budget_of_tokens_is_kept() -> None:
    whole = run("best-of-n", budget=40)
    for tokens in (1, 60, 150, 250):
        result = run("best-of-n", budget=40, limits=Limits(tokens=tokens))
        assert result.rollouts < 40 and result.status == "token-limit"
        # Lengths are not known before: the last iteration may be longer than the mean of those before, or shorter.
        assert result.n_tokens <= max(tokens + 15, 10)
        assert result.n_tokens >= 0.6 * tokens
        # No crumbs in the end: such iterations teach and find nothing.
        sizes = [stats.n for stats in result.iterations]
        assert all(4 * size >= min(max(sizes), 40 - sum(sizes[:i])) for i, size in enumerate(sizes) if i)
        assert [c.text for c in whole.candidates if (c.iteration, c.row) == (1, 1)] == [
            c.text for c in result.candidates if (c.iteration, c.row) == (1, 1)
        ]
    assert run("best-of-n", budget=8, limits=Limits(tokens=10_000)).status == "complete"


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"target_reward": float("nan")}, "the target reward is nan"),
        ({"patience": 0}, "the patience is 0"),
        ({"tokens": 0}, "the budget is 0 tokens"),
    ],
)
def test_limits_that_are_none(limits: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Limits(**limits)


@pytest.mark.parametrize("unfinished, sizes", [(True, [32, 8]), (False, [16, 16, 8])])
def test_rows_by_default(unfinished: bool, sizes: list[int]) -> None:
    reward = FakeReward(vowels)
    setattr(reward, "unfinished", unfinished)  # noqa: B010
    result = Aligner(FakeEngine(), reward).generate("a", budget=40, max_tokens=4)
    assert [stats.n for stats in result.iterations] == sizes


def test_soft_best_of_n_draws_its_answer() -> None:
    best = run("best-of-n", budget=24)
    assert run("soft-best-of-n", budget=24, options={"lambda_": 1e-9}).answer == best.answer
    answers = [run("soft-best-of-n", budget=24, seed=seed, options={"lambda_": 1e9}) for seed in range(40)]
    places = [[c.reward for c in r.candidates[1:]].count(r.reward) for r in answers]
    assert len({r.reward for r in answers}) > 2 and places, "at a great lambda any of them may win"
    for result in answers:
        assert result.candidates[0].text == result.answer and result.rollouts == 24
        rest = [c.reward for c in result.candidates[1:]]
        assert rest == sorted(rest, reverse=True)


def test_rewards_that_are_not_finite_never_win() -> None:
    def partly(prompt: Prompt, responses: Sequence[str]) -> list[float]:
        return [np.inf, np.nan, 1.0, -np.inf][: len(responses)]

    result = run(reward=partly)
    assert result.reward == 1.0
    assert result.candidates[0].reward == 1.0
    assert all(s.n_nonfinite == 3 and s.mean == 1.0 for s in result.iterations)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda p, r: [np.nan] * len(r), "no finite score"),
        (lambda p, r: [1.0], "one number each"),
        (lambda p, r: ["good"] * len(r), "not numbers"),
        (lambda p, r: None, "not numbers|one number each"),
        (lambda p, r: {}["score"], r"'<lambda>' failed \(KeyError: 'score'\)"),
    ],
)
def test_broken_rewards_are_named(reward: Any, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        run(reward=reward)


class Broken:
    """A reward object of a user's own."""

    name = "broken"

    def score(self, prompt: Prompt, responses: Sequence[str]) -> Any:
        raise RuntimeError("no network")


def test_a_broken_reward_object_is_named_in_search_and_baseline() -> None:
    aligner = Aligner(FakeEngine(), Broken())
    for scores in (lambda: aligner.generate("p", budget=2, max_tokens=4), lambda: aligner.baseline("p", max_tokens=4)):
        with pytest.raises(ScoreError, match=r"the reward 'broken' failed \(RuntimeError: no network\)") as caught:
            scores()
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_progress_counts_up() -> None:
    seen: list[Progress] = []
    run(on_progress=seen.append)
    assert [p.n_tokens for p in seen] == sorted(p.n_tokens for p in seen)
    assert [p.stats.iteration for p in seen if p.stats] == [1, 2, 3]
    assert seen[-1].rollouts_done == 12


def roll(controls: Controls, **options: Any) -> Rollouts:
    return FakeEngine().rollout("p", controls, **({"max_tokens": 20, "seeds": RowSeeds(2)} | options))


def test_the_fake_engine_stops_at_stop_strings() -> None:
    warm = Controls(n=6, sampling=Sampling(1.0))
    free = roll(warm)
    stop = "fc"  # two tokens: a stop string may span them
    stopped = roll(warm, stop_strings=["~", stop])
    assert 1 < sum(stop in text for text in free.texts) < 6
    for i, text in enumerate(free.texts):
        assert stopped.texts[i] == text.split(stop)[0]
        if stop in text:
            assert stopped.finish_reasons[i] == "stop"
            end = text.index(stop) + 2
            np.testing.assert_array_equal(stopped.tokens[i], free.tokens[i][:end])
        else:
            assert stopped.finish_reasons[i] == free.finish_reasons[i]
            np.testing.assert_array_equal(stopped.tokens[i], free.tokens[i])
    assert stopped.n_tokens == sum(map(len, stopped.tokens))


def test_the_fake_engine_gives_prelogits_before_the_control() -> None:
    engine = FakeEngine()
    v = np.random.default_rng(0).standard_normal((3, 1, engine.d)).astype(np.float32)
    out = engine.rollout(
        "p",
        Controls(n=3, vectors=v, held=True),
        max_tokens=9,
        seeds=RowSeeds(0),
        want=frozenset({"prelogits", "kl", "logprobs"}),
    )
    assert out.prelogits is not None and out.kl is not None and out.base_logprobs is not None

    def log_softmax(x: np.ndarray) -> np.ndarray:
        return np.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True)))

    for row, z in enumerate(out.prelogits):
        assert z.shape == (len(out.tokens[row]), engine.d) and z.dtype == np.float32
        p, q = log_softmax((z + v[row]) @ engine._w.T), log_softmax(z @ engine._w.T)
        np.testing.assert_array_equal(p.argmax(axis=1), out.tokens[row])
        np.testing.assert_allclose(out.kl[row], (np.exp(p) * (p - q)).sum(), rtol=1e-4)
        np.testing.assert_allclose(out.base_logprobs[row], q[np.arange(len(z)), out.tokens[row]], atol=1e-5)
    assert roll(Controls(n=3)).prelogits is None
    base = roll(Controls(n=2, sampling=Sampling(1.0)), want=frozenset({"kl"}))
    np.testing.assert_array_equal(base.kl, np.zeros(2, np.float32))


@pytest.mark.parametrize(
    ("controls", "options", "message"),
    [
        (Controls(n=1), {"max_tokens": 0}, "max_tokens is 0"),
        (Controls(n=1), {"stop_strings": [""]}, "stop string is empty"),
        (Controls(n=1, vectors=np.zeros((1, 2, 5), np.float32)), {}, "5 wide; the model's pre-logits are 8"),
    ],
)
def test_the_fake_engine_refuses_what_the_real_one_does(controls: Controls, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        roll(controls, **options)
