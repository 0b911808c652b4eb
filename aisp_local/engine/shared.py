"""Calls from several threads at once share the rows of one engine, each as if it had them for itself.

A thread of its own decodes for all; a call joins where the context has room for what it may need, in the order in which
calls came, and has that many rows to itself until it is over. Of a call's schedule the others decide nothing: what it
draws is what it would draw alone, and its logits differ by rounding only. A call for which there is no room waits, with
all that came after it, until the others are done; then a larger context is made, if there is memory for one. It stays.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from aisp_local.engine.base import Feed, Job
from aisp_local.engine.decode import Decoder, Lane
from aisp_local.engine.llama import Claim, LlamaEngine
from aisp_local.errors import CapacityError, DecodeError, InputError
from aisp_local.host import available_memory
from aisp_local.native import MAX_SEQUENCES
from aisp_local.types import Prompt, Rollouts

_MOMENT = 0.002  # seconds between two looks at what all wait for: rewards, or another call
_POLL = 0.1  # so that a waiting thread hears of Ctrl-C everywhere

T = TypeVar("T")


class _Guest:
    """A call: its feed, asked in the thread that decodes but as code of its caller. What it raises ends it alone."""

    def __init__(self, feed: Feed, claim: Claim, context: Any, d: int) -> None:
        self.claim = claim
        self.gone = False  # the caller does not wait for more
        self.over = threading.Event()
        self.error: BaseException | None = None
        self._feed, self._context, self._d = feed, context, d

    def _ask(self, instead: T, function: Callable[..., T], *arguments: Any) -> T:
        if self.error is None:
            try:
                return self._context.run(function, *arguments)  # type: ignore[no-any-return]
            except BaseException as error:
                self.error = error
        return instead

    def next(self, idle: bool) -> Job | None:
        return self._ask(None, self._next, idle)

    def _next(self, idle: bool) -> Job | None:
        job = self._feed.next(idle)
        if job is not None:
            job.check(self._d)
        return job

    def ready(self) -> bool:
        return self._ask(True, self._feed.ready)

    def stop(self) -> bool:
        return self.gone or self._ask(True, self._feed.stop)

    def stepped(self, job: Job, step: int, rows: int, n_tokens: int) -> None:
        self._ask(None, self._feed.stepped, job, step, rows, n_tokens)

    def ended(self, job: Job, row: int, text: str, paused: bool) -> None:
        self._ask(None, self._feed.ended, job, row, text, paused)

    def finished(self, job: Job, rollouts: Rollouts) -> None:
        self._ask(None, self._feed.finished, job, rollouts)


class SharedEngine(LlamaEngine):
    """``LlamaEngine`` for many threads: up to ``together`` of their calls decode in one batch, the others queue.

    The feeds of calls, and with them ``stop``, ``on_progress`` and rewards without ``background``, run in the thread
    that decodes: all wait for them. Rewards with it are called from several threads. A call whose rewards are not there
    yet lets the others decode. ``timeline`` is of what the engine does, not of one call.
    """

    def __init__(self, model: str | os.PathLike[str], *, together: int, **options: Any) -> None:
        if together < 1:
            raise InputError(f"together is {together} calls; it must be at least 1")
        super().__init__(model, **options)
        self.together = together
        self._run = object()
        self._changed = threading.Condition()
        self._queue: deque[_Guest] = deque()  # the thread alone takes something away
        self._guests: list[_Guest] = []
        self._refused = sys.maxsize  # cells of a context that could not be made
        self._fresh = False  # the context was made for the oldest call that waits
        self._draining = False  # until a larger one can be
        self._thread = threading.Thread(target=self._work, name="aisp-local-engine", daemon=True)
        self._thread.start()

    def run(
        self, feed: Feed, *, prompts: Sequence[Prompt], n: int, max_tokens: int, at_once: int | None = None
    ) -> None:
        """See LlamaEngine.run."""
        self._check_free()
        claim = self._claim(prompts, n, max_tokens, min(len(prompts), at_once or len(prompts)))
        guest = _Guest(feed, claim, self._within(self._run), self.d)
        with self._changed:
            self._check_open()
            self._queue.append(guest)
            self._changed.notify()
        try:
            while not guest.over.wait(_POLL):
                pass
        except BaseException:
            guest.gone = True
            guest.over.wait()
            raise
        if guest.error is not None:
            raise guest.error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    while self._queue:
                        self._end(self._queue.popleft(), InputError("the engine is closed; make a new one"))
                    return
            with self._lock:
                self._host()

    def _host(self) -> None:
        """Make room for those that wait, and decode until none is left for which there is room."""
        first, wanted = self._queue[0].claim, self._wanted()
        # Room for others like it, or they would wait for its end, as long as that takes half of the memory.
        ample = self._together_with(wanted, [first] * (self.together - wanted.runs), spare=2)
        try:
            decoder = self._decoder_for(ample, wanted, first)
        except BaseException as error:
            self._end(self._queue.popleft(), error)
            return
        self._fresh, self._draining = True, False
        try:
            decoder.share(self._arrivals, self._left)
        except BaseException as error:
            for guest in self._guests:
                self._end(guest, error)
            self._guests = []

    def _decoder_for(self, *claims: Claim) -> Decoder:
        """For the first of these claims for which a context can be made: a GPU may have less memory than the host."""
        *larger, least = claims
        for claim in larger:
            if claim is not least:
                try:
                    return self._decoder(claim)
                except (CapacityError, DecodeError):
                    self._refused = claim.cells
        return self._decoder(least)

    def _wanted(self) -> Claim:
        """What the oldest call needs, with those after it that may decode beside it."""
        first, *others = [guest.claim for guest in list(self._queue)]
        return self._together_with(first, others[: self.together - 1])

    def _together_with(self, claim: Claim, others: Iterable[Claim], spare: int = 1) -> Claim:
        """The claim and as many of the others as there may be room for, ``spare`` times."""
        for other in others:
            both = claim + other
            if other.long != claim.long or not self._allowed(both):
                break
            if not self._holds(both) and not self._affordable(both, spare):
                break
            claim = both
        return claim

    def _affordable(self, claim: Claim, times: int = 1) -> bool:
        """Whether there is memory for a context that large, so many times, in place of the one at hand."""
        if claim.cells >= self._refused:
            return False
        each, limit = self.model.kv_bytes_per_token, self._memory_limit
        if limit is None:
            limit, held = available_memory(), 0 if self._context is None else self._context.n_ctx
            limit = None if limit is None else limit + held * each
        return limit is None or claim.cells * each * times <= limit

    def _allowed(self, claim: Claim) -> bool:
        """Whether several calls may have so much between them."""
        rows = min(MAX_SEQUENCES - claim.slots, self._parallel or MAX_SEQUENCES)
        return claim.rows <= rows and not self.model.has_encoder  # which reads one prompt for all rows

    def _room_for(self, claim: Claim) -> bool:
        if not self._guests:
            return (self._fresh or self._holds(self._wanted())) and self._holds(claim)
        both = sum((guest.claim for guest in self._guests[1:]), self._guests[0].claim) + claim
        if len(self._guests) >= self.together or claim.long != self._long or not self._allowed(both):
            return False
        # A larger context has to wait until nobody decodes. One call after the other would fit before that for ever.
        self._draining = self._draining or (not self._holds(both) and self._affordable(both))
        return not self._draining and self._holds(both)

    def _arrivals(self, idle: bool) -> Iterable[Lane]:
        """Those that join now: none goes before one that came earlier."""
        with self._changed:
            if idle and self._guests:
                self._changed.wait(_MOMENT)
            waiting = list(self._queue)
        full = self._closed
        for guest in waiting:
            if guest.stop():  # it need not wait for its turn to hear of it
                self._queue.remove(guest)
                self._end(guest)
            elif not full and self._room_for(guest.claim):
                self._queue.remove(guest)
                self._guests.append(guest)
                self._fresh = False
                self._measure()
                yield self._lane(guest, guest.claim)
            else:
                full = True

    def _left(self, lane: Lane) -> None:
        (guest,) = (guest for guest in self._guests if guest is lane.feed)
        self._guests.remove(guest)
        self._measure()
        self._end(guest, lane.error)

    def _measure(self) -> None:
        """What rows do not need is for prompts."""
        assert self._context is not None and self._cache is not None
        self._cache.cells = self._context.n_ctx - sum(guest.claim.decoded for guest in self._guests)

    def _end(self, guest: _Guest, error: BaseException | None = None) -> None:
        guest.error = guest.error or error
        guest.over.set()

    def close(self) -> None:
        """Free the context and the model, after the calls that decode; those that wait for a turn get InputError."""
        self._check_free()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        super().close()
