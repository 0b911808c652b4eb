"""A search as an iterator, and as a coroutine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import pytest

from aisp_local import Aligner, InputError, Progress, Result, ScoreError
from aisp_local.background import events
from aisp_local.testing import FakeEngine, FakeReward

OPTIONS: dict[str, Any] = {"budget": 12, "n": 4, "max_tokens": 12, "seed": 2}


def vowels(prompt: Any, responses: Sequence[str]) -> list[float]:
    return [float(sum(c in "aeiou" for c in r)) for r in responses]


@pytest.fixture
def aligner() -> Aligner:
    return Aligner(FakeEngine(), FakeReward(vowels))


def quiet(count: int) -> None:
    """Wait until no thread of a search is left."""
    deadline = time.monotonic() + 10
    while threading.active_count() > count:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


def test_progress_comes_and_then_the_result(aligner: Aligner) -> None:
    heard: list[Progress] = []
    *progress, result = aligner.stream("a", on_progress=heard.append, **OPTIONS)
    assert isinstance(result, Result)
    assert progress == heard and len(progress) > 3
    assert [p.stats.iteration for p in progress if isinstance(p, Progress) and p.stats] == [1, 2, 3]
    assert result.answer == aligner.generate("a", **OPTIONS).answer


def test_a_closed_iterator_stops_its_search(aligner: Aligner) -> None:
    threads, told = threading.active_count(), 0

    def count(_: Progress) -> None:
        nonlocal told
        told += 1

    stream = aligner.stream("a", on_progress=count, **OPTIONS | {"budget": 10**6})
    assert threading.active_count() == threads, "it begins with the first next"
    next(stream)
    stream.close()
    assert threading.active_count() == threads, "close waits for the search"
    seen = told
    time.sleep(0.05)
    assert told == seen


def test_what_a_search_raises_is_raised_where_it_is_listened_to(aligner: Aligner) -> None:
    with pytest.raises(InputError, match="method 'nothing' is unknown"):
        next(aligner.stream("a", method="nothing"))
    broken = Aligner(FakeEngine(), FakeReward(lambda prompt, responses: 1 / 0, "broken"))
    with pytest.raises(ScoreError, match="the reward 'broken' failed"):
        list(broken.stream("a", **OPTIONS))
    with pytest.raises(ScoreError, match="the reward 'broken' failed"):
        asyncio.run(broken.agenerate("a", **OPTIONS))


def test_a_stop_of_the_callers_own_gives_the_best_so_far(aligner: Aligner) -> None:
    seen: list[Progress] = []
    result = asyncio.run(
        aligner.agenerate("a", stop=lambda: len(seen) > 40, on_progress=seen.append, **OPTIONS | {"budget": 10**6})
    )
    assert result.status == "interrupted" and result.rollouts >= 4


def test_coroutines_give_what_generate_gives(aligner: Aligner) -> None:
    async def several() -> list[Result]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.005)

        ticking = asyncio.create_task(tick())
        found = await asyncio.gather(*(aligner.agenerate("a", **OPTIONS | {"seed": seed}) for seed in range(3)))
        ticking.cancel()
        assert ticks > 1, "the loop goes on meanwhile"
        return found

    found = asyncio.run(several())
    assert [r.answer for r in found] == [aligner.generate("a", **OPTIONS | {"seed": s}).answer for s in range(3)]


def test_a_cancelled_task_stops_its_search(aligner: Aligner) -> None:
    threads, seen = threading.active_count(), list[Progress]()

    async def cancelled() -> None:
        task = asyncio.create_task(aligner.agenerate("a", on_progress=seen.append, **OPTIONS | {"budget": 10**6}))
        while not seen:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    quiet(threads)


def test_an_async_loop_that_is_left_stops_its_search(aligner: Aligner) -> None:
    threads = threading.active_count()

    async def left() -> None:
        async with aclosing(aligner.astream("a", **OPTIONS | {"budget": 10**6})) as reports:
            async for report in reports:
                assert isinstance(report, Progress)
                break
        whole = [report async for report in aligner.astream("a", **OPTIONS)]
        assert isinstance(whole[-1], Result) and all(isinstance(report, Progress) for report in whole[:-1])

    asyncio.run(left())
    quiet(threads)


def test_the_thread_of_an_iterator_has_its_callers_context() -> None:
    """By it an engine tells that it is called from within its own run."""
    seen: ContextVar[int] = ContextVar("seen", default=0)
    seen.set(3)
    assert list(events(lambda put, closed: put(seen.get()))) == [3]
