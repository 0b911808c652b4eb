"""What a function reports, as an iterator: it runs in a thread of its own and is told when nobody listens any more."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from typing import TypeVar

E = TypeVar("E")

Work = Callable[[Callable[[E], None], Callable[[], bool]], None]
"""``work(put, closed)``: gives its reports to ``put``, and ends soon once ``closed()`` is true."""

_Report = tuple[E] | BaseException | None
"""A report, what the function raised, or its end."""


def events(work: Work[E]) -> Generator[E, None, None]:
    """The reports of ``work`` as they come; it begins with the first ``next``. What it raises is raised here.

    Closing the iterator, and whatever else ends it, waits for the end of ``work``.
    """
    reports: queue.SimpleQueue[_Report[E]] = queue.SimpleQueue()
    closed = threading.Event()
    thread = _start(work, reports.put, closed)
    try:
        while (report := reports.get()) is not None:
            if isinstance(report, BaseException):
                raise report
            yield report[0]
    finally:
        closed.set()
        thread.join()


async def aevents(work: Work[E]) -> AsyncGenerator[E, None]:
    """``events`` for ``async for``. Closing it, and cancelling the task that waits, does not wait for ``work``."""
    loop, reports = asyncio.get_running_loop(), asyncio.Queue[_Report[E]]()
    closed = threading.Event()

    def put(report: _Report[E]) -> None:
        try:
            loop.call_soon_threadsafe(reports.put_nowait, report)
        except RuntimeError:  # the loop is over
            closed.set()

    _start(work, put, closed)
    try:
        while (report := await reports.get()) is not None:
            if isinstance(report, BaseException):
                raise report
            yield report[0]
    finally:
        closed.set()


def _start(work: Work[E], put: Callable[[_Report[E]], None], closed: threading.Event) -> threading.Thread:
    def run() -> None:
        try:
            work(lambda event: put((event,)), closed.is_set)
        except BaseException as error:
            put(error)
        else:
            put(None)

    # With the caller's context, by which an engine knows a call from within its own run.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(run,), name="aisp-local-events", daemon=True)
    thread.start()
    return thread
