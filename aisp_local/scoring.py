"""Rewards of rollouts that ended, computed while others still decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from types import TracebackType

import numpy as np
import numpy.typing as npt

from aisp_local.rewards.base import Reward, call_parts, call_prefixes
from aisp_local.rewards.interruption import POLL, AbandonedError, Interruption, interruptible
from aisp_local.timeline import Timeline
from aisp_local.types import Prompt

_BATCH = 8
"""Responses scored together while others decode. Which ones, no clock decides: a score's last bits may depend on it."""


Scored = tuple[npt.NDArray[np.float64], Mapping[str, npt.NDArray[np.float64]], float]
"""Rewards [n], those [n] of the reward's parts by their names, and the seconds that they took."""


class Worker:
    """Scores in a thread of its own where the reward may be called from one, else when the rewards are asked for.

    Once ``stop()`` is true, a reward that waits for something else is soon told to give up.
    """

    def __init__(
        self, pool: ThreadPoolExecutor | None, timeline: Timeline, stop: Callable[[], bool] | None = None
    ) -> None:
        self._pool, self._timeline = pool, timeline
        self._over = Interruption(stop)
        # ``stop`` may be anybody's code: it is asked in the thread of the search alone.
        self._told = self._over if pool is None else Interruption()

    @classmethod
    def of(cls, reward: Reward, timeline: Timeline, stop: Callable[[], bool] | None = None) -> Worker:
        """A worker for this reward. One thread: what scores is asked one thing at a time."""
        background = bool(getattr(reward, "background", False))
        return cls(ThreadPoolExecutor(1, "aisp-local-reward") if background else None, timeline, stop)

    @property
    def background(self) -> bool:
        return self._pool is not None

    def score(self, reward: Reward, prompt: Prompt, responses: list[str], finished: bool) -> Future[Scored]:
        if self._pool is not None:
            # With its context: an engine must know when its own run waits for the call.
            return self._pool.submit(copy_context().run, self._score, reward, prompt, responses, finished)
        done: Future[Scored] = Future()
        try:
            done.set_result(self._score(reward, prompt, responses, finished))
        except AbandonedError as error:
            done.set_exception(error)
        return done

    def ready(self, futures: Sequence[Future[Scored]]) -> bool:
        """Whether ``result`` would wait for none of them."""
        if self._over():
            self._told.set()
        return all(future.done() for future in futures)

    def result(self, future: Future[Scored]) -> Scored | None:
        """What a call of ``score`` gave, once it is there; None if the reward gave up."""
        while not wait([future], timeout=POLL).done:
            if self._over():
                self._told.set()
        try:
            return future.result()
        except AbandonedError:
            return None

    def _score(self, reward: Reward, prompt: Prompt, responses: list[str], finished: bool) -> Scored:
        began = time.perf_counter()
        with self._timeline.span("score"), interruptible(self._told):
            if finished:
                rewards, parts = call_parts(reward, prompt, responses)
            else:
                rewards, parts = call_prefixes(reward, prompt, responses), {}
        return rewards, parts, time.perf_counter() - began

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._told.set()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


class Scorer:
    """The rewards of one search, iteration by iteration."""

    def __init__(self, reward: Reward, prompt: Prompt, worker: Worker) -> None:
        self._reward, self._prompt, self._worker = reward, prompt, worker
        self.begin(0)

    @property
    def name(self) -> str:
        return self._reward.name

    def begin(self, n: int) -> None:
        """A new iteration of n rollouts."""
        self.seconds = 0.0  # of scoring, of what ``rewards`` gave
        self.n_scored = 0  # texts
        self._pending: dict[bool, dict[int, str]] = {True: {}, False: {}}  # finished or not
        self._futures: list[tuple[list[int], Future[Scored]]] = []
        self._parts: dict[int, dict[str, float]] = {}

    def add(self, row: int, text: str, *, finished: bool = True) -> None:
        """A rollout ended, or paused."""
        pending = self._pending[finished]
        pending[row] = text
        if self._worker.background and len(pending) >= _BATCH:
            self._submit(finished)

    def flush(self) -> None:
        """No more will end: score what there is."""
        if self._worker.background:
            self._submit(True)
            self._submit(False)

    def _submit(self, finished: bool) -> None:
        pending = self._pending[finished]
        if not pending:
            return
        self._pending[finished] = {}
        rows = sorted(pending)
        self.n_scored += len(rows)
        texts = [pending[row] for row in rows]
        self._futures.append((rows, self._worker.score(self._reward, self._prompt, texts, finished)))

    def ready(self) -> bool:
        """Whether all that was to be scored while others decode has been."""
        return self._worker.ready([future for _, future in self._futures])

    def rewards(self, rows: Sequence[int]) -> tuple[list[int], npt.NDArray[np.float64]]:
        """Those of these rollouts, all of which were added, that have a reward, and their rewards [n].

        All have one unless the search was stopped and the reward gave up.
        """
        self._submit(True)
        self._submit(False)
        found: dict[int, float] = {}
        for scored, future in self._futures:
            result = self._worker.result(future)
            if result is None:
                continue
            values, parts, seconds = result
            self.seconds += seconds
            found.update(zip(scored, values.tolist(), strict=True))
            for i, row in enumerate(scored):
                self._parts[row] = {name: float(of[i]) for name, of in parts.items()}
        kept = [row for row in rows if row in found]
        return kept, np.array([found[row] for row in kept], np.float64)

    def parts(self, row: int) -> Mapping[str, float]:
        """What the parts of the reward gave a finished rollout whose reward ``rewards`` gave; nothing without parts."""
        return self._parts[row]
