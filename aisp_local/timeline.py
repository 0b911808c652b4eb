"""Where the time of a run goes: spans that Chrome (chrome://tracing) and Perfetto draw."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Timeline:
    """Spans of named work, by thread. One that is not ``enabled`` costs next to nothing and keeps nothing."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._start = time.perf_counter()
        self._spans: list[tuple[str, int, float, float]] = []  # name, thread, begin and end in seconds

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Work of that name, as long as the block runs."""
        if not self.enabled:
            yield
            return
        begin = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self._spans.append((name, threading.get_ident(), begin - self._start, end - self._start))

    def seconds(self) -> dict[str, float]:
        """Seconds in all, by name."""
        totals: dict[str, float] = {}
        for name, _, begin, end in self._spans:
            totals[name] = totals.get(name, 0.0) + end - begin
        return totals

    def write(self, path: Path) -> None:
        """The trace event format: complete events, times in microseconds."""
        threads = {thread: i for i, thread in enumerate(dict.fromkeys(span[1] for span in self._spans))}
        events = [
            {"name": name, "ph": "X", "pid": 0, "tid": threads[thread], "ts": begin * 1e6, "dur": (end - begin) * 1e6}
            for name, thread, begin, end in self._spans
        ]
        path.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")


OFF = Timeline(enabled=False)
