"""How a reward that waits for something else learns that nobody waits for it any more.

Code that starts a reward says ``with interruptible(Interruption(stop))``; a reward that may wait long asks
``interruption()`` now and then, and raises AbandonedError when it is true. Others need not know of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from aisp_local.errors import ScoreError

POLL = 0.1
"""Seconds between two questions."""

_GRACE = 0.5
"""Seconds that scores may still take once the search is to stop: a healthy server is about to answer."""


class AbandonedError(ScoreError):
    """Scores that nobody waits for any more."""


class Interruption:
    """True once ``set()`` was called, or ``stop()`` has been true for half a second."""

    def __init__(self, stop: Callable[[], bool] | None = None) -> None:
        self._event = threading.Event()
        self._stop = stop
        self._since: float | None = None

    def set(self) -> None:
        self._event.set()

    def __call__(self) -> bool:
        if self._event.is_set():
            return True
        if self._stop is None or not self._stop():
            return False
        now = time.monotonic()
        if self._since is None:
            self._since = now
        return now - self._since >= _GRACE


_current: ContextVar[Interruption | None] = ContextVar("aisp_local_interruption", default=None)


def interruption() -> Interruption:
    """That of the code which called, in its thread; one that is never true where there is none."""
    return _current.get() or Interruption()


@contextmanager
def interruptible(by: Interruption) -> Iterator[None]:
    token = _current.set(by)
    try:
        yield
    finally:
        _current.reset(token)
