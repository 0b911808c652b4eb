"""Requests wait here for one of the threads that search, the oldest first. The engine decodes for all of them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from aisp_local.api import Aligner
from aisp_local.defaults import DEFAULT_MAX_TOKENS, DEFAULT_TOGETHER, STREAMED
from aisp_local.engine.base import check_room
from aisp_local.errors import CapacityError, InputError
from aisp_local.server.request import ApiError, Ask
from aisp_local.types import Progress, Result

_LONGEST_WAIT = 60  # seconds that a client is told to wait
LOGPROBS = "logprobs"
"""The key of ``Result.extra`` that holds those of its distinct answers, if they were asked for."""

_TELL = 0.3  # seconds between two reports of an iteration that runs


class _Gone(Exception):
    """The client is: nobody wants even the best so far, which might have to be scored first."""


def _closed() -> ApiError:
    return ApiError(503, "the server is shutting down", kind="server_error", retry_after=5)


def _stopped() -> ApiError:
    return ApiError(409, "the search was stopped before it had an answer", code="cancelled")


Event = tuple[str, Any]
"""``settled`` (text), ``progress`` and ``iteration`` (figures), then ``done`` (Result) or ``failed`` (an exception)."""


@dataclass(eq=False)
class Job:
    """A request. ``room``: tokens that there are for its answer; ``put``: gives its client an event, from any thread.
    ``gone``: the client is; ``stopped``: it wants the best so far."""

    ask: Ask
    room: int
    put: Callable[[Event], None]
    gone: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)


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
        self._most = waiting
        self._changed = threading.Condition()  # guards these figures and the queue
        self._queue: deque[Job] = deque()
        self._closing = threading.Event()
        self._lately = 0.5  # seconds that a search takes: a guess, until some have ended
        self._threads = [
            threading.Thread(target=self._work, name="aisp-local-desk", daemon=True) for _ in range(parallel)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def _count(self, **more: float) -> None:
        with self._changed:
            for name, value in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + value)

    def room(self, ask: Ask) -> int:
        """Tokens that an answer may have. Raises ApiError for a prompt that leaves none, or that cannot be read."""
        try:
            return check_room(self.aligner.engine, ask.prompt)
        except InputError as error:
            raise as_error(error) from error

    def submit(self, job: Job) -> None:
        """Raises ApiError, 503 while closing and 429 where the queue is full."""
        self._count(requests=1)
        with self._changed:
            if self._closing.is_set():
                self.counts.refused += 1
                raise _closed()
            if len(self._queue) >= self._most + len(self._threads) - self.busy:
                self.counts.refused += 1
                turns = (self._most + 1) / len(self._threads)
                wait = min(_LONGEST_WAIT, max(1, round(self._lately * turns)))
                raise ApiError(
                    429,
                    f"{len(self._queue)} requests wait already; try again in about {wait} s",
                    kind="rate_limit_error",
                    code="rate_limit_exceeded",
                    retry_after=wait,
                )
            self._queue.append(job)
            self._changed.notify()

    def cancel(self, job: Job, *, gone: bool = False) -> None:
        """End its search with the best so far, which nobody wants if the client is ``gone``.

        One that waits has none, and gives its place in the queue away. Nothing happens to one that is over.
        """
        (job.gone if gone else job.stopped).set()
        with self._changed:
            if job not in self._queue:
                return
            self._queue.remove(job)
            self.counts.cancelled += 1
        job.put(("failed", _Gone() if gone else _stopped()))

    def end(self) -> None:
        """The searches that run give their best so far; those that wait are refused, and all that come."""
        with self._changed:
            self._closing.set()
            refused, self._queue = self._queue, deque()
            self._changed.notify_all()
        for job in refused:
            job.put(("failed", _closed()))

    def close(self) -> None:
        """``end``, and wait until all are told."""
        self.end()
        for thread in self._threads:
            thread.join()

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing.is_set())
            if not self._queue:
                return None
            self.busy += 1
            return self._queue.popleft()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            self._serve(job)

    def _serve(self, job: Job) -> None:
        began = time.perf_counter()
        try:
            result = self._search(job)
        except _Gone as error:
            self._count(cancelled=1)
            job.put(("failed", error))
        except KeyboardInterrupt:  # stopped before there was an answer
            self._count(cancelled=1)
            job.put(("failed", _closed() if self._closing.is_set() else _stopped()))
        except Exception as error:
            self._count(failed=1)
            job.put(("failed", error))
        else:
            self._count(answered=1, rollouts=result.rollouts, tokens=result.n_tokens)
            job.put(("done", result))
        finally:
            seconds = time.perf_counter() - began
            with self._changed:
                self.busy -= 1
                self.counts.seconds += seconds
                self._lately = 0.8 * self._lately + 0.2 * seconds

    def _search(self, job: Job) -> Result:
        ask = job.ask
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
            if job.gone.is_set():
                raise _Gone
            return job.stopped.is_set() or self._closing.is_set()

        result = self.aligner.generate(
            ask.prompt,
            method=ask.method,
            budget=ask.budget,
            n=ask.budget if ask.settles else ask.rows,
            max_tokens=min(ask.max_tokens or self.max_tokens, job.room),
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
        found = [self.aligner.token_logprobs(ask.prompt, one, ask.logprobs) for one in result.distinct(ask.n)]
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


def as_error(error: BaseException) -> ApiError:
    """What a client is told: what it asked for is its own fault, the rest is ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CapacityError):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    return ApiError(500, f"the search failed: {error}", kind="server_error")
