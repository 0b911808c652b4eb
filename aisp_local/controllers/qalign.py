"""QAlign: chains of responses whose ends are drawn anew, each accepted or refused by its reward (Metropolis-Hastings).

Every row is a chain. Of its response y an index i is drawn uniformly; the proposal y' keeps the tokens before i and has
a new end from the base model. It is accepted with the probability

    min(1, exp((r(y') - r(y)) / beta) |y| / |y'|),

so that the chain's law tends to ``p(y) exp(r(y) / beta)``, p the base model's as it is sampled from. |y| counts what
can be drawn anew: every token, the one that ends it among them. Source: QAlign (arXiv 2504.03790), Algorithm 1, whose
answer is the chain's last state or a vote; here it is the best response seen, as everywhere.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from aisp_local.controllers.base import ITERATIONS
from aisp_local.controllers.weights import lambda_for_ess
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds
from aisp_local.types import ControllerInfo, Controls, Rollouts, Sampling

Array = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]


class Qalign:
    """Options: ``beta`` (reward units; None: such that the weights ``exp(r / beta)`` of the first iteration have an
    effective sample size of ``ess`` of its rollouts), ``ess`` in (0, 1], ``temperature``, ``top_k``, ``top_p``,
    ``min_p``."""

    name = "qalign"
    iterations = ITERATIONS

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        prompt_index: int = 0,
        beta: float | None = None,
        ess: float = 0.25,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.02,
    ) -> None:
        if beta is not None and not (beta > 0 and math.isfinite(beta)):
            raise InputError(f"beta is {beta}; it must be greater than 0")
        if not 0.0 < ess <= 1.0:
            raise InputError(f"ess is {ess}; it must be in (0, 1]")
        if not temperature > 0:
            raise InputError(f"temperature is {temperature}; qalign samples, so it must be greater than 0")
        self._sampling = Sampling(temperature, top_k, top_p, min_p)
        self._beta, self._ess = beta, ess
        self._seed, self._prompt_index = seed, prompt_index
        self._iteration = 0
        self._chains: list[tuple[Tokens, float]] = []  # response and reward

    @property
    def chains(self) -> list[tuple[Tokens, float]]:
        """The responses at which the chains are, and their rewards."""
        return list(self._chains)

    def _generator(self, row: int) -> np.random.Generator:
        """Of a row's decisions in this iteration: where its end begins, then whether the proposal is accepted."""
        return RowSeeds(self._seed, self._prompt_index, self._iteration).generator(row, "noise")

    def ask(self, n: int) -> Controls:
        self._iteration += 1
        prefixes = None
        if self._chains:
            kept = [self._chains[row][0] if row < len(self._chains) else np.zeros(0, np.int32) for row in range(n)]
            prefixes = [y[: int(self._generator(row).random() * len(y))] for row, y in enumerate(kept)]
        return Controls(n=n, sampling=self._sampling, prefixes=prefixes)

    def tell(self, rollouts: Rollouts, rewards: Array) -> ControllerInfo:
        if self._beta is None:
            self._beta = lambda_for_ess(rewards, self._ess * len(rewards))
        for row, (tokens, reward) in enumerate(zip(rollouts.tokens, rewards.tolist(), strict=True)):
            if row >= len(self._chains):
                self._chains.append((tokens, reward))
            elif self._accepts(row, self._chains[row], (tokens, reward)):
                self._chains[row] = tokens, reward
        return ControllerInfo(lambda_=self._beta)

    def _accepts(self, row: int, now: tuple[Tokens, float], proposal: tuple[Tokens, float]) -> bool:
        (y, r), (y_new, r_new) = now, proposal
        if not math.isfinite(r_new) or not len(y_new):
            return False
        if not math.isfinite(r) or not len(y):
            return True
        gain = (r_new - r) / self._beta if self._beta is not None else 0.0
        drawn = float(self._generator(row).random(2)[1])
        return math.log(max(drawn, 1e-300)) < gain + math.log(len(y) / len(y_new))
