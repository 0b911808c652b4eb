"""The decode loop: a column of tokens a step, and no idle row while a rollout waits."""

from __future__ import annotations

import codecs
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.engine.base import Feed, Job
from aisp_local.engine.blas import one_thread
from aisp_local.engine.constraint import Constraint, constrained_law
from aisp_local.engine.head import OutputHead
from aisp_local.engine.sampling import log_law, log_softmax, picker, sparse_law
from aisp_local.errors import DecodeError
from aisp_local.interrupts import InterruptsBetween
from aisp_local.native import Context, Matcher, Model
from aisp_local.timeline import Timeline
from aisp_local.types import FinishReason, FloatArray, Laws, Prompt, Rollouts, Sampling, Step, Want

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
class _Held:
    """What the sequence of a free row still holds: a prompt and all but the last token of a rollout that paused."""

    prompt: Prompt
    tokens: bytes


@dataclass(eq=False)
class Lane:
    """A feed with ``size`` rows of its own, so that its schedule is the same whoever else decodes.

    ``open_prompt`` gives a job's start and its token limit, or None while there is no place for its prompt;
    ``close_prompt`` takes it back. ``error``: what ended this lane alone.
    """

    feed: Feed
    size: int
    max_tokens: int
    open_prompt: Callable[[Job, bool], tuple[Start, int] | None]
    close_prompt: Callable[[Start], None]
    error: DecodeError | None = None
    rows: list[int] = field(default_factory=list)
    free: int = 0  # of them
    waiting: deque[Job] = field(default_factory=deque)  # taken, and no place for its prompt yet
    jobs: list[_Open] = field(default_factory=list)
    over: bool = False  # the feed has no more


@dataclass
class _Open:
    """A job in work."""

    lane: Lane
    job: Job
    max_tokens: int
    start: Start
    began: float = field(default_factory=time.perf_counter)
    stops: list[bytes] = field(default_factory=list)
    matcher: Matcher | None = None  # at the begin of its grammar
    waiting: list[int] = field(default_factory=list)  # its rollouts that have no row yet, the next one last
    on: dict[int, int] = field(default_factory=dict)  # the row that such a one had when it paused: its rollout
    steps: int = 0
    n_tokens: int = 0
    done: dict[int, _Rollout] = field(default_factory=dict)
    laws: list[tuple[Ints, Ints, Ints, FloatArray, FloatArray]] = field(default_factory=list)  # the columns of Laws

    @property
    def n(self) -> int:
        return self.job.controls.n

    @property
    def limit(self) -> int:
        """Tokens at which its rollouts end, or pause."""
        return min(self.max_tokens, self.job.controls.pause or self.max_tokens)


@dataclass
class _Column:
    """The rows of a step, the same until one begins or ends."""

    rows: Ints  # [k]
    index: Ints  # 0 to k - 1
    sequences: Ints
    origins: Ints  # position less step
    limits: Ints
    forced: bool  # some of the tokens of some row
    nothing: npt.NDArray[np.bool_]  # false, k times
    owners: list[_Open]
    want: frozenset[Want]
    needs_head: bool
    jobs: list[tuple[_Open, Ints]]  # with which of the k rows are theirs
    samplings: list[tuple[Sampling, Ints]]
    stopping: list[int]  # of the k rows, those with stop strings
    processed: list[tuple[_Open, Ints]]  # of ``jobs`` those with a logits processor
    needs_prelogits: bool  # for one of them
    constrained: list[int]  # of the k rows, those with a grammar


class Decoder:
    """Runs the jobs of feeds over rows, the sequences from ``first`` on.

    A row whose rollout ended takes the next one of its lane: of the same job, else of the feed's next job. What a
    paused rollout's row holds is kept until the row is needed: those that go on from it need not read it again.
    """

    def __init__(
        self, model: Model, context: Context, head: Callable[[], OutputHead], *, first: int, timeline: Timeline
    ) -> None:
        self._model, self._context, self._head = model, context, head
        self._pick = picker()
        self._first = first
        self._timeline = timeline
        self._beside_decoding = nullcontext if model.on_gpu else one_thread
        self._lanes: list[Lane] = []
        self._shared = False
        # By row.
        self._owner: list[_Open | None] = []
        self._held: list[_Held | None] = []
        self._bytes: list[bytearray] = []
        self._column: _Column | None = None
        self._index = np.zeros(0, np.int64)  # of the rollout in its job
        self._step = np.zeros(0, np.int64)
        self._limit = np.zeros(0, np.int64)
        self._origin = np.zeros(0, np.int64)  # position less step
        self._current = np.zeros(0, np.int32)
        self._tokens = np.zeros((0, 0), np.int32)
        self._uniforms = np.zeros((0, 0))
        self._controlled = np.zeros(0, np.bool_)
        self._forced = np.zeros(0, np.int64)  # how many tokens of it are given
        self._logprobs = np.zeros((0, 0), np.float32)
        self._kl = np.zeros(0)
        self._constraints: dict[int, Constraint] = {}  # by row
        self._prelogits: FloatArray | None = None

    def run(self, lane: Lane) -> None:
        """Decode the lane's jobs until its feed has no more, or stops. Raises its error."""
        self._enter(lane)
        with InterruptsBetween():
            while self._lanes:
                self._advance()
        if lane.error is not None:
            raise lane.error

    def share(self, arrivals: Callable[[bool], Iterable[Lane]], left: Callable[[Lane], None]) -> None:
        """Decode for all lanes, those that arrive meanwhile too, until none is left.

        ``arrivals(idle)`` is asked before every step; with ``idle`` all wait for something else, so may it, a moment.
        """
        self._shared, idle = True, False
        while True:
            for lane in arrivals(idle):
                self._enter(lane)
            before = list(self._lanes)
            idle = not self._advance()
            for lane in before:
                if lane not in self._lanes:
                    left(lane)
            if not before:
                return

    def _advance(self) -> bool:
        """A decode step, if there is anything to decode. Lanes that are over leave."""
        for lane in list(self._lanes):
            if lane.free:
                self._fill(lane)
            if lane.over:
                self._leave(lane)
        column = self._column = self._column or self._make_column()
        if not column.owners and not self._shared:
            self._lanes.clear()
            return False
        cut = [lane for lane in self._lanes if lane.feed.stop()]
        for lane in cut:
            self._cut(lane)
        if cut or not column.owners:
            return bool(cut)
        self._decode(column)
        for lane in [lane for lane in self._lanes if lane.error is not None]:
            self._leave(lane)
        return True

    def _enter(self, lane: Lane) -> None:
        taken = {row for other in self._lanes for row in other.rows}
        lane.rows = list(islice((row for row in count() if row not in taken), lane.size))
        lane.free = lane.size
        self._lanes.append(lane)
        more = lane.rows[-1] + 1 - len(self._owner)
        self._owner += [None] * more
        self._held += [None] * more
        self._bytes += [bytearray() for _ in range(more)]
        rows = len(self._owner)
        size = rows, max(self._tokens.shape[1], lane.max_tokens)
        if size == self._tokens.shape:
            return
        for name in ("_index", "_step", "_limit", "_origin", "_current", "_controlled", "_forced", "_kl"):
            setattr(self, name, _grown(getattr(self, name), (rows,)))
        for name in ("_tokens", "_uniforms", "_logprobs"):
            setattr(self, name, _grown(getattr(self, name), size))
        if self._prelogits is not None:
            self._prelogits = _grown(self._prelogits, (*size, self._model.d))

    def _leave(self, lane: Lane) -> None:
        """Its rows are anybody's; what they hold is nobody's."""
        self._lanes.remove(lane)
        self._column = None
        for owner in lane.jobs:
            lane.close_prompt(owner.start)
        for row in lane.rows:
            self._context.remove(self._first + row)
            self._context.clear_control(self._first + row)
            self._owner[row] = self._held[row] = None
            if row in self._constraints:
                self._constraints.pop(row).close()

    def _make_column(self) -> _Column:
        rows = np.array([row for row, owner in enumerate(self._owner) if owner is not None], np.int64)
        owners = [owner for owner in self._owner if owner is not None]
        want: frozenset[Want] = frozenset().union(*(owner.job.want for owner in owners))
        jobs = [
            (job, np.flatnonzero([owner is job for owner in owners])) for job in {id(o): o for o in owners}.values()
        ]
        samplings: dict[Sampling, list[Ints]] = {}
        for job, mine in jobs:
            samplings.setdefault(job.job.controls.sampling, []).append(mine)
        return _Column(
            rows,
            np.arange(len(rows)),
            self._first + rows,
            self._origin[rows],
            self._limit[rows],
            bool(self._forced[rows].any()),
            np.zeros(len(rows), np.bool_),
            owners,
            want,
            bool(want & {"kl", "logprobs"}) and bool(self._controlled[rows].any()),
            jobs,
            [(sampling, np.sort(np.concatenate(parts))) for sampling, parts in samplings.items()],
            [i for i, owner in enumerate(owners) if owner.stops],
            [(job, mine) for job, mine in jobs if job.job.controls.processor is not None],
            any(p is not None and p.needs_prelogits for p in (job.job.controls.processor for job, _ in jobs)),
            [i for i, owner in enumerate(owners) if owner.matcher is not None],
        )

    def _fill(self, lane: Lane) -> None:
        """Give every free row a rollout, as long as there are any."""
        read: list[tuple[int, Tokens, int]] = []  # sequence, tokens, the first one's position
        while lane.free and (job := self._job_with_work(lane)) is not None:
            self._begin(self._row_for(job), job, read)
        for row in lane.rows:
            if self._owner[row] is not None:
                self._held[row] = None
        if read:
            self._read(read)

    def _row_for(self, owner: _Open) -> int:
        """A free row: one that holds what a rollout of the job begins with, else one that holds nothing, else any."""
        free = [row for row in owner.lane.rows if self._owner[row] is None]
        return min(free, key=lambda row: 0 if row in owner.on else 1 if self._held[row] is None else 2)

    def _read(self, parts: list[tuple[int, Tokens, int]]) -> None:
        """Decode what sequences begin with, many at a time and without logits."""
        tokens = np.concatenate([part for _, part, _ in parts])
        sequences = np.concatenate([np.full(len(part), sequence) for sequence, part, _ in parts])
        positions = np.concatenate([np.arange(first, first + len(part)) for _, part, first in parts])
        size = self._context.n_batch
        with self._timeline.span("prefill"):
            for i in range(0, len(tokens), size):
                some = slice(i, i + size)
                self._context.decode(tokens[some], positions[some], sequences[some], outputs=False)

    def _job_with_work(self, lane: Lane) -> _Open | None:
        for owner in lane.jobs:
            if owner.waiting:
                return owner
        idle = not lane.jobs
        if not lane.waiting:
            # One that is alone decides as without sharing; beside others it may not keep them waiting.
            if self._shared and (idle or len(self._lanes) > 1) and not lane.feed.ready():
                return None
            new = lane.feed.next(idle)
            if new is None:
                lane.over = idle
                return None
            new.check(self._model.d)
            lane.waiting.append(new)
        job = lane.waiting[0]
        matcher = None if job.grammar is None else Matcher(self._model, job.grammar)
        with self._timeline.span("prefill"):
            opened = lane.open_prompt(job, idle)
        if opened is None:
            return None
        lane.waiting.popleft()
        start, max_tokens = opened
        stops = [stop.encode() for stop in job.stop_strings]
        waiting, on = list(range(job.controls.n - 1, -1, -1)), self._go_on(lane, job, max_tokens)
        lane.jobs.append(_Open(lane, job, max_tokens, start, stops=stops, matcher=matcher, waiting=waiting, on=on))
        return lane.jobs[-1]

    def _holding(self, lane: Lane, prompt: Prompt) -> list[tuple[int, bytes]]:
        """The lane's rows that hold a paused rollout to the prompt, and its tokens."""
        held = ((row, self._held[row]) for row in lane.rows)
        return [(row, one.tokens) for row, one in held if one is not None and one.prompt == prompt]

    def _go_on(self, lane: Lane, job: Job, max_tokens: int) -> dict[int, int]:
        """Which rows hold what a rollout of the job begins with, one rollout each."""
        prefixes, on = job.controls.prefixes, dict[int, int]()
        if prefixes is None or job.want & {"logprobs", "prelogits"}:
            return on
        if not (holding := self._holding(lane, job.prompt)):
            return on
        rollouts: dict[bytes, list[int]] = {}
        for index in range(job.controls.n - 1, -1, -1):
            rollouts.setdefault(prefixes[index][: max_tokens - 1].tobytes(), []).append(index)
        for row, tokens in holding:
            if rollouts.get(tokens):
                on[row] = rollouts[tokens].pop()
        return on

    def _begin(self, row: int, owner: _Open, read: list[tuple[int, Tokens, int]]) -> None:
        job, start = owner.job, owner.start
        index = owner.on.pop(row, None)
        if index is None:
            # Those with a row of their own wait for it, as long as there are others.
            others = [i for i in owner.waiting if i not in owner.on.values()]
            index = (others or owner.waiting)[-1]
            owner.on = {theirs: i for theirs, i in owner.on.items() if i != index}
        owner.waiting.remove(index)
        self._owner[row] = owner
        owner.lane.free -= 1
        self._column = None
        self._index[row] = index
        self._step[row], self._limit[row] = 0, owner.limit
        self._origin[row], self._current[row] = start.position, start.token
        self._bytes[row] = bytearray()
        self._kl[row] = 0.0
        if not job.controls.sampling.greedy:
            numbers = job.seeds.generator(index, "sampling").random(owner.max_tokens)
            self._uniforms[row, : owner.max_tokens] = numbers
        self._constraints.pop(row, None)
        if owner.matcher is not None:
            numbers = job.seeds.generator(index, "grammar").random(owner.max_tokens)
            self._constraints[row] = Constraint(owner.matcher.clone(), numbers)
        sequence = self._first + row
        self._forced[row] = 0
        prefix = np.zeros(0, np.int32)
        if job.controls.prefixes is not None:
            prefix = job.controls.prefixes[index][: owner.max_tokens - 1]
        source = self._holder(row, owner, prefix)
        if source != row:
            if self._held[row] is not None:
                self._context.remove(sequence)
                self._held[row] = None
            if source is not None:
                self._context.fork(self._first + source, sequence)
            elif start.sequence is not None:
                self._context.fork(start.sequence, sequence)
        vectors = job.controls.vectors
        self._controlled[row] = vectors is not None
        if vectors is None:
            self._context.clear_control(sequence)
        else:
            vector = vectors[index][: owner.max_tokens]
            self._context.set_control(sequence, vector, start.position, held=job.controls.held)
        self._begin_with(row, owner, prefix, read if source is None else [])
        if "prelogits" in job.want and self._prelogits is None:
            self._prelogits = np.zeros((*self._tokens.shape, self._model.d), np.float32)

    def _holder(self, row: int, owner: _Open, prefix: Tokens) -> int | None:
        """A row, this one if it can be, that holds the prompt and all but the last token of the prefix."""
        if not len(prefix) or owner.job.want & {"logprobs", "prelogits"}:
            return None
        wanted = prefix.tobytes()
        holds = [other for other, tokens in self._holding(owner.lane, owner.job.prompt) if tokens == wanted]
        return row if row in holds else holds[0] if holds else None

    def _begin_with(self, row: int, owner: _Open, prefix: Tokens, read: list[tuple[int, Tokens, int]]) -> None:
        """The response begins with these tokens: read at once, or step by step where each step has to report."""
        size, start = len(prefix), owner.start
        self._tokens[row, :size] = prefix
        if owner.job.want & {"logprobs", "prelogits"}:
            self._forced[row] = size
        elif size:
            read.append((self._first + row, np.array([start.token, *prefix[:-1]], np.int32), start.position))
            self._step[row], self._current[row] = size, prefix[-1]
            if row in self._constraints:
                self._constraints[row].follow(prefix)
            if owner.stops:
                self._bytes[row] += b"".join(self._model.piece(int(token)) for token in prefix)

    def _decode(self, column: _Column) -> None:
        context, rows, owners, want = self._context, column.rows, column.owners, column.want
        context.want_prelogits(column.needs_head or column.needs_prelogits or "prelogits" in want)
        step = self._step[rows]
        with self._timeline.span("decode"):
            context.decode(self._current[rows], column.origins + step, column.sequences, outputs=True)
            logits = context.logits()
        with self._timeline.span("sample"):
            base = logits
            if column.processed:
                logits = self._process(base, column)
            current = self._sample(logits, column, self._uniforms[rows, step])
            lawful = np.isfinite(logits[column.index, current])
            if not lawful.all():
                for i in np.flatnonzero(~lawful).tolist():
                    owners[i].lane.error = DecodeError(
                        f"the model gave logits that are not finite at step {int(step[i]) + 1}; "
                        "the file may be damaged, or the control far too strong"
                    )
                if all(owner.lane.error is not None for owner in owners):
                    return
                base, logits = np.where(lawful[:, None], base, 0.0), np.where(lawful[:, None], logits, 0.0)
            given = stuck = column.nothing  # stuck: nothing is allowed
            if column.forced:
                given = step < self._forced[rows]
                current = np.where(given, self._tokens[rows, step], current)
            if column.constrained:
                current, stuck = self._constrain(column, logits, current, given)
            if want:
                self._record(column, base, logits, current, stuck)
            for i in column.constrained:
                if not stuck[i]:
                    self._constraints[int(rows[i])].accept(int(current[i]))
            self._tokens[rows, step] = current
            self._current[rows] = current
            after = step + 1
            self._step[rows] = after - stuck if column.constrained else after
            over = self._model.eog[current]
            if column.constrained:
                over &= ~stuck
            stopped = over.copy() if column.stopping else over
            for i in column.stopping:
                stopped[i] |= self._found_stop(owners[i].stops, int(rows[i]), int(current[i]))
        ended = stopped | stuck | (after >= column.limits)
        ending = np.flatnonzero(ended).tolist()
        # The job that steps is told of it before it is told that it ended.
        for owner, mine in column.jobs:
            if owner.lane.error is not None:
                continue
            owner.steps += 1
            owner.n_tokens += len(mine)
            left = len(mine) - int(np.count_nonzero(ended[mine])) if ending else len(mine)
            owner.lane.feed.stepped(owner.job, owner.steps, left, owner.n_tokens)
        for i in ending:
            if owners[i].lane.error is not None:
                continue
            row = int(rows[i])
            whole = self._step[row] >= owners[i].max_tokens
            reason: FinishReason = "stop" if stopped[i] else "length" if whole else "paused"
            constraint = self._constraints.get(row)
            if constraint is not None and not over[i] and reason != "paused":
                # What a stop string leaves is no longer what the grammar has seen.
                reason = "length" if whole and not stopped[i] and constraint.complete else "incomplete"
            self._end(row, "incomplete" if stuck[i] else reason)

    def _sample(self, logits: FloatArray, column: _Column, uniforms: npt.NDArray[np.float64]) -> Tokens:
        if len(column.samplings) == 1:
            return self._pick(logits, column.samplings[0][0], uniforms)
        tokens = np.zeros(len(column.rows), np.int32)
        for sampling, mine in column.samplings:
            tokens[mine] = self._pick(logits[mine], sampling, uniforms[mine])
        return tokens

    def _constrain(
        self, column: _Column, logits: FloatArray, current: Tokens, given: npt.NDArray[np.bool_]
    ) -> tuple[Tokens, npt.NDArray[np.bool_]]:
        """Tokens [k] that the rows' grammars allow, and for which rows there is none."""
        current, stuck = current.copy(), np.zeros(len(current), np.bool_)
        for i in column.constrained:
            row, sampling = int(column.rows[i]), column.owners[i].job.controls.sampling
            constraint = self._constraints[row]
            if given[i]:
                constraint.check(int(current[i]))
                continue
            token = constraint.choose(logits[i], sampling, int(current[i]), int(self._step[row]))
            if token is None:
                stuck[i] = True
            else:
                current[i] = token
        return current, stuck

    def _process(self, base: FloatArray, column: _Column) -> FloatArray:
        """The logits to sample from: a copy, with those of jobs that have a processor as it gives them."""
        logits, z = base.copy(), self._context.prelogits() if column.needs_prelogits else None
        for owner, mine in column.processed:
            processor = owner.job.controls.processor
            assert processor is not None
            rows, shown = column.rows[mine], base[mine]
            if owner.matcher is not None:  # what is not allowed is no candidate
                for i, row in enumerate(rows.tolist()):
                    masked = self._constraints[row].masked(shown[i])
                    shown[i] = shown[i] if masked is None else masked
            so_far = [self._tokens[row, : self._step[row]].copy() for row in rows]
            step = Step(self._index[rows], so_far, shown, None if z is None else z[mine])
            with self._beside_decoding():
                logits[mine] = processor(step)
        return logits

    def _found_stop(self, stops: list[bytes], row: int, token: int) -> bool:
        """Does the row's text hold a stop string after its new token?"""
        piece, text = self._model.piece(token), self._bytes[row]
        text += piece
        return any(text.find(stop, max(0, len(text) - len(piece) - len(stop))) >= 0 for stop in stops)

    def _record(
        self, column: _Column, base: FloatArray, logits: FloatArray, current: Tokens, stuck: npt.NDArray[np.bool_]
    ) -> None:
        """What the rows' jobs want to know of this step; rows of other jobs come along.

        ``base`` [k, V]: before a processor, ``logits`` after it; for rows that are ``stuck`` [k] there is nothing.
        """
        active, want, needs_head = column.rows, column.want, column.needs_head
        step = self._step[active]
        z = self._context.prelogits() if needs_head or "prelogits" in want else None
        if self._prelogits is not None and z is not None:
            self._prelogits[active, step] = z
        free = (step >= self._forced[active]) & ~stuck
        if "laws" in want:
            for owner, theirs in column.jobs:
                mine = theirs[free[theirs]]
                if "laws" in owner.job.want and len(mine):
                    controls = owner.job.controls
                    rows = logits if len(mine) == len(logits) else logits[mine]
                    if owner.matcher is None:
                        drawn, tokens, law, base_law = sparse_law(rows, controls.sampling, controls.shift)
                    else:
                        constraints = [self._constraints[row] for row in active[mine].tolist()]
                        found = constrained_law(rows, constraints, controls.sampling, controls.shift)
                        drawn, tokens, law, base_law = found
                    row = mine[drawn]
                    owner.laws.append((self._index[active[row]], step[row], tokens, law, base_law))
        if not want & {"kl", "logprobs"}:
            return
        controlled = self._controlled[active]
        if needs_head and z is not None:
            with self._beside_decoding():
                projected = self._head().project(z)
            base = np.where(controlled[:, None], projected, base)
        if "logprobs" in want:
            logprobs = log_softmax(base.astype(np.float64))
            self._logprobs[active, step] = logprobs[np.arange(len(active)), current]
        if "kl" in want:
            for sampling, theirs in column.samplings:
                drawn = theirs[free[theirs]]
                if len(drawn):
                    p = log_law(logits[drawn], sampling)
                    for j, i in enumerate(drawn.tolist()):
                        constraint = self._constraints.get(int(active[i]))
                        left = None if constraint is None else constraint.law(logits[i], sampling)
                        if left is not None:
                            p[j] = log_softmax(left.astype(np.float64) / (sampling.temperature or 1.0))
                    q = log_softmax(base[drawn].astype(np.float64))
                    self._kl[active[drawn]] += (np.exp(p) * np.where(np.isneginf(p), 0.0, p - q)).sum(axis=1)

    def _take(self, row: int, reason: FinishReason) -> None:
        """Move what the row decoded to its job; the row is free."""
        owner = self._owner[row]
        assert owner is not None
        length, want = int(self._step[row]), owner.job.want
        tokens = self._tokens[row, :length].copy()
        owner.done[int(self._index[row])] = _Rollout(
            tokens,
            response_text(self._model, tokens, owner.stops),
            reason,
            self._logprobs[row, :length].copy() if "logprobs" in want else None,
            float(self._kl[row]),
            self._prelogits[row, :length].copy() if "prelogits" in want and self._prelogits is not None else None,
        )
        self._owner[row] = None
        owner.lane.free += 1
        self._column = None
        if row in self._constraints:
            self._constraints.pop(row).close()
        if reason == "paused":
            self._held[row] = _Held(owner.job.prompt, tokens.tobytes())
        else:
            self._context.remove(self._first + row)

    def _end(self, row: int, reason: FinishReason) -> None:
        owner = self._owner[row]
        assert owner is not None
        index = int(self._index[row])
        lane = owner.lane
        self._take(row, reason)
        lane.feed.ended(owner.job, index, owner.done[index].text, reason == "paused")
        if len(owner.done) == owner.n:
            lane.jobs.remove(owner)
            lane.close_prompt(owner.start)
            lane.feed.finished(owner.job, self._rollouts(owner))

    def _cut(self, lane: Lane) -> None:
        for row in lane.rows:
            if self._owner[row] is not None:
                self._take(row, "interrupted")
        jobs = lane.jobs
        self._leave(lane)
        for owner in jobs:
            lane.feed.finished(owner.job, self._rollouts(owner))

    def _rollouts(self, owner: _Open) -> Rollouts:
        return _rollouts(owner.job, self._model.d, owner.done, owner.laws, owner.n_tokens, owner.began)


def unbegun(job: Job, d: int) -> Rollouts:
    """What there is of a job that was stopped before it began."""
    return _rollouts(job, d, {}, [], 0, time.perf_counter())


def _rollouts(
    job: Job,
    d: int,
    done: Mapping[int, _Rollout],
    laws: list[tuple[Ints, Ints, Ints, FloatArray, FloatArray]],
    n_tokens: int,
    began: float,
) -> Rollouts:
    nothing = _Rollout(
        np.zeros(0, np.int32), "", "interrupted", np.zeros(0, np.float32), 0.0, np.zeros((0, d), np.float32)
    )
    rows, want = [done.get(i, nothing) for i in range(job.controls.n)], job.want
    return Rollouts(
        tokens=[row.tokens for row in rows],
        texts=[row.text for row in rows],
        finish_reasons=[row.reason for row in rows],
        decode_seconds=time.perf_counter() - began,
        n_tokens=n_tokens,
        base_logprobs=[r.logprobs for r in rows if r.logprobs is not None] if "logprobs" in want else None,
        kl=np.array([row.kl for row in rows], np.float32) if "kl" in want else None,
        prelogits=[r.prelogits for r in rows if r.prelogits is not None] if "prelogits" in want else None,
        laws=_laws(laws) if "laws" in want else None,
    )


def _grown(array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The array, with zeros around it."""
    grown = np.zeros(shape, array.dtype)
    grown[tuple(map(slice, array.shape))] = array
    return grown


def response_text(model: Model, tokens: Tokens, stops: Sequence[bytes] = ()) -> str:
    """What the tokens say, up to the first stop string."""
    data = b"".join(model.piece(int(token)) for token in tokens)
    for stop in stops:
        data = data.split(stop, 1)[0]
    # An incremental decoder leaves out a character that the end cuts in two.
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def _laws(parts: list[tuple[Ints, Ints, Ints, FloatArray, FloatArray]]) -> Laws:
    if not parts:
        nothing, none = np.zeros(0, np.int32), np.zeros(0, np.float32)
        return Laws(nothing, nothing, nothing, none, none)
    row, step, token, p, base = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Laws(row.astype(np.int32), step.astype(np.int32), token.astype(np.int32), p, base)
