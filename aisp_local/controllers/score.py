"""Score-function steps on a held control, and the best of unfinished rollouts: two ways to move, one budget of nats.

Responses are sampled under one control u at all steps, ``p_u = softmax(W (z + u) / T)``, cut by min-p to a few tokens,
block by block. At the end of each block the reward scores what there is; the best of the rollouts go on, each with as
many copies as the others (see ``blocks``), and the control moves:

    g  =  1/n sum_i A_i sum_t W^T (e_{y_it} - p_it) / T       A: rewards against those of the same parent, standardised
    u <-  u + eta g,   eta such that eta g alone is ``step / blocks`` nats from the base model,

and u is made shorter where ``KL(p_u || p_0)`` would be above its part of the budget. Since rollouts of one parent
differ by the block alone, so do their rewards: what other blocks add to the variance of g is gone.

Of every step the engine reports the tokens that min-p left and their probabilities, so that nothing below costs
anything per entry of the vocabulary. Divergences are means over steps, times the mean length of a response, the longest
so far: of a move over the block's own steps, of u over those of a whole response, since a block's last survivors may be
where u does little. The base law, which does not become peaked as p_u does, measures the steps: by the Fisher matrix of
p_u they would grow without end.

``strength`` names the nats over a response that both ways together may use, each half of them unless told otherwise:
the control, and the selection, by how many survive.

Sources: REINFORCE (Williams 1992); a trust region in nats as in TRPO (arXiv 1502.05477); blockwise selection (arXiv
2310.17022); sequential Monte Carlo with a reward of unfinished responses (arXiv 2404.17546).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from aisp_local.controllers.blocks import BLOCKS, Schedule, select, selection_kl, survivors
from aisp_local.controllers.guard import Guard, Verdict
from aisp_local.controllers.tilts import Sample, Steps
from aisp_local.controllers.weights import NOISE, length
from aisp_local.errors import InputError
from aisp_local.types import ControllerInfo, Controls, FloatArray, Head, Laws, Rollouts, Sampling

Array = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]

FULL_KL = 80.0
"""Nats over a response that a strength of 1 allows."""

_SAMPLE = 64  # steps of a block that nats are measured at
_MOST_STEP = 1e6  # nats
_CLOSE, _REFINEMENTS = 0.01, 60  # of the factor that shortens u


class Score:
    """Options:

    - ``strength`` (0: the base model; the law sampled from stays within ``80 strength^2`` nats of it over a response);
    - ``nats`` (that budget itself, in the place of ``strength``);
    - ``selection`` (the share of them that selecting unfinished rollouts takes; 0: none are);
    - ``commit`` (one rollout survives each pause, whatever nats that takes: what is decoded by then has settled);
    - ``blocks`` (a response of the expected length is cut into about so many: more cost more of the reward's time);
    - ``step`` (nats that the control moves an iteration);
    - ``temperature``, ``min_p``;
    - ``steering`` (u to start with [d]) and ``steering_nats`` (of a response under it, where it was learnt: it is made
      shorter if that is more than the budget; from the first update on what it does here is measured).
    """

    name = "score"

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        head: Head | None = None,
        prompt_index: int = 0,
        unfinished: bool = True,
        steering: FloatArray | None = None,
        steering_nats: float | None = None,
        strength: float = 0.5,
        nats: float | None = None,
        selection: float = 0.5,
        commit: bool = False,
        blocks: int = BLOCKS,
        step: float = 8.0,
        temperature: float = 1.0,
        min_p: float = 0.02,
    ) -> None:
        if not 0.0 <= strength <= 1.0:
            raise InputError(f"strength is {strength}; it must be in [0, 1]")
        if not 0.0 <= selection <= 1.0:
            raise InputError(f"selection is {selection}; it must be in [0, 1]")
        if not 0 < step <= _MOST_STEP:
            raise InputError(f"step is {step} nats; it must be greater than 0, and {_MOST_STEP:.0f} at most")
        if not temperature > 0:
            raise InputError(f"temperature is {temperature}; score samples, so it must be greater than 0")
        self._head, self._sampling = head, Sampling(temperature, min_p=min_p)
        if nats is not None and not (nats >= 0 and math.isfinite(nats)):
            raise InputError(f"nats is {nats}; it must be 0 or greater")
        nats = FULL_KL * strength**2 if nats is None else nats
        if not unfinished:
            selection, commit = 0.0, False
        commit = commit and nats > 0  # to choose at all is to leave the base model
        self._selection_kl, self._control_kl, self._step = selection * nats, (1.0 - selection) * nats, step
        self._pauses, self._commit = commit or self._selection_kl > 0, commit
        self._u: FloatArray = np.zeros(d, np.float32)
        self._nats: float | None = 0.0  # of a response under u, as last measured
        if steering is not None:
            if steering.shape != (d,) or not np.isfinite(steering).all():
                raise InputError(f"the steering has the shape {steering.shape}; it must be {d} finite numbers")
            if not self._control_kl > 0:
                raise InputError("with strength 0 or selection 1 no control is held; leave the steering out")
            self._u = steering.astype(np.float32)
            self._nats = steering_nats
            if steering_nats is not None and steering_nats > self._control_kl:
                # Of a small control nats are as the square of its length.
                self._u = self._u * np.float32(math.sqrt(self._control_kl / steering_nats))
                self._nats = self._control_kl
        self._guard = Guard()
        self._schedule = Schedule(max_tokens, blocks)
        self._longest = 0.0  # tokens of a response, mean of an iteration
        self._blocks: list[Sample] = []  # of the iteration's steps so far
        self._begin()

    def _begin(self) -> None:
        """A new iteration."""
        self._before, self._blocks = self._blocks, []
        self._position = 0  # tokens that its rollouts have
        self._hold = np.float32(1.0)  # what u is multiplied with for the rest of it
        self._allowed = self._control_kl  # nats by the control, of a rollout
        self._going_on: list[Tokens] = []  # with what each of the rollouts begins
        self._parents: npt.NDArray[np.int64] = np.zeros(0, np.int64)  # of each [n]: which is whose sibling
        self._finished: list[tuple[float, Tokens]] = []
        self._moved = 0.0  # nats by the control, of all rollouts together
        self._selected = 0.0  # nats

    @property
    def held(self) -> FloatArray:
        """u [d], a copy."""
        return self._u.copy()

    @property
    def held_nats(self) -> float | None:
        """KL of a response under u, as last measured; None before, where nobody said it."""
        return self._nats

    def ask(self, n: int) -> Controls:
        u = self._u * self._hold
        controlled = self._head is not None and bool(u.any())
        return Controls(
            n=n,
            vectors=np.tile(u, (n, 1, 1)) if controlled else None,
            held=controlled,
            sampling=self._sampling,
            prefixes=self._going_on or None,
            pause=self._schedule.pause(self._position) if self._pauses and n > 1 else None,
            want=frozenset({"laws"}) if self._control_kl > 0 else frozenset(),
            shift=self._head.shift(u) if controlled and self._head is not None else None,
        )

    def tell(self, rollouts: Rollouts, rewards: npt.NDArray[np.float64]) -> ControllerInfo:
        parents = self._parents if len(self._parents) == len(rewards) else np.zeros(len(rewards), np.int64)
        if len(self._parents):
            self._guard.compare(parents, rewards)
        blocks = 1 + (self._schedule.count() if self._pauses else 0)
        paused = [i for i, reason in enumerate(rollouts.finish_reasons) if reason == "paused"]
        if rollouts.laws is not None and self._head is not None and len(rollouts.laws):
            given = [len(prefix) for prefix in self._going_on] or [0] * len(rewards)
            drawn = [tokens[begin:] for tokens, begin in zip(rollouts.tokens, given, strict=True)]
            self._learn(rollouts.laws, drawn, _advantages(parents, rewards), self._step / blocks, len(paused))
        ended = zip(rewards, rollouts.tokens, rollouts.finish_reasons, strict=True)
        self._finished += [(reward, tokens) for reward, tokens, reason in ended if reason != "paused"]
        if paused:
            tokens = [rollouts.tokens[i] for i in paused]
            verdict = self._guard.glance(tokens) if self._u.any() else None
            self._go_on(rewards[paused], tokens)
            return ControllerInfo(note=self._heed(verdict))
        info = self._end()
        self._begin()
        return info

    def _go_on(self, scores: npt.NDArray[np.float64], tokens: Sequence[Tokens]) -> None:
        """With the best of some rollouts, as often as there are rollouts."""
        n, self._position = len(scores), len(tokens[0])
        left = 1 + self._schedule.count(self._position)  # pauses, this one among them
        keep = 1 if self._commit else survivors(n, (self._selection_kl - self._selected) / left)
        chosen = select(scores, tokens, keep)
        self._selected += selection_kl(n, len(chosen))
        # Of those that are alike there is one parent.
        parents: dict[bytes, int] = {}
        ids = [parents.setdefault(tokens[i].tobytes(), i) for i in chosen]
        self._parents = np.array([ids[i % len(ids)] for i in range(n)])
        self._going_on = [tokens[i] for i in self._parents.tolist()]

    def _end(self) -> ControllerInfo:
        """Of an iteration whose rollouts have all finished."""
        rewards = np.array([reward for reward, _ in self._finished])
        tokens = [row for _, row in self._finished]
        self._schedule.learn([len(row) for row in tokens])
        self._longest = max(self._longest, self._schedule.expected)
        kl = self._selected + self._moved / len(tokens)
        said = self._heed(self._guard.look(rewards, tokens) if self._u.any() else None)
        notes = [note for note in (said, self._guard.noise()) if note]
        return ControllerInfo(
            control_norm=length(self._u), kl=kl, selection_kl=self._selected, note="; ".join(notes) or None
        )

    def _heed(self, verdict: Verdict | None) -> str | None:
        """Do what the guard says, and say it."""
        if verdict is None:
            return None
        self._u = self._u * np.float32(verdict.factor)
        self._nats = None if self._nats is None else self._nats * verdict.factor**2
        self._control_kl /= 4  # half of the strength
        n = len(self._finished) + len(self._going_on)
        spent = self._moved / n if n else 0.0
        self._allowed = spent + max(self._allowed - spent, 0.0) / 4
        return verdict.note

    def _learn(self, laws: Laws, drawn: Sequence[Tokens], advantages: Array | None, step: float, going_on: int) -> None:
        """Move u by ``step`` nats along the advantages [n] of what was drawn, and keep it within its budget: at the
        iteration's steps so far, and from there on at those of the iteration before; and, for what is left of the
        iteration, within what is left of the budget, however much the control turned out to do."""
        assert self._head is not None
        end = int(laws.step.max()) + 1
        n = len(self._finished) + len(drawn)
        self._blocks.append(Sample.of(laws, _SAMPLE, n))
        seen, weights = Sample.joined([*self._blocks, *(sample.after(end) for sample in self._before)])
        vocabulary, place = np.unique(np.concatenate([laws.token, *drawn, seen.token]), return_inverse=True)
        rows = self._head.take(vocabulary) * np.float32(self._head.gain / self._sampling.temperature)
        entry, token, elsewhere = np.split(place, [len(laws), len(place) - len(seen)])
        block, steps = Steps(laws, self._sampling), Steps(seen, self._sampling, weights)
        # A control for which answers became short would get more nats a step, and the next ones may be long again.
        expected = max(self._schedule.expected, self._longest)

        def change(u: FloatArray, where: npt.NDArray[np.intp]) -> FloatArray:
            """What u adds to the logits of entries. Without BLAS, whose threads spin on cores that decode next."""
            return np.asarray(np.einsum("vd,d->v", rows, u)[where])

        self._moved += block.count * block.divergence(change(self._u * self._hold, entry))
        if advantages is not None:
            sums = np.bincount(token, np.repeat(advantages, [len(row) for row in drawn]), len(vocabulary))
            sums -= np.bincount(entry, advantages[laws.row] * laws.probability, len(vocabulary))
            gradient = np.einsum("vd,v->d", rows, (sums / len(drawn)).astype(np.float32))
            variance = expected * block.variance(change(gradient, entry))
            if variance > 0:
                self._u = self._u + np.float32(math.sqrt(2 * step / variance)) * gradient
        factor, found = _fitting(steps, change(self._u, elsewhere), self._control_kl / expected)
        self._u, self._nats = self._u * factor, found * expected
        left = going_on / n * max(expected - end, self._schedule.block)  # steps of a rollout
        nats = max(self._allowed - self._moved / n, 0.0)
        self._hold = _fitting(steps, change(self._u, elsewhere), nats / left)[0] if left else np.float32(1.0)


def _fitting(steps: Steps, y: FloatArray, nats: float) -> tuple[np.float32, float]:
    """What y is to be multiplied with, at most 1, for a mean divergence of so many nats, and no more; and that."""
    total = steps.divergence(y)
    if total <= nats:
        return np.float32(1.0), total
    low, high, factor, reached = 0.0, 1.0, 1.0, 0.0
    for _ in range(_REFINEMENTS if nats > 0 else 0):
        # As a parabola has it; it flattens, and jumps where min-p lets go of a token.
        guess = factor * math.sqrt((1 - _CLOSE / 2) * nats / total) if total > 0 else high
        factor = guess if low < guess < high else (low + high) / 2
        total = steps.divergence(y * np.float32(factor))
        if total > nats:
            high = factor
        else:
            low, reached = factor, total
            if total >= (1 - _CLOSE) * nats:
                break
    return np.float32(low), reached


def _advantages(parents: npt.NDArray[np.int64], rewards: npt.NDArray[np.float64]) -> Array | None:
    """Rewards [n] against those of siblings, standardised; None where they do not differ."""
    result, finite = np.zeros(len(rewards)), np.isfinite(rewards)
    for parent in np.unique(parents):
        mine = (parents == parent) & finite
        if mine.sum() > 1:
            result[mine] = rewards[mine] - rewards[mine].mean()
    spread = float(result.std())
    if not spread > NOISE * float(np.abs(rewards[finite]).max(initial=0.0)):
        return None
    return result / spread
