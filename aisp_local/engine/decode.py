"""The decode loop: a column of tokens a step, and no idle row while a rollout waits."""

from __future__ import annotations

import codecs
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from aisp_local.engine.base import Feed, Job
from aisp_local.engine.head import OutputHead
from aisp_local.engine.sampling import log_law, log_softmax, pick
from aisp_local.errors import DecodeError
from aisp_local.native import Context, Model
from aisp_local.timeline import Timeline
from aisp_local.types import FinishReason, FloatArray, Rollouts

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]


@dataclass
class Start:
    """Where the rows of a prompt begin: ``token`` at ``position``, after what ``sequence`` holds (None: nothing)."""

    token: int
    position: int
    sequence: int | None


@dataclass
class _Rollout:
    """What is kept of one that ended."""

    tokens: Tokens
    text: str
    reason: FinishReason
    logprobs: FloatArray | None
    kl: float
    prelogits: FloatArray | None


@dataclass
class _Open:
    """A job in work."""

    job: Job
    max_tokens: int
    start: Start
    began: float = field(default_factory=time.perf_counter)
    stops: list[bytes] = field(default_factory=list)
    next_row: int = 0
    steps: int = 0
    n_tokens: int = 0
    done: dict[int, _Rollout] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return self.job.controls.n


class Decoder:
    """Runs the jobs of a feed over ``rows`` rows, the sequences from ``first`` on.

    A row whose rollout ended takes the next one: of the same job, else of the feed's next job. ``open_prompt`` gives a
    job's start and its token limit, or None while there is no place for its prompt; ``close_prompt`` takes it back.
    ``pool``: threads that may sample rows.
    """

    def __init__(
        self,
        model: Model,
        context: Context,
        head: Callable[[], OutputHead],
        feed: Feed,
        *,
        first: int,
        rows: int,
        max_tokens: int,
        open_prompt: Callable[[Job, bool], tuple[Start, int] | None],
        close_prompt: Callable[[Start], None],
        timeline: Timeline,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        self._model, self._context, self._head, self._feed = model, context, head, feed
        self._first, self._max_tokens = first, max_tokens
        self._open_prompt, self._close_prompt = open_prompt, close_prompt
        self._timeline, self._pool = timeline, pool
        self._waiting: deque[Job] = deque()  # taken, and no place for its prompt yet
        self._jobs: list[_Open] = []
        # By row.
        self._owner: list[_Open | None] = [None] * rows
        self._index = np.zeros(rows, np.int64)  # of the rollout in its job
        self._step = np.zeros(rows, np.int64)
        self._limit = np.zeros(rows, np.int64)
        self._position = np.zeros(rows, np.int64)
        self._current = np.zeros(rows, np.int32)
        self._tokens = np.zeros((rows, max_tokens), np.int32)
        self._uniforms = np.zeros((rows, max_tokens))
        self._controlled = np.zeros(rows, np.bool_)
        self._bytes = [bytearray() for _ in range(rows)]
        self._logprobs = np.zeros((rows, max_tokens), np.float32)
        self._kl = np.zeros(rows)
        self._prelogits: FloatArray | None = None

    def run(self) -> None:
        while True:
            self._fill()
            active = np.flatnonzero([owner is not None for owner in self._owner])
            if len(active) == 0:
                return
            if self._feed.stop():
                self._cut()
                return
            self._decode(active)

    def _fill(self) -> None:
        """Give every free row a rollout, as long as there are any."""
        for row, owner in enumerate(self._owner):
            if owner is not None:
                continue
            job = self._job_with_work()
            if job is None:
                return
            self._begin(row, job)

    def _job_with_work(self) -> _Open | None:
        for owner in self._jobs:
            if owner.next_row < owner.n:
                return owner
        idle = not self._jobs
        if not self._waiting:
            new = self._feed.next(idle)
            if new is None:
                return None
            new.check(self._model.d)
            self._waiting.append(new)
        job = self._waiting[0]
        with self._timeline.span("prefill"):
            opened = self._open_prompt(job, idle)
        if opened is None:
            return None
        self._waiting.popleft()
        start, max_tokens = opened
        stops = [stop.encode() for stop in job.stop_strings]
        self._jobs.append(_Open(job, max_tokens, start, stops=stops))
        return self._jobs[-1]

    def _begin(self, row: int, owner: _Open) -> None:
        job, start, index = owner.job, owner.start, owner.next_row
        owner.next_row += 1
        self._owner[row] = owner
        self._index[row] = index
        self._step[row], self._limit[row] = 0, owner.max_tokens
        self._position[row], self._current[row] = start.position, start.token
        self._bytes[row] = bytearray()
        self._kl[row] = 0.0
        if not job.controls.sampling.greedy:
            numbers = job.seeds.generator(index, "sampling").random(owner.max_tokens)
            self._uniforms[row, : owner.max_tokens] = numbers
        sequence = self._first + row
        if start.sequence is not None:
            self._context.fork(start.sequence, sequence)
        vectors = job.controls.vectors
        self._controlled[row] = vectors is not None
        if vectors is None:
            self._context.clear_control(sequence)
        else:
            vector = vectors[index][: owner.max_tokens]
            self._context.set_control(sequence, vector, start.position, held=job.controls.held)
        if "prelogits" in job.want and self._prelogits is None:
            self._prelogits = np.zeros((len(self._owner), self._max_tokens, self._model.d), np.float32)

    def _decode(self, active: Ints) -> None:
        context = self._context
        owners = [owner for row in active if (owner := self._owner[row]) is not None]
        want = frozenset().union(*(owner.job.want for owner in owners))
        needs_head = bool(want & {"kl", "logprobs"}) and bool(self._controlled[active].any())
        context.want_prelogits(needs_head or "prelogits" in want)
        with self._timeline.span("decode"):
            context.decode(self._current[active], self._position[active], self._first + active, outputs=True)
            logits = context.logits()
        with self._timeline.span("sample"):
            step = self._step[active]
            current = self._sample(logits, owners, self._uniforms[active, step])
            if not np.isfinite(logits[np.arange(len(active)), current]).all():
                raise DecodeError(
                    f"the model gave logits that are not finite at step {int(step.max()) + 1}; "
                    "the file may be damaged, or the control far too strong"
                )
            if want:
                self._record(active, owners, logits, current, needs_head)
            self._tokens[active, step] = current
            self._current[active] = current
            self._step[active] += 1
            self._position[active] += 1
            stopped = self._model.eog[current]
            for i, owner in enumerate(owners):
                if owner.stops:
                    stopped[i] |= self._found_stop(owner.stops, int(active[i]), int(current[i]))
        full = self._step[active] >= self._limit[active]
        # The job that steps is told of it before it is told that it ended.
        jobs = list(dict.fromkeys(map(id, owners)))
        by_id = {id(owner): owner for owner in owners}
        for key in jobs:
            owner = by_id[key]
            mine = np.array([o is owner for o in owners])
            owner.steps += 1
            owner.n_tokens += int(mine.sum())
            going_on = int((mine & ~(stopped | full)).sum())
            self._feed.stepped(owner.job, owner.steps, going_on, owner.n_tokens)
        for row, stop in zip(active[stopped | full], stopped[stopped | full], strict=True):
            self._end(int(row), "stop" if stop else "length")

    def _sample(self, logits: FloatArray, owners: list[_Open], uniforms: npt.NDArray[np.float64]) -> Tokens:
        settings = [owner.job.controls.sampling for owner in owners]
        if all(sampling == settings[0] for sampling in settings):
            return pick(logits, settings[0], uniforms, self._pool)
        tokens = np.zeros(len(owners), np.int32)
        for sampling in dict.fromkeys(settings):
            rows = np.flatnonzero([s == sampling for s in settings])
            tokens[rows] = pick(logits[rows], sampling, uniforms[rows], self._pool)
        return tokens

    def _found_stop(self, stops: list[bytes], row: int, token: int) -> bool:
        """Does the row's text hold a stop string after its new token?"""
        piece, text = self._model.piece(token), self._bytes[row]
        text += piece
        return any(text.find(stop, max(0, len(text) - len(piece) - len(stop))) >= 0 for stop in stops)

    def _record(
        self,
        active: Ints,
        owners: list[_Open],
        logits: FloatArray,
        current: Tokens,
        needs_head: bool,
    ) -> None:
        """What the rows' jobs want to know of this step; rows of other jobs come along."""
        step = self._step[active]
        want = frozenset().union(*(owner.job.want for owner in owners))
        z = self._context.prelogits() if needs_head or "prelogits" in want else None
        if self._prelogits is not None and z is not None:
            self._prelogits[active, step] = z
        if not want & {"kl", "logprobs"}:
            return
        controlled = self._controlled[active]
        base = logits
        if needs_head and z is not None:
            base = np.where(controlled[:, None], self._head().project(z), logits)
        if "logprobs" in want:
            law = log_softmax(base.astype(np.float64))
            self._logprobs[active, step] = law[np.arange(len(active)), current]
        if "kl" in want:
            for i in np.flatnonzero(controlled):
                sampling = owners[i].job.controls.sampling
                p = log_law(logits[i : i + 1], sampling)
                q = log_softmax(base[i : i + 1].astype(np.float64) / (sampling.temperature or 1.0))
                self._kl[active[i]] += float((np.exp(p) * np.where(np.isneginf(p), 0.0, p - q)).sum())

    def _take(self, row: int, reason: FinishReason) -> None:
        """Move what the row decoded to its job; the row is free."""
        owner = self._owner[row]
        assert owner is not None
        length, want = int(self._step[row]), owner.job.want
        tokens = self._tokens[row, :length].copy()
        owner.done[int(self._index[row])] = _Rollout(
            tokens,
            self._text(owner, tokens),
            reason,
            self._logprobs[row, :length].copy() if "logprobs" in want else None,
            float(self._kl[row]),
            self._prelogits[row, :length].copy() if "prelogits" in want and self._prelogits is not None else None,
        )
        self._owner[row] = None
        self._context.remove(self._first + row)

    def _text(self, owner: _Open, tokens: Tokens) -> str:
        data = b"".join(self._model.piece(int(token)) for token in tokens)
        for stop in owner.stops:
            data = data.split(stop, 1)[0]
        # An incremental decoder leaves out a character that the token limit cut in two.
        return codecs.getincrementaldecoder("utf-8")("replace").decode(data)

    def _end(self, row: int, reason: FinishReason) -> None:
        owner = self._owner[row]
        assert owner is not None
        index = int(self._index[row])
        self._take(row, reason)
        self._feed.ended(owner.job, index, owner.done[index].text)
        if len(owner.done) == owner.n:
            self._jobs.remove(owner)
            self._close_prompt(owner.start)
            self._feed.finished(owner.job, self._rollouts(owner))

    def _cut(self) -> None:
        for row, owner in enumerate(self._owner):
            if owner is not None:
                self._take(row, "interrupted")
        for owner in self._jobs:
            self._close_prompt(owner.start)
            self._feed.finished(owner.job, self._rollouts(owner))
        self._jobs = []

    def _rollouts(self, owner: _Open) -> Rollouts:
        d = self._model.d
        nothing = _Rollout(
            np.zeros(0, np.int32), "", "interrupted", np.zeros(0, np.float32), 0.0, np.zeros((0, d), np.float32)
        )
        rows, want = [owner.done.get(i, nothing) for i in range(owner.n)], owner.job.want
        return Rollouts(
            tokens=[row.tokens for row in rows],
            texts=[row.text for row in rows],
            finish_reasons=[row.reason for row in rows],
            decode_seconds=time.perf_counter() - owner.began,
            n_tokens=owner.n_tokens,
            base_logprobs=[r.logprobs for r in rows if r.logprobs is not None] if "logprobs" in want else None,
            kl=np.array([row.kl for row in rows], np.float32) if "kl" in want else None,
            prelogits=[r.prelogits for r in rows if r.prelogits is not None] if "prelogits" in want else None,
        )
