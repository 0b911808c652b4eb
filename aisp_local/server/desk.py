"""Requests wait here for one of the threads that search, the oldest first. The engine decodes for all of them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from aisp_local.api import DEFAULT_MAX_TOKENS, DEFAULT_TOGETHER, STREAMED, Aligner
from aisp_local.errors import CapacityError, InputError
from aisp_local.server.request import ApiError, Ask
from aisp_local.types import Candidate, Progress, Result

_LONGEST_WAIT = 60  # seconds that a client is told to wait
LOGPROBS = "logprobs"
"""The key of ``Result.extra`` that holds those of its distinct answers, if they were asked for."""

_TELL = 0.3  # seconds between two reports of an iteration that runs


class _Gone(Exception):
    """The client is: nobody wants even the best so far, which might have to be scored first."""


Event = tuple[str, Any]
"""``settled`` (text), ``progress`` and ``iteration`` (figures), then ``done`` (Result) or ``failed`` (an exception)."""


@dataclass(eq=False)
class Job:
    """A request in the queue. ``put``: gives its client an event, from any thread."""

    ask: Ask
    put: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass
class Counts:
    """Since the start, for /metrics."""

    requests: int = 0
    refused: int = 0
    cancelled: int = 0
    failed: int = 0
    answered: int = 0
    rollouts: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Desk:
    """``parallel`` threads that search, and at most ``waiting`` requests before them."""

    def __init__(
        self, aligner: Aligner, *, waiting: int, parallel: int = DEFAULT_TOGETHER, max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> None:
        self.aligner, self.max_tokens = aligner, max_tokens
        self.counts = Counts()
        self.busy = 0  # threads that search
        self._lock = threading.Lock()  # of these figures
        self._queue: queue.Queue[Job | None] = queue.Queue(waiting)
        self._closing = threading.Event()
        self._lately = 0.5  # seconds that a search takes: a guess, until some have ended
        self._threads = [
            threading.Thread(target=self._work, name="aisp-local-desk", daemon=True) for _ in range(parallel)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def _count(self, **more: float) -> None:
        with self._lock:
            for name, value in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + value)

    def submit(self, job: Job) -> None:
        """Raises ApiError, 503 while closing and 429 where the queue is full."""
        self._count(requests=1)
        if self._closing.is_set():
            self._count(refused=1)
            raise ApiError(503, "the server is shutting down", kind="server_error", retry_after=5)
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            self._count(refused=1)
            turns = (self._queue.maxsize + 1) / len(self._threads)
            wait = min(_LONGEST_WAIT, max(1, round(self._lately * turns)))
            raise ApiError(
                429,
                f"{self._queue.maxsize} requests wait already; try again in about {wait} s",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after=wait,
            ) from None

    def close(self) -> None:
        """The searches that run give their best so far; those that wait are refused. Returns when all are told."""
        self._closing.set()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._closing.is_set():
                job.put(("failed", ApiError(503, "the server is shutting down", kind="server_error", retry_after=5)))
            elif job.cancelled.is_set():
                self._count(cancelled=1)
                job.put(("failed", ApiError(499, "the client went away")))
            else:
                self._serve(job)

    def _serve(self, job: Job) -> None:
        with self._lock:
            self.busy += 1
        began = time.perf_counter()
        try:
            result = self._search(job)
        except _Gone as error:
            self._count(cancelled=1)
            job.put(("failed", error))
        except KeyboardInterrupt:  # stopped before there was an answer
            self._count(cancelled=1)
            job.put(("failed", ApiError(503, "the search was stopped before it had an answer", kind="server_error")))
        except Exception as error:
            self._count(failed=1)
            job.put(("failed", error))
        else:
            self._count(answered=1, rollouts=result.rollouts, tokens=result.n_tokens)
            job.put(("done", result))
        finally:
            seconds = time.perf_counter() - began
            with self._lock:
                self.busy -= 1
                self.counts.seconds += seconds
                self._lately = 0.8 * self._lately + 0.2 * seconds

    def _search(self, job: Job) -> Result:
        ask, engine = job.ask, self.aligner.engine
        room = engine.room(ask.prompt)
        if room < 1:
            raise CapacityError(
                f"the prompt has {engine.n_ctx - room} tokens and the model's context {engine.n_ctx}; shorten it"
            )
        options = dict(ask.options)
        if ask.settles:
            options |= STREAMED[ask.method]
        sent, told = 0, time.monotonic()

        def progress(now: Progress) -> None:
            nonlocal sent, told
            if ask.settles and len(now.settled) > sent:
                sent = len(now.settled)
                job.put(("settled", now.settled))
            if ask.events and now.stats is not None:
                job.put(("iteration", _figures(now, ask.candidates)))
            elif ask.events and time.monotonic() - told >= _TELL:
                told = time.monotonic()
                job.put(("progress", _underway(now)))

        def stop() -> bool:
            if job.cancelled.is_set():
                raise _Gone
            return self._closing.is_set()

        result = self.aligner.generate(
            ask.prompt,
            method=ask.method,
            budget=ask.budget,
            n=ask.budget if ask.settles else ask.rows,
            max_tokens=min(ask.max_tokens or self.max_tokens, room),
            seed=ask.seed,
            stop_strings=ask.stop,
            grammar=ask.grammar,
            time_limit=ask.time_limit,
            target_reward=ask.target_reward,
            patience=ask.patience,
            baseline=ask.baseline,
            judge_all=ask.judge_all,
            stop=stop,
            on_progress=progress,
            **options,
        )
        if ask.logprobs is None:
            return result
        found = [self.aligner.token_logprobs(ask.prompt, one, ask.logprobs) for one in distinct(result, ask.n)]
        return replace(result, extra={**result.extra, LOGPROBS: found})


def _underway(progress: Progress) -> dict[str, Any]:
    """Between two iterations' ends: how far it is, and the best of what is unfinished."""
    best = progress.unfinished
    return {
        "iteration": progress.iteration,
        "iterations": progress.iterations,
        "step": progress.step,
        "rows": progress.rows_active,
        "rollouts": progress.rollouts_done,
        "budget": progress.budget,
        "tokens": progress.n_tokens,
        "seconds": progress.seconds,
        "unfinished": None if best is None else {"text": best.text, "reward": best.reward},
    }


def _figures(progress: Progress, candidates: bool) -> dict[str, Any]:
    """An iteration that ended, for a client that watches."""
    stats, best = progress.stats, progress.best
    assert stats is not None
    figures: dict[str, Any] = {
        "iteration": stats.iteration,
        "iterations": progress.iterations,
        "rollouts": progress.rollouts_done,
        "budget": progress.budget,
        "best": stats.best,
        "mean": stats.mean,
        "best_so_far": stats.best_so_far,
        "ess": stats.ess,
        "kl": stats.kl,
        "note": stats.note,
        "seconds": progress.seconds,
        "text": None if best is None else best.text,
    }
    if candidates:
        figures["candidates"] = [{"row": c.row, "reward": c.reward, "text": c.text} for c in progress.candidates]
    return figures


def distinct(result: Result, n: int) -> list[Candidate]:
    """The answer and the best n - 1 others that say something else; fewer where there are no more."""
    found: dict[str, Candidate] = {}
    for candidate in result.candidates:
        found.setdefault(candidate.text, candidate)
        if len(found) == n:
            break
    return list(found.values())


def as_error(error: BaseException) -> ApiError:
    """What a client is told: what it asked for is its own fault, the rest is ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CapacityError):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    return ApiError(500, f"the search failed: {error}", kind="server_error")
