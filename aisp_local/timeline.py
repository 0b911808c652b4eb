"""Where the time of a run goes: spans that Chrome (chrome://tracing) and Perfetto draw."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aisp_local.files import write_output


@dataclass(frozen=True)
class _Span:
    """Work of a name in a thread; times in nanoseconds since the start."""

    name: str
    thread: threading.Thread
    begin: int
    end: int


_NOTHING = nullcontext()
_recording: ContextVar[Timeline | None] = ContextVar("_recording", default=None)
"""Of the call that this code runs for, in this thread or, with its context, in another."""


@contextmanager
def recording(timeline: Timeline) -> Iterator[None]:
    """What runs in the block, and for it, is recorded there; other threads are left alone."""
    token = _recording.set(timeline)
    try:
        yield
    finally:
        _recording.reset(token)


def recorded(default: Timeline) -> Timeline:
    """The timeline of the block of ``recording`` that runs this, else the default."""
    return _recording.get() or default


class Timeline:
    """Spans of named work, by thread. One that is not ``enabled`` costs next to nothing and keeps nothing."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._start = time.perf_counter_ns()
        self._spans: list[_Span] = []

    def span(self, name: str) -> AbstractContextManager[None]:
        """Work of that name, as long as the block runs."""
        return self._record(name) if self.enabled else _NOTHING

    @contextmanager
    def _record(self, name: str) -> Iterator[None]:
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            end = time.perf_counter_ns()
            self._spans.append(_Span(name, threading.current_thread(), begin - self._start, end - self._start))

    def seconds(self) -> dict[str, float]:
        """Seconds in all, by name."""
        totals: dict[str, float] = {}
        for span in self._spans:
            totals[span.name] = totals.get(span.name, 0.0) + (span.end - span.begin) / 1e9
        return totals

    def overlap(self, name: str, other: str) -> float:
        """Seconds of the work ``name`` during which some of the work ``other`` ran, in another thread."""
        return sum(
            max(0, min(a.end, b.end) - max(a.begin, b.begin)) / 1e9
            for a in self._spans
            if a.name == name
            for b in self._spans
            if b.name == other and b.thread is not a.thread
        )

    def events(self) -> list[dict[str, Any]]:
        """In the trace event format: the names of process and threads, then complete events, times in microseconds."""
        spans = sorted(self._spans, key=lambda span: (span.begin, -span.end))
        threads = {thread: i for i, thread in enumerate(dict.fromkeys(span.thread for span in spans))}
        named: list[tuple[str, int, str]] = [("process_name", 0, "aisp-local")]
        named += [("thread_name", i, thread.name) for thread, i in threads.items()]
        return [
            *({"name": kind, "ph": "M", "pid": 0, "tid": i, "args": {"name": name}} for kind, i, name in named),
            *(
                {
                    "name": span.name,
                    "ph": "X",
                    "pid": 0,
                    "tid": threads[span.thread],
                    "ts": span.begin / 1000,
                    "dur": (span.end - span.begin) / 1000,
                }
                for span in spans
            ),
        ]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the events, whole or not at all. Raises InputError when the file cannot be written."""
        write_output(Path(path), json.dumps({"traceEvents": self.events(), "displayTimeUnit": "ms"}))


OFF = Timeline(enabled=False)
