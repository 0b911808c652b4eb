"""The seam between a search and what decodes its rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from aisp_local.errors import CapacityError, InputError
from aisp_local.grammar import Grammar
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, Head, Prompt, Rollouts, Want


@dataclass(frozen=True, eq=False)
class Job:
    """``controls.n`` rollouts of one prompt: one iteration of one search. ``grammar``: what they have to be.

    ``stop_strings`` may be given as one string.
    """

    prompt: Prompt
    controls: Controls
    max_tokens: int
    seeds: RowSeeds
    stop_strings: Sequence[str] = ()
    want: frozenset[Want] = frozenset()
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "want", self.want | self.controls.want)
        object.__setattr__(self, "stop_strings", as_strings(self.stop_strings))

    def check(self, d: int) -> None:
        """Raises InputError for what no engine with pre-logits of width ``d`` can do."""
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if any(not stop for stop in self.stop_strings):
            raise InputError("a stop string is empty")
        vectors = self.controls.vectors
        if vectors is not None and vectors.shape[2] != d:
            raise InputError(f"control vectors are {vectors.shape[2]} wide; the model's pre-logits are {d}")


class Feed(Protocol):
    """Gives an engine its jobs and takes what comes of them, in the thread that runs the engine.

    What it answers may depend on the calls before, never on a clock, or the same run would not be the same twice.
    """

    def next(self, idle: bool) -> Job | None:
        """A job for rows that are free, if there is one now. With ``idle`` none decodes: None ends the run."""

    def ready(self) -> bool:
        """Would ``next`` answer at once? Asked only where other feeds share the rows: they decode until it would."""

    def stop(self) -> bool:
        """Asked before every decode step: cut all rollouts short?"""

    def stepped(self, job: Job, step: int, rows: int, n_tokens: int) -> None:
        """The job took part in its ``step``-th decode step; ``rows`` of it go on, ``n_tokens`` were decoded so far."""

    def ended(self, job: Job, row: int, text: str, paused: bool) -> None:
        """A rollout (from 0) ended by itself, or paused as its controls have it."""

    def finished(self, job: Job, rollouts: Rollouts) -> None:
        """All rollouts of the job ended, or were cut short."""


class Engine(Protocol):
    """Decodes responses under controls."""

    @property
    def d(self) -> int:
        """Width of the pre-logits."""

    @property
    def fingerprint(self) -> str:
        """A hash of the model."""

    @property
    def n_ctx(self) -> int:
        """The model's context in tokens."""

    @property
    def head(self) -> Head:
        """The output head on the host."""

    def room(self, prompt: Prompt) -> int:
        """How many tokens a response to the prompt may have; less than 1 if the prompt alone is too long."""

    def text(self, tokens: npt.NDArray[np.int32]) -> str:
        """What tokens of a response say; a character that their end cuts in two is left out."""

    def check_grammar(self, grammar: Grammar) -> None:
        """Raises InputError for one that rollouts cannot follow."""

    def piece(self, token: int) -> bytes:
        """The bytes of a token; empty if it says nothing."""

    def run(
        self, feed: Feed, *, prompts: Sequence[Prompt], n: int, max_tokens: int, at_once: int | None = None
    ) -> None:
        """Decode the feed's jobs until it has no more.

        Of them is known: each has one of the ``prompts`` and at most ``max_tokens``, no more than ``n`` rollouts wait
        at a time, and of no more than ``at_once`` prompts (default: all).
        """

    def rollout(
        self,
        prompt: Prompt,
        controls: Controls,
        *,
        max_tokens: int,
        seeds: RowSeeds,
        stop_strings: Sequence[str] = (),
        want: frozenset[Want] = frozenset(),
        should_stop: Callable[[], bool] | None = None,
        on_step: Callable[[int, int, int], None] | None = None,
        grammar: Grammar | None = None,
    ) -> Rollouts:
        """``run`` with one job.

        ``should_stop()`` is asked before every step; rows cut short so are "interrupted".
        ``on_step(step, rows_active, n_tokens)`` is called after each, counts are of this call.
        """


def check_room(engine: Engine, prompt: Prompt, name: str = "the prompt") -> int:
    """How many tokens a response to the prompt may have. Raises CapacityError where the prompt alone is too long."""
    room = engine.room(prompt)
    if room < 1:
        raise too_long(engine.n_ctx - room, engine.n_ctx, name)
    return room


def too_long(n_tokens: int, n_ctx: int, name: str = "the prompt") -> CapacityError:
    return CapacityError(f"{name} has {n_tokens} tokens and the model's context {n_ctx}; shorten it")


def as_strings(stop_strings: str | Sequence[str]) -> tuple[str, ...]:
    """One string or several."""
    return (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)


class OneJob:
    """A feed of a single job."""

    def __init__(
        self,
        job: Job,
        should_stop: Callable[[], bool] | None = None,
        on_step: Callable[[int, int, int], None] | None = None,
    ) -> None:
        self._waiting: Job | None = job
        self._should_stop, self._on_step = should_stop, on_step
        self.rollouts: Rollouts | None = None

    def next(self, idle: bool) -> Job | None:
        job, self._waiting = self._waiting, None
        return job

    def ready(self) -> bool:
        return True

    def stop(self) -> bool:
        return self._should_stop is not None and self._should_stop()

    def stepped(self, job: Job, step: int, rows: int, n_tokens: int) -> None:
        if self._on_step is not None:
            self._on_step(step, rows, n_tokens)

    def ended(self, job: Job, row: int, text: str, paused: bool) -> None:
        pass

    def finished(self, job: Job, rollouts: Rollouts) -> None:
        self.rollouts = rollouts
