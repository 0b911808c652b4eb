"""Score-function steps on a held control inside a trust region of nats; rollouts that begin as the best so far did.

Responses are sampled under one control u at all steps, ``p_u = softmax(W (z + u) / T)``, cut by min-p to a few tokens.
Of every step the engine reports those tokens and their probabilities, so that nothing below costs anything per entry of
the vocabulary:

    g  =  1/n sum_i A_i sum_t W^T (e_{y_it} - p_it) / T            A: rewards, standardised
    u <-  u + eta g,   eta such that eta g alone is ``step`` nats from the base model,

and u is made shorter where ``KL(p_u || p_0)`` would be above the budget that ``strength`` names. Both divergences are
means over the iteration's own steps, times the mean length of a response. The base law, which does not become peaked as
p_u does, measures the steps: by the Fisher matrix of p_u they would grow without end.

From the second iteration on a part of the rollouts begin as one of the best so far did, up to a place drawn at random;
they go on under the newest u. Their rewards are compared among themselves, and only what they sampled enters g.

Sources: REINFORCE (Williams 1992); a trust region in nats as in TRPO (arXiv 1502.05477); resampling suffixes as in
QAlign (arXiv 2504.03790), without its Markov chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from aisp_local.controllers.beginnings import Beginnings
from aisp_local.controllers.guard import Guard
from aisp_local.controllers.tilts import Steps
from aisp_local.controllers.weights import NOISE, length
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds
from aisp_local.types import ControllerInfo, Controls, FloatArray, Head, Rollouts, Sampling

Array = npt.NDArray[np.float64]
Divergence = Callable[[FloatArray], float]

FULL_KL = 100.0
"""Nats over a response that a strength of 1 allows."""

_REFINEMENTS = 4  # of the factor that shortens u: its divergence is nearly quadratic


class Score:
    """Options: ``strength`` (0: the base model; the law sampled from stays within ``100 strength^2`` nats of it over a
    response), ``step`` (nats an iteration), ``reuse`` (share of an iteration's rollouts that begin as one of the
    ``elite`` best), ``temperature``, ``min_p``.
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
        strength: float = 0.5,
        step: float = 2.0,
        reuse: float = 0.5,
        elite: int = 4,
        temperature: float = 1.0,
        min_p: float = 0.05,
    ) -> None:
        if not 0.0 <= strength <= 1.0:
            raise InputError(f"strength is {strength}; it must be in [0, 1]")
        if not step > 0 or not math.isfinite(step):
            raise InputError(f"step is {step} nats; it must be greater than 0")
        if not 0.0 <= reuse <= 1.0:
            raise InputError(f"reuse is {reuse}; it must be in [0, 1]")
        if elite < 1:
            raise InputError(f"elite is {elite} responses; it must be at least 1")
        if not temperature > 0:
            raise InputError(f"temperature is {temperature}; score samples, so it must be greater than 0")
        self._head, self._sampling = head, Sampling(temperature, min_p=min_p)
        self._max_kl, self._step, self._reuse = FULL_KL * strength**2, step, reuse
        self._seed, self._prompt_index = seed, prompt_index
        self._u: FloatArray = np.zeros(d, np.float32)
        self._best, self._guard = Beginnings(elite), Guard()
        self._given: npt.NDArray[np.int64] = np.zeros(0, np.int64)  # tokens [n] that the rollouts began with
        self._iteration = 0

    @property
    def mean(self) -> FloatArray:
        """u [d], a copy."""
        return self._u.copy()

    def ask(self, n: int) -> Controls:
        self._iteration += 1
        seeds = RowSeeds(self._seed, self._prompt_index, self._iteration)
        prefixes = [np.zeros(0, np.int32)] * n
        reused = round(self._reuse * n) if len(self._best) else 0
        for row in range(n - reused, n):
            prefixes[row] = self._best.draw(seeds.generator(row, "noise"))
        self._given = np.array([len(prefix) for prefix in prefixes])
        controlled = self._head is not None and bool(self._u.any())
        return Controls(
            n=n,
            vectors=np.tile(self._u, (n, 1, 1)) if controlled else None,
            held=controlled,
            sampling=self._sampling,
            prefixes=prefixes if self._given.any() else None,
            want=frozenset({"laws"}),
            shift=self._head.shift(self._u) if controlled and self._head is not None else None,
        )

    def tell(self, rollouts: Rollouts, rewards: npt.NDArray[np.float64]) -> ControllerInfo:
        self._best.add(rewards, rollouts.tokens)
        laws = rollouts.laws
        if laws is None or self._head is None or not len(laws):
            return ControllerInfo(control_norm=length(self._u))
        lengths = np.array([len(tokens) for tokens in rollouts.tokens])
        whole = self._given == 0
        mean_length = float(lengths[whole].mean() if whole.any() else lengths.mean())
        drawn = [tokens[given:] for tokens, given in zip(rollouts.tokens, self._given, strict=True)]
        vocabulary, place = np.unique(np.concatenate([laws.token, *drawn]), return_inverse=True)
        rows = self._head.take(vocabulary) * np.float32(self._head.gain / self._sampling.temperature)
        entry, token = place[: len(laws)], place[len(laws) :]
        steps = Steps(laws)

        def change(u: FloatArray) -> FloatArray:
            """What u adds to the entries' logits [K]. Without BLAS, whose threads spin on cores that decode next."""
            return np.asarray(np.einsum("vd,d->v", rows, u)[entry])

        kl = mean_length * steps.divergence(change(self._u))
        advantages = self._advantages(rewards)
        if advantages is not None and self._max_kl > 0:
            weights = np.bincount(token, np.repeat(advantages, [len(row) for row in drawn]), len(vocabulary))
            weights -= np.bincount(entry, advantages[laws.row] * laws.probability, len(vocabulary))
            gradient = np.einsum("vd,v->d", rows, (weights / len(rewards)).astype(np.float32))
            variance = mean_length * steps.variance(change(gradient))
            if variance > 0:
                self._u = self._u + np.float32(math.sqrt(2 * self._step / variance)) * gradient
                self._shorten(lambda y: mean_length * steps.divergence(y), change(self._u))
        verdict = None
        if whole.any():
            mine = np.flatnonzero(whole).tolist()
            verdict = self._guard.look(rewards[mine], [rollouts.tokens[i] for i in mine])
        if verdict is not None:
            self._u = self._u * np.float32(verdict.factor)
            self._max_kl /= 4  # half of the strength
        return ControllerInfo(control_norm=length(self._u), kl=kl, note=verdict.note if verdict else None)

    def _shorten(self, divergence: Divergence, y: FloatArray) -> None:
        """Keep u, which adds y to the logits, within its budget of nats."""
        total, factor = divergence(y), 1.0
        if total <= self._max_kl:
            return
        for _ in range(_REFINEMENTS):
            factor *= math.sqrt(self._max_kl / total)
            total = divergence(y * np.float32(factor))
        self._u = self._u * np.float32(factor)

    def _advantages(self, rewards: npt.NDArray[np.float64]) -> Array | None:
        """Rewards [n] against those of rollouts that began alike (anew or not); None where they do not differ."""
        result = np.zeros(len(rewards))
        for group in (self._given == 0, self._given > 0):
            mine = group & np.isfinite(rewards)
            if mine.sum() > 1:
                result[mine] = rewards[mine] - rewards[mine].mean()
        spread = float(result.std())
        if not spread > NOISE * float(np.abs(rewards[np.isfinite(rewards)]).max(initial=0.0)):
            return None
        return result / spread
