"""The driver: budget, time limit, best so far, statistics, interrupts. It knows no algorithm."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from aisp_local.controllers.base import Controller
from aisp_local.engine.base import Engine, Want
from aisp_local.errors import InputError, ScoreError
from aisp_local.rewards.base import Reward, call
from aisp_local.seeds import RowSeeds
from aisp_local.types import (
    Candidate,
    ControllerInfo,
    Controls,
    IterationStats,
    Progress,
    Prompt,
    Result,
    Rollouts,
)


def search(
    engine: Engine,
    controller: Controller,
    reward: Reward,
    prompt: Prompt,
    *,
    method: str,
    budget: int,
    n: int,
    max_tokens: int,
    seed: int,
    prompt_index: int = 0,
    stop_strings: Sequence[str] = (),
    time_limit: float | None = None,
    stop: Callable[[], bool] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    want: frozenset[Want] = frozenset(),
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Spend ``budget`` rollouts in iterations of ``n`` (the last one smaller); return the best ever seen.

    ``stop()`` true, KeyboardInterrupt or ``time_limit`` seconds end the search with the best so far: rows that
    finished count; rows that were cut short are scored only if no row of the whole search has finished.
    Raises ScoreError when no reward is finite or the reward is broken; when the search ends before its first
    token, KeyboardInterrupt, or InputError for the time limit.
    """
    if budget < 1 or n < 1:
        raise InputError(f"budget {budget} and n {n} must both be at least 1")
    if time_limit is not None and not time_limit > 0:
        raise InputError(f"the time limit is {time_limit} seconds; it must be greater than 0")
    run = _Search(engine, controller, reward, prompt, budget, n, clock, on_progress)
    deadline = None if time_limit is None else run.start + time_limit

    def ends() -> str | None:
        if stop is not None and stop():
            return "interrupted"
        if deadline is not None and clock() >= deadline:
            return "time-limit"
        return None

    status = "complete"
    try:
        for iteration in range(1, run.iterations + 1):
            size = min(n, budget - (iteration - 1) * n)
            rollouts = run.decode(
                iteration,
                controller.ask(size),
                ends,
                max_tokens=max_tokens,
                seeds=RowSeeds(seed, prompt_index, iteration),
                stop_strings=stop_strings,
                want=want,
            )
            cut = "interrupted" in rollouts.finish_reasons
            run.score(iteration, rollouts, learn=not cut)
            ended = ends()
            if cut or (ended is not None and iteration < run.iterations):
                status = ended or "interrupted"
                break
    except KeyboardInterrupt:
        if run.best is None:
            raise
        status = "interrupted"
    if not run.candidates:
        if status == "time-limit":
            raise InputError(f"the time limit of {time_limit} seconds passed before the first token; allow more time")
        raise KeyboardInterrupt
    return run.result(status, method=method, budget=budget, seed=seed)


class _Search:
    """The state of one call of ``search``."""

    def __init__(
        self,
        engine: Engine,
        controller: Controller,
        reward: Reward,
        prompt: Prompt,
        budget: int,
        n: int,
        clock: Callable[[], float],
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.engine, self.controller, self.reward, self.prompt = engine, controller, reward, prompt
        self.budget, self.iterations = budget, -(-budget // n)
        self.clock, self.on_progress = clock, on_progress
        self.start = clock()
        self.candidates: list[Candidate] = []
        self.stats: list[IterationStats] = []
        self.best: Candidate | None = None
        self.n_tokens = 0

    def decode(
        self,
        iteration: int,
        controls: Controls,
        ends: Callable[[], str | None],
        *,
        max_tokens: int,
        seeds: RowSeeds,
        stop_strings: Sequence[str],
        want: frozenset[Want],
    ) -> Rollouts:
        self.report(iteration, 0, controls.n, 0)
        rollouts = self.engine.rollout(
            self.prompt,
            controls,
            max_tokens=max_tokens,
            seeds=seeds,
            stop_strings=stop_strings,
            want=want,
            should_stop=lambda: ends() is not None,
            on_step=lambda step, rows, tokens: self.report(iteration, step, rows, tokens),
        )
        self.n_tokens += rollouts.n_tokens
        return rollouts

    def score(self, iteration: int, rollouts: Rollouts, *, learn: bool) -> None:
        """Score what may count, remember the best, and let the controller learn from a whole iteration."""
        rows = [i for i, reason in enumerate(rollouts.finish_reasons) if reason != "interrupted"]
        if not rows and not self.candidates:
            rows = [i for i, tokens in enumerate(rollouts.tokens) if len(tokens)]
        if not rows:
            return
        began = self.clock()
        rewards = call(self.reward.name, self.reward.score, self.prompt, [rollouts.texts[i] for i in rows])
        scored = self.clock()
        for i, value in zip(rows, rewards, strict=True):
            candidate = Candidate(
                text=rollouts.texts[i],
                reward=float(value),
                iteration=iteration,
                row=i + 1,
                n_tokens=len(rollouts.tokens[i]),
                finish_reason=rollouts.finish_reasons[i],
                kl=None if rollouts.kl is None else float(rollouts.kl[i]),
                logprob=None
                if rollouts.base_logprobs is None
                else float(rollouts.base_logprobs[i].sum(dtype=np.float64)),
            )
            self.candidates.append(candidate)
            if np.isfinite(value) and (self.best is None or value > self.best.reward):
                self.best = candidate
        info = self.controller.tell(rollouts, rewards) if learn else ControllerInfo()
        finite = rewards[np.isfinite(rewards)]
        kl = None if rollouts.kl is None else float(rollouts.kl[rows].mean())
        stats = IterationStats(
            iteration=iteration,
            n=len(rows),
            best=float(finite.max()) if len(finite) else float("nan"),
            mean=float(finite.mean()) if len(finite) else float("nan"),
            std=float(finite.std()) if len(finite) else float("nan"),
            best_so_far=self.best.reward if self.best else float("nan"),
            n_tokens=rollouts.n_tokens,
            decode_seconds=rollouts.decode_seconds,
            reward_seconds=scored - began,
            update_seconds=self.clock() - scored,
            ess=info.ess,
            control_norm=info.control_norm,
            lambda_=info.lambda_,
            kl=kl,
            n_nonfinite=len(rewards) - len(finite),
        )
        self.stats.append(stats)
        self.report(iteration, 0, 0, 0, stats)

    def report(
        self,
        iteration: int,
        step: int,
        rows: int,
        tokens: int,
        stats: IterationStats | None = None,
    ) -> None:
        if self.on_progress is not None:
            self.on_progress(
                Progress(
                    iteration=iteration,
                    iterations=self.iterations,
                    rollouts_done=len(self.candidates),
                    budget=self.budget,
                    step=step,
                    rows_active=rows,
                    n_tokens=self.n_tokens + tokens,
                    seconds=self.clock() - self.start,
                    best=self.best,
                    stats=stats,
                )
            )

    def result(self, status: str, *, method: str, budget: int, seed: int) -> Result:
        if self.best is None:
            raise ScoreError(f"the reward {self.reward.name!r} gave no finite score in {len(self.candidates)} rollouts")
        # Finite first, best first, earlier first on ties.
        ranked = sorted(
            self.candidates,
            key=lambda c: -c.reward if np.isfinite(c.reward) else float("inf"),
        )
        return Result(
            answer=self.best.text,
            reward=self.best.reward,
            method=method,
            budget=budget,
            seed=seed,
            candidates=tuple(ranked),
            iterations=tuple(self.stats),
            status=status,
            seconds=self.clock() - self.start,
            n_tokens=self.n_tokens,
        )
