"""The progress line of a running search, and Ctrl-C that ends a search but not the program."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from aisp_local.cli.output import duration, print_text
from aisp_local.types import Progress


class StatusLine:
    """One line on stderr, rewritten in place at most ten times a second; nothing without a terminal."""

    def __init__(self, enabled: bool | None = None) -> None:
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self._shown = 0.0

    def _due(self) -> bool:
        now = time.monotonic()
        if not self.enabled or now - self._shown < 0.1:
            return False
        self._shown = now
        return True

    def _show(self, line: str, hint: str) -> None:
        """``hint``: what is added where there is room for all of it."""
        width = shutil.get_terminal_size().columns - 1
        line += f"  {hint}" if len(line) + 2 + len(hint) <= width else ""
        sys.stderr.write("\r\x1b[2K" + line[:width])
        sys.stderr.flush()

    def clear(self) -> None:
        if self.enabled:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


class ProgressLine(StatusLine):
    """Of one search, whose answers have at most ``max_tokens``: without them no time left is told before an iteration
    has ended."""

    def __init__(self, enabled: bool | None = None, max_tokens: int = 0) -> None:
        super().__init__(enabled)
        self._stats, self._max_tokens = "", max_tokens
        self._whole, self._whole_at = 0, 0.0  # iterations that have ended, and the seconds that they took

    def __call__(self, progress: Progress) -> None:
        if not self.enabled:
            return
        if progress.stats is not None:
            stats = progress.stats
            self._stats = f"  mean {stats.mean:.2f}"
            if stats.ess is not None:
                self._stats += f"  ESS {stats.ess:.1f}"
        if progress.iteration - 1 != self._whole:
            self._whole, self._whole_at = progress.iteration - 1, progress.seconds
        if progress.stats is not None:
            self._shown = 0.0
        if not self._due():
            return
        line = f"iteration {progress.iteration}/{progress.iterations}"
        if progress.best is not None:
            line += f"  best {progress.best.reward:.2f}"
        elif progress.unfinished is not None:
            line += f"  best {progress.unfinished.reward:.2f} (unfinished)"
        line += self._stats
        if progress.seconds > 0:
            line += f"  {progress.n_tokens / progress.seconds:.0f} tokens/s"
        done = self._whole or min(1.0, progress.step / max(1, self._max_tokens)) * bool(self._max_tokens)
        if done:
            end = (self._whole_at if self._whole else progress.seconds) * progress.iterations / done
            line += f"  {duration(end - progress.seconds)} left"
        self._show(line, "Ctrl-C ends it")


class Streamed(ProgressLine):
    """Prints what has settled of the answer as it does, after which there is no line."""

    def __init__(self, enabled: bool | None = None, max_tokens: int = 0) -> None:
        super().__init__(enabled, max_tokens)
        self.printed = ""

    def __call__(self, progress: Progress) -> None:
        new = progress.settled.strip()[len(self.printed) :]  # whitespace at the end may be that of the answer
        if new:
            self.clear()
            self.enabled = False
            self._print(new)
        super().__call__(progress)

    def finish(self, answer: str) -> None:
        """The rest of the answer. All of it again where it does not begin with what was printed: after an interrupt."""
        self.clear()
        answer = answer.lstrip()
        if answer.startswith(self.printed):
            self._print(answer[len(self.printed) :] + "\n")
        else:
            self._print("\n\n" + answer + "\n")

    def _print(self, text: str) -> None:
        print_text(text)
        self.printed += text


class BatchLine(StatusLine):
    """Of many prompts: how many have answers, and the time that is left for the others."""

    def begin(self, prompts: int, answered: int, max_tokens: int) -> None:
        """``answered`` of them were before; an answer has at most ``max_tokens``."""
        self._prompts, self._before, self._max_tokens = prompts, answered, max_tokens
        self._answered = self._failed = 0
        self._began = time.monotonic()
        self._parts: dict[int, float] = {}  # of those that are being searched for, what is done

    def ended(self, failed: bool) -> None:
        """One has its answer, or its error."""
        self._failed += failed
        self._answered += not failed
        self._parts.clear()

    def __call__(self, i: int, progress: Progress) -> None:
        within = min(1.0, progress.step / self._max_tokens)  # the iteration
        done = max(progress.rollouts_done / progress.budget, (progress.iteration - 1 + within) / progress.iterations)
        self._parts[i] = max(done, self._parts.get(i, 0.0))
        if not self._due():
            return
        line = f"{self._before + self._answered}/{self._prompts} prompts"
        if self._failed:
            line += f"  {self._failed} failed"
        done = self._answered + self._failed + sum(self._parts.values())
        if done > 0:
            each = (time.monotonic() - self._began) / done
            line += f"  {each:.1f} s each  {duration(each * (self._prompts - self._before - done))} left"
        self._show(line, "(Ctrl-C ends it; the same command goes on)")


class StopFlag:
    """Callable that turns true at the first Ctrl-C; the second one interrupts at once."""

    def __init__(self) -> None:
        self.set = False

    def __call__(self) -> bool:
        return self.set


@contextmanager
def stop_on_interrupt() -> Iterator[StopFlag]:
    """Within the block, the first SIGINT sets the flag and the second raises KeyboardInterrupt."""
    flag = StopFlag()

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if flag.set:
            raise KeyboardInterrupt
        flag.set = True

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
