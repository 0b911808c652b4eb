"""The driver: budget, time limit, best so far, statistics, interrupts. It knows no algorithm."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from aisp_local.controllers.base import Chooses, Controller, Prepares, Steers
from aisp_local.engine.base import Engine, Job, check_room
from aisp_local.errors import CapacityError, InputError, ScoreError
from aisp_local.grammar import Grammar
from aisp_local.rewards.base import Reward
from aisp_local.scoring import Scorer, Worker
from aisp_local.seeds import RowSeeds
from aisp_local.timeline import OFF, Timeline, recorded
from aisp_local.types import (
    Candidate,
    ControllerInfo,
    FloatArray,
    IterationStats,
    Limits,
    LogitsProcessor,
    Progress,
    Prompt,
    Result,
    Rollouts,
    Step,
    Want,
)

Tokens = npt.NDArray[np.int32]

NO_LIMITS = Limits()
_PATIENCE = 4
"""Decode steps that other searches go on for before one of them waits for its rewards; see ``_Searches.next``."""


@dataclass(frozen=True)
class Task:
    """A prompt to search an answer for, with a controller of its own. ``index`` names its random numbers.

    ``reward``: what this one is scored with, if not with the reward of all: the same, calibrated on this prompt.
    """

    prompt: Prompt
    controller: Controller
    index: int = 0
    reward: Reward | None = None


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
    grammar: Grammar | None = None,
    time_limit: float | None = None,
    limits: Limits = NO_LIMITS,
    stop: Callable[[], bool] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    want: frozenset[Want] = frozenset(),
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Spend ``budget`` rollouts in iterations of ``n`` (the last one smaller); return the best ever seen.

    ``stop()`` true or ``time_limit`` seconds end the search with the best so far: rows that finished count; rows that
    were cut short are scored only if no row of the whole search has finished. After ``stop()`` a reward that waits for
    a server gets half a second more; then the rows that it has not scored do not count. KeyboardInterrupt ends the
    search at once, with the best of the iterations before. ``limits`` are looked at between iterations.
    Raises ScoreError when no reward is finite or the reward is broken; when the search ends before its first
    token, KeyboardInterrupt, or InputError for the time limit.
    """
    (result,) = search_many(
        engine,
        [Task(prompt, controller, prompt_index)],
        reward,
        method=method,
        budget=budget,
        n=n,
        max_tokens=max_tokens,
        seed=seed,
        stop_strings=stop_strings,
        grammar=grammar,
        time_limit=time_limit,
        limits=limits,
        stop=stop,
        on_progress=None if on_progress is None else lambda _, progress: on_progress(progress),
        want=want,
        clock=clock,
    )
    if isinstance(result, BaseException):
        raise result
    return result


def search_many(
    engine: Engine,
    tasks: Sequence[Task],
    reward: Reward,
    *,
    method: str,
    budget: int,
    n: int,
    max_tokens: int,
    seed: int,
    at_once: int | None = None,
    stop_strings: Sequence[str] = (),
    grammar: Grammar | None = None,
    time_limit: float | None = None,
    limits: Limits = NO_LIMITS,
    stop: Callable[[], bool] | None = None,
    on_progress: Callable[[int, Progress], None] | None = None,
    want: frozenset[Want] = frozenset(),
    clock: Callable[[], float] = time.perf_counter,
) -> list[Result | BaseException]:
    """``search`` for many prompts in one batch of rows, each with ``budget`` rollouts in iterations of ``n``.

    ``at_once`` searches share the rows (default: all); those that waited longest go first, so that none gets two turns
    while another waits for one. What a search draws depends on its own seeds alone. ``time_limit`` and ``stop`` are for
    all of them together; ``on_progress(i, progress)`` is of the i-th. Gives for each its result, or the error with
    which ``search`` would have ended: a prompt that does not fit, or on which its reward, its controller or
    ``on_progress`` raises, leaves the others alone.
    """
    if budget < 1 or n < 1:
        raise InputError(f"budget {budget} and n {n} must both be at least 1")
    if time_limit is not None and not time_limit > 0:
        raise InputError(f"the time limit is {time_limit} seconds; it must be greater than 0")
    if not tasks:
        return []
    refused = [_refusal(engine, task.prompt) for task in tasks]
    usable = [task for task, error in zip(tasks, refused, strict=True) if error is None]
    together = max(1, min(at_once or len(usable), len(usable)))
    start = clock()
    timeline = recorded(getattr(engine, "timeline", OFF))
    # Where decoding leaves the processor alone, noise is drawn meanwhile; else that would only slow it.
    beside = ThreadPoolExecutor(1, "aisp-local-noise") if getattr(engine, "offloaded", False) else nullcontext()
    with Worker.of(reward, timeline, stop) as worker, beside as pool:
        searches = [
            _Search(
                task,
                Scorer(task.reward or reward, task.prompt, worker),
                budget=budget,
                n=n,
                max_tokens=max_tokens,
                seed=seed,
                stop_strings=stop_strings,
                grammar=grammar,
                limits=limits,
                want=want,
                clock=clock,
                start=start,
                timeline=timeline,
                pool=pool,
                on_progress=None if on_progress is None else _numbered(on_progress, i),
            )
            for i, task in enumerate(tasks)
            if refused[i] is None
        ]
        feed = _Searches(searches, together, stop, None if time_limit is None else start + time_limit, clock)
        try:
            if usable:
                engine.run(
                    feed,
                    prompts=[task.prompt for task in usable],
                    n=min(n, budget) * together,
                    max_tokens=max_tokens,
                    at_once=together,
                )
            feed.close()
        except KeyboardInterrupt:
            if not any(one.found for one in searches):
                raise
            feed.why = "interrupted"
            for one in searches:
                one.broken = True
    outcomes = (one.outcome(feed.why, time_limit, method=method, budget=budget, seed=seed) for one in searches)
    return [next(outcomes) if error is None else error for error in refused]


def _refusal(engine: Engine, prompt: Prompt) -> InputError | None:
    """Why the engine would not run this prompt, which must not end the searches of others."""
    try:
        check_room(engine, prompt)
    except InputError as error:
        return error
    return None


def _numbered(on_progress: Callable[[int, Progress], None], i: int) -> Callable[[Progress], None]:
    return lambda progress: on_progress(i, progress)


class _Searches:
    """The feed: asks the searches for jobs and settles their iterations, in an order that no clock decides."""

    def __init__(
        self,
        searches: Sequence[_Search],
        together: int,
        stop: Callable[[], bool] | None,
        deadline: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._not_begun = list(searches)
        self._together = together
        self._running: list[_Search] = []
        self._waiting: list[tuple[int, _Search]] = []  # for rewards, since which step
        self._of: dict[int, _Search] = {}  # by the id of its job, which ``_Search.job`` keeps alive
        self._stop, self._deadline, self._clock = stop, deadline, clock
        self._step = 0
        self.why: str | None = None  # the run ends before its budget is spent

    def next(self, idle: bool) -> Job | None:
        """The next iteration of whoever has waited for rows longest: a search that has not begun waits from the start.

        While others decode, an iteration is settled only some steps after its last rollout, so that its rewards are
        there by then and no step waits for them.
        """
        while True:
            if self.why is None and self._not_begun and len(self._running) < self._together:
                search = self._not_begun.pop(0)
                if (job := self._ask(search)) is not None:
                    return job
                continue
            if not self._waiting or not (idle or self._step - self._waiting[0][0] >= _PATIENCE):
                return None
            search = self._waiting.pop(0)[1]
            search.settle()
            self._running.remove(search)
            if self.why is None and search.more:
                self.why = self._ended()
                if self.why is None and (job := self._ask(search)) is not None:
                    return job

    def _ask(self, search: _Search) -> Job | None:
        job = search.ask()
        if job is not None:
            self._of[id(job)] = search
            self._running.append(search)
        return job

    def _ended(self) -> str | None:
        if self._stop is not None and self._stop():
            return "interrupted"
        if self._deadline is not None and self._clock() >= self._deadline:
            return "time-limit"
        return None

    def close(self) -> None:
        """Settle what had no turn."""
        while self._waiting:
            self._waiting.pop(0)[1].settle()

    def ready(self) -> bool:
        if not self._waiting or (self._not_begun and len(self._running) < self._together):
            return True
        return self._waiting[0][1].scorer.ready()

    def stop(self) -> bool:
        self._step += bool(self._of)  # beside others it is asked while none of these decodes
        self.why = self.why or self._ended()
        # Beside others, a search that failed decodes its iteration to the end; with none left it ends here.
        failed = not self._not_begun and all(one.error is not None for one in self._running)
        return self.why is not None or failed

    def stepped(self, job: Job, step: int, rows: int, n_tokens: int) -> None:
        self._of[id(job)].report(step, rows, n_tokens)

    def ended(self, job: Job, row: int, text: str, paused: bool) -> None:
        search = self._of[id(job)]
        if search.error is None:
            search.scorer.add(row, text, finished=not paused)

    def finished(self, job: Job, rollouts: Rollouts) -> None:
        search = self._of.pop(id(job))
        search.decoded(rollouts)
        self._waiting.append((self._step, search))


class _Blocks:
    """What the blocks of one iteration gave so far: most iterations have one."""

    def __init__(self) -> None:
        self.rewards: list[float] = []  # of rollouts that finished
        self.kls: list[float] = []
        self.unfinished: list[Candidate] = []
        self.notes: list[str] = []
        self.n_tokens = self.n_scored = 0
        self.at = 0.0  # when the last block was settled
        self.decode_seconds = self.reward_seconds = self.update_seconds = 0.0
        self._tokens: list[bytes] = []  # of the unfinished
        self._origins: dict[bytes, tuple[int, float | None]] = {}  # of those that paused, by their tokens
        self._several = False
        self.position = 0  # tokens of the rollouts that go on
        self.settled = ""

    def go_on(
        self, prefixes: Sequence[Tokens], best: Candidate | None, last: bool, stop_strings: Sequence[str]
    ) -> None:
        """With these rollouts; ``best``: of those that have finished. Only in the last iteration something settles."""
        self.position = max(map(len, prefixes))
        if last:
            going = {prefix.tobytes() for prefix in prefixes}
            texts = [c.text for tokens, c in zip(self._tokens, self.unfinished, strict=True) if tokens in going]
            settled = os.path.commonprefix(texts + ([best.text] if best is not None else []))
            # What may be the beginning of a stop string may have to go.
            ends = [i for stop in stop_strings for i in range(1, len(stop)) if settled.endswith(stop[:i])]
            self.settled = settled[: len(settled) - max(ends, default=0)]

    def origins(self, job: Job, rollouts: Rollouts, rows: Sequence[int]) -> tuple[list[int], list[float | None]]:
        """For each of these rollouts how many tokens it has from earlier iterations, and its KL since."""
        prefixes, taken = job.controls.prefixes, list[int]()
        kls: list[float | None] = []
        paused: dict[bytes, tuple[int, float | None]] = {}
        for i in rows:
            tokens = rollouts.tokens[i]
            kl = None if rollouts.kl is None else float(rollouts.kl[i])
            prefix = tokens[:0] if prefixes is None else prefixes[i]
            given, before = self._origins.get(prefix.tobytes(), (min(len(prefix), len(tokens)), 0.0))
            if kl is not None and before is not None:
                kl += before
            taken.append(given)
            kls.append(kl)
            if rollouts.finish_reasons[i] == "paused":
                paused[tokens.tobytes()] = given, kl
            elif kl is not None:
                self.kls.append(kl)
        self._tokens = [rollouts.tokens[i].tobytes() for i in rows if rollouts.finish_reasons[i] == "paused"]
        self._several |= bool(paused)
        self._origins |= paused
        return taken, kls

    def number(self, i: int, paused: bool) -> int:
        """Of the i-th rollout of a job, from 1: of several blocks they are counted as they finish."""
        return len(self.rewards) + 1 if self._several and not paused else i + 1

    def count(
        self, rollouts: Rollouts, scorer: Scorer, now: float, update_seconds: float, info: ControllerInfo
    ) -> None:
        self.at = now
        self.n_scored += scorer.n_scored + info.n_scored
        self.n_tokens += rollouts.n_tokens
        self.decode_seconds += rollouts.decode_seconds
        self.reward_seconds += scorer.seconds + info.reward_seconds
        self.update_seconds += update_seconds
        if info.note is not None and info.note not in self.notes:
            self.notes.append(info.note)


def _counts(candidate: Candidate) -> bool:
    """Whether it is a text of the grammar, if there is one; else it is the answer only if there is no other."""
    return candidate.finish_reason != "incomplete"


def _order(candidate: Candidate) -> tuple[bool, float]:
    """The least is the best."""
    return not _counts(candidate), -candidate.reward if np.isfinite(candidate.reward) else float("inf")


class _Guarded:
    """A logits processor: what it raises ends its own search alone."""

    def __init__(self, processor: LogitsProcessor, fail: Callable[[Exception], None]) -> None:
        self._processor, self._fail, self._failed = processor, fail, False
        self.needs_prelogits = processor.needs_prelogits

    def __call__(self, step: Step) -> FloatArray:
        if not self._failed:
            try:
                return _lawful(self._processor(step), step)
            except Exception as error:
                self._failed = True
                self._fail(error)
        return step.logits


def _lawful(logits: FloatArray, step: Step) -> FloatArray:
    """Logits that a processor gave. Raises InputError for what no token can be sampled from."""
    if not isinstance(logits, np.ndarray) or logits.shape != step.logits.shape or logits.dtype.kind != "f":
        found = f"{logits.dtype} {logits.shape}" if isinstance(logits, np.ndarray) else type(logits).__name__
        raise InputError(f"a logits processor gave {found}; it must give floats of the shape {step.logits.shape}")
    if not np.isfinite(logits.max(axis=1)).all():
        raise InputError("a logits processor gave a row with NaN or infinity in it, or without any token to draw")
    return logits


class _Search:
    """One search: its controller, its budget and the best that it has seen."""

    def __init__(
        self,
        task: Task,
        scorer: Scorer,
        *,
        budget: int,
        n: int,
        max_tokens: int,
        seed: int,
        stop_strings: Sequence[str],
        grammar: Grammar | None,
        limits: Limits,
        want: frozenset[Want],
        clock: Callable[[], float],
        start: float,
        timeline: Timeline,
        pool: ThreadPoolExecutor | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.task, self.scorer = task, scorer
        self.budget, self.n, self.max_tokens, self.seed = budget, n, max_tokens, seed
        self.stop_strings, self.grammar, self.limits, self.want = stop_strings, grammar, limits, want
        self.iterations = -(-budget // n)
        self.iteration = 0  # the one that runs, from 1
        self.clock, self.start, self.timeline, self.on_progress = clock, start, timeline, on_progress
        self.pool = pool
        self.prepared: Future[None] | None = None
        self.seconds = 0.0  # when its last iteration was settled
        self.job: Job | None = None
        self.rollouts: Rollouts | None = None
        self.candidates: list[Candidate] = []
        self.stats: list[IterationStats] = []
        self.best: Candidate | None = None
        self.error: Exception | None = None  # that ended it: a controller, a reward and a callback may raise anything
        self.why: str | None = None  # it ended before its budget was spent, by itself
        self.idle = 0  # iterations without a better rollout
        self.asked = 0  # rollouts
        self.n_tokens = 0
        self.blocks = _Blocks()  # of the iteration that runs
        self.before: Candidate | None = None  # the best when it began
        self.paused = 0  # rollouts that wait to be gone on with
        self.steps = 0  # of decoding, and beginnings of iterations and blocks, each as one: what on_progress was told
        self.began_at = 0  # of them, when the iteration that runs had begun
        self.broken = False  # KeyboardInterrupt ended it within a step

    @property
    def more(self) -> bool:
        return (self.paused > 0 or self.asked < self.budget) and self.error is None and self.why is None

    @property
    def found(self) -> bool:
        """Is there an answer, if only an unfinished one?"""
        return self.best is not None or bool(self.blocks.unfinished)

    def ask(self) -> Job | None:
        """The job of the next iteration; None if that failed."""
        try:
            job = self._ask()
        except Exception as error:
            self.error = error
            return None
        return job if self.error is None else None

    def _ask(self) -> Job:
        size, self.paused = self.paused, 0
        if not size:
            self.iteration += 1
            self.blocks, self.before = _Blocks(), self.best
            size = self._size()
            self.asked += size
        with self.timeline.span("ask"):
            try:
                if self.prepared is not None:
                    self.prepared.result()
                controls = self.task.controller.ask(size)
            except MemoryError as error:
                raise CapacityError(
                    f"no memory for the controls of {size} rollouts ({error}); "
                    "use fewer rollouts an iteration, fewer tokens, or a method with a held control"
                ) from error
        if self.blocks.unfinished and controls.prefixes is not None:
            self.blocks.go_on(controls.prefixes, self.best, self.asked >= self.budget, self.stop_strings)
            if self.want & {"logprobs", "prelogits"}:
                self.blocks.position = 0  # each token is a step again
        if controls.processor is not None:
            controls = replace(controls, processor=_Guarded(controls.processor, self._fail))
        seeds = RowSeeds(self.seed, self.task.index, self.iteration)
        self.job = Job(self.task.prompt, controls, self.max_tokens, seeds, self.stop_strings, self.want, self.grammar)
        if self.pool is not None and self.more:
            self.prepared = self.pool.submit(self._prepare, self._size())
        self.scorer.begin(size)
        self.report(0, size, 0)
        return self.job

    def _fail(self, error: Exception) -> None:
        self.error = self.error or error

    def _size(self) -> int:
        """Rollouts of the next iteration."""
        size = min(self.n, self.budget - self.asked)
        if self.limits.tokens is None:
            return size
        mean = self.n_tokens / self.asked if self.n_tokens else self.max_tokens
        fitting = min(size, int((self.limits.tokens - self.n_tokens) / mean))
        if not self.asked:
            return max(fitting, 1)
        # Iterations of ever fewer rollouts, in the end of one, would teach and find nothing.
        return fitting if 4 * fitting >= size else 0

    def _limit(self, better: bool) -> str | None:
        """Which of its own limits ends the search, if one does."""
        self.idle = 0 if better else self.idle + 1
        target, patience = self.limits.target_reward, self.limits.patience
        if target is not None and self.best is not None and _counts(self.best) and self.best.reward >= target:
            return "target"
        if self.limits.tokens is not None and self._size() == 0:
            return "token-limit"
        return "patience" if patience is not None and self.idle >= patience else None

    def _prepare(self, size: int) -> None:
        if isinstance(self.task.controller, Prepares):
            with self.timeline.span("draw noise"):
                self.task.controller.prepare(size)

    def decoded(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts
        self.n_tokens += rollouts.n_tokens
        if self.error is None:
            self.scorer.flush()

    def settle(self) -> None:
        """Wait for the rewards, remember the best, and let the controller learn from a whole iteration."""
        if self.error is not None:
            return
        try:
            self._settle()
        except Exception as error:
            self.error = error

    def _settle(self) -> None:
        rollouts, self.rollouts = self.rollouts, None
        assert rollouts is not None
        rows = [i for i, reason in enumerate(rollouts.finish_reasons) if reason != "interrupted"]
        whole = len(rows) == len(rollouts)
        if not rows and not self.candidates:
            rows = [i for i, tokens in enumerate(rollouts.tokens) if len(tokens)]
            for i in rows:
                self.scorer.add(i, rollouts.texts[i])
        if not rows:
            return
        rows, rewards = self.scorer.rewards(rows)
        if not rows:
            return
        assert self.job is not None
        whole, blocks = whole and len(rows) == len(rollouts), self.blocks
        # What is no text of the grammar has no weight for a method.
        told = [np.nan if rollouts.finish_reasons[i] == "incomplete" else r for i, r in zip(rows, rewards, strict=True)]
        unfinished: list[Candidate] = []
        for given, kl, i, value in zip(*blocks.origins(self.job, rollouts, rows), rows, rewards, strict=True):
            paused = rollouts.finish_reasons[i] == "paused"
            candidate = Candidate(
                text=rollouts.texts[i],
                reward=float(value),
                iteration=self.iteration,
                row=blocks.number(i, paused),
                n_tokens=len(rollouts.tokens[i]),
                n_given=given,
                finish_reason="interrupted" if paused else rollouts.finish_reasons[i],
                kl=kl,
                logprob=None
                if rollouts.base_logprobs is None
                else float(rollouts.base_logprobs[i].sum(dtype=np.float64)),
                parts=self.scorer.parts(i),
                tokens=rollouts.tokens[i],
            )
            if paused:
                unfinished.append(candidate)
            else:
                self._add(candidate)
                blocks.rewards.append(float(value) if _counts(candidate) else np.nan)
        began = self.clock()
        with self.timeline.span("update"):
            info = self.task.controller.tell(rollouts, np.array(told)) if whole else ControllerInfo()
        now = self.clock()
        blocks.count(rollouts, self.scorer, now, now - began, info)
        blocks.unfinished = unfinished
        if whole and unfinished:
            self.paused = len(unfinished)
            return
        if whole and self.asked < self.budget:
            self.why = self._limit(self.best is not self.before)
        self._end_iteration(now, info)

    def _add(self, candidate: Candidate) -> None:
        self.candidates.append(candidate)
        if np.isfinite(candidate.reward) and (self.best is None or _order(candidate) < _order(self.best)):
            self.best = candidate

    def _end_iteration(self, now: float, info: ControllerInfo) -> None:
        blocks = self.blocks
        rewards = np.array(blocks.rewards)
        finite = rewards[np.isfinite(rewards)]
        stats = IterationStats(
            iteration=self.iteration,
            n=len(rewards),
            best=float(finite.max()) if len(finite) else float("nan"),
            mean=float(finite.mean()) if len(finite) else float("nan"),
            std=float(finite.std()) if len(finite) else float("nan"),
            best_so_far=self.best.reward if self.best else float("nan"),
            n_tokens=blocks.n_tokens,
            seconds=now - self.start - self.seconds,
            decode_seconds=blocks.decode_seconds,
            reward_seconds=blocks.reward_seconds,
            update_seconds=blocks.update_seconds,
            ess=info.ess,
            control_norm=info.control_norm,
            lambda_=info.lambda_,
            kl=info.kl if not blocks.kls else float(np.mean(blocks.kls)) + info.selection_kl,
            n_nonfinite=len(rewards) - len(finite),
            note="; ".join(blocks.notes) or None,
            n_scored=blocks.n_scored,
        )
        self.seconds = now - self.start
        self.stats.append(stats)
        self.report(0, 0, 0, stats)

    def report(self, step: int, rows: int, tokens: int, stats: IterationStats | None = None) -> None:
        if stats is None:
            self.steps += 1
            if not self.blocks.n_tokens and step == 0:
                self.began_at = self.steps
        if self.on_progress is None or self.error is not None:
            return
        progress = Progress(
            iteration=self.iteration,
            iterations=self.iterations,
            rollouts_done=len(self.candidates),
            budget=self.budget,
            step=self.blocks.position + step,
            rows_active=rows,
            n_tokens=self.n_tokens + tokens,
            seconds=self.clock() - self.start,
            best=self.best,
            stats=stats,
            candidates=() if stats is None else tuple(c for c in self.candidates if c.iteration == stats.iteration),
            unfinished=max(
                (c for c in self.blocks.unfinished if np.isfinite(c.reward)), key=lambda c: c.reward, default=None
            ),
            settled=self.blocks.settled,
        )
        try:
            self.on_progress(progress)
        except Exception as error:
            self.error = error

    def outcome(
        self, why: str | None, time_limit: float | None, *, method: str, budget: int, seed: int
    ) -> Result | BaseException:
        """The result, or the error that stands for it. ``why``: what ended the run, None if nothing did."""
        if self.error is not None:
            return self.error
        ended_at: int | None = self.steps
        if self.broken:  # what was decoded of its iteration is lost: a search that can but begin it is the same
            ended_at = None if self.blocks.n_tokens and self.iteration > len(self.stats) else self.began_at
        if not self.candidates:
            for candidate in self.blocks.unfinished:
                self._add(candidate)
                self.blocks.rewards.append(candidate.reward)
        if self.blocks.rewards and (not self.stats or self.stats[-1].iteration < self.iteration):
            self._end_iteration(self.blocks.at, ControllerInfo())  # cut short between two blocks or within one
        if not self.candidates:
            if why == "time-limit":
                return InputError(
                    f"the time limit of {time_limit} seconds passed before the first token; allow more time"
                )
            return KeyboardInterrupt()
        if self.best is None:
            name, n = self.scorer.name, len(self.candidates)
            return ScoreError(f"the reward {name!r} gave no finite score in {n} rollouts")
        answer = self.best
        if isinstance(self.task.controller, Chooses):
            usable = [c.reward if _counts(c) == _counts(answer) else np.nan for c in self.candidates]
            answer = self.candidates[self.task.controller.choose(np.array(usable))]
        # The answer, then whole ones first, finite first, best first, earlier first on ties.
        ranked = sorted(self.candidates, key=lambda c: (c is not answer, _order(c)))
        complete = sum(c.finish_reason != "interrupted" for c in self.candidates) == self.budget
        return Result(
            answer=answer.text,
            reward=answer.reward,
            method=method,
            budget=budget,
            seed=seed,
            candidates=tuple(ranked),
            iterations=tuple(self.stats),
            status=("complete" if _counts(answer) else "incomplete") if complete else self.why or why or "interrupted",
            ended_at=None if complete or self.why is not None else ended_at,
            seconds=self.seconds,
            n_tokens=self.n_tokens,
            control=self.task.controller.held if isinstance(self.task.controller, Steers) else None,
            control_nats=getattr(self.task.controller, "held_nats", None),
        )
