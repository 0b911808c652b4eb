"""The driver: budget, best so far, interrupts, broken rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from aisp_local import controllers
from aisp_local.errors import ScoreError
from aisp_local.loop import search
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.types import Progress, Prompt, Result


def vowels(prompt: Prompt, responses: Sequence[str]) -> list[float]:
    return [float(sum(c in "aeiou" for c in r)) for r in responses]


def run(method: str = "aisp", reward: Any = vowels, **options: Any) -> Result:
    settings: dict[str, Any] = {"budget": 12, "n": 4, "max_tokens": 10, "seed": 0} | options
    engine = settings.pop("engine", None) or FakeEngine()
    controller = controllers.create(method, d=engine.d, max_tokens=settings["max_tokens"], seed=settings["seed"])
    return search(engine, controller, FakeReward(reward), "p", method=method, **settings)


@pytest.mark.parametrize("method", sorted(controllers.METHODS))
def test_the_same_seed_is_the_same_run(method: str) -> None:
    def key(result: Result) -> list[tuple[str, float, int, int]]:
        return [(c.text, c.reward, c.iteration, c.row) for c in result.candidates]

    assert key(run(method)) == key(run(method))
    if method != "best-of-n":
        norms = [s.control_norm for s in run(method).iterations]
        assert norms == [s.control_norm for s in run(method).iterations]


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
    ],
)
def test_broken_rewards_are_named(reward: Any, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        run(reward=reward)


def test_progress_counts_up() -> None:
    seen: list[Progress] = []
    run(on_progress=seen.append)
    assert [p.n_tokens for p in seen] == sorted(p.n_tokens for p in seen)
    assert [p.stats.iteration for p in seen if p.stats] == [1, 2, 3]
    assert seen[-1].rollouts_done == 12
