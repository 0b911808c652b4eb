"""Ctrl-C that waits for the end of what it must not break."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_around: InterruptsBetween | None = None  # the main thread's


class Uninterrupted:
    """Within the block Ctrl-C waits for its end.

    llama.cpp calls back into Python (its log, controls by callback), and there Python would print the interrupt and
    forget it; and one that struck before the result of a call is assigned would leak it.
    """

    def __init__(self) -> None:
        self._previous: Any = None
        self._inside: InterruptsBetween | None = None
        self._noted: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> None:
        if not _in_main_thread():  # no other one is interrupted
            return
        if _around is not None:
            _around.blocks += 1
            self._inside = _around
            return
        self._previous = signal.getsignal(signal.SIGINT)
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.append((number, frame))

    def __exit__(self, *_: object) -> None:
        if self._inside is not None:
            self._inside.blocks -= 1
            self._inside.deliver()
            return
        if self._previous is None:
            return
        signal.signal(signal.SIGINT, self._previous)
        for number, frame in self._noted:
            if callable(self._previous):
                self._previous(number, frame)
            else:
                signal.raise_signal(number)


class InterruptsBetween:
    """Around many blocks of ``Uninterrupted``: one handler for them all, which lets Ctrl-C through between them.

    To set a handler and put it back costs 30 microseconds where all else has left the processor's caches: a
    hundredth of a decode step of a small model.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self._previous: Any = None
        self._noted: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> None:
        global _around
        if _around is not None or not _in_main_thread():
            return
        previous = signal.getsignal(signal.SIGINT)
        if callable(previous):  # the system's own needs no Python
            self._previous = previous
            signal.signal(signal.SIGINT, self._handle)
            _around = self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.blocks:
            self._noted.append((number, frame))
        else:
            self._previous(number, frame)

    def deliver(self) -> None:
        """What was noted, if the last block is over."""
        if self.blocks or not self._noted:
            return
        noted, self._noted = self._noted, []
        for number, frame in noted:
            self._previous(number, frame)

    def __exit__(self, *_: object) -> None:
        global _around
        if _around is not self:
            return
        _around = None
        if signal.getsignal(signal.SIGINT) == self._handle:  # else somebody set another one meanwhile
            signal.signal(signal.SIGINT, self._previous)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
