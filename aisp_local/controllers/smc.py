"""Sequential Monte Carlo: unfinished rollouts are resampled by what the last block added to their reward.

At every pause of an iteration, with r the reward of what there is:

    w_i ~ exp((r_i - r_parent(i)) / lambda),   n new rollouts by systematic resampling,

lambda such that the effective sample size of w is a share of n. No control. Source: twisted SMC with the reward of the
unfinished response as its twist (arXiv 2404.17546).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aisp_local.controllers.blocks import BLOCKS, Schedule
from aisp_local.controllers.weights import effective_sample_size, importance_weights, lambda_for_ess
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds
from aisp_local.types import ControllerInfo, Controls, Rollouts, Sampling

Array = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]


class Smc:
    """Options: ``ess`` (share of n, in (0, 1]; 1: rollouts are left alone), ``blocks``, ``temperature``, ``min_p``."""

    name = "smc"

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        prompt_index: int = 0,
        unfinished: bool = True,
        ess: float = 0.25,
        blocks: int = BLOCKS,
        temperature: float = 1.0,
        min_p: float = 0.02,
    ) -> None:
        if not 0.0 < ess <= 1.0:
            raise InputError(f"ess is {ess}; it must be in (0, 1]")
        if not temperature > 0:
            raise InputError(f"temperature is {temperature}; smc samples, so it must be greater than 0")
        self._sampling = Sampling(temperature, min_p=min_p)
        self._ess = ess if unfinished else 1.0
        self._seed, self._prompt_index = seed, prompt_index
        self._schedule = Schedule(max_tokens, blocks)
        self._iteration = 0
        self._begin()

    def _begin(self) -> None:
        """A new iteration."""
        self._iteration += 1
        self._position = self._block = 0
        self._going_on: list[Tokens] = []
        self._scores: Array = np.zeros(0)  # of what each begins with
        self._lengths: list[int] = []
        self._sizes: list[float] = []  # effective sample sizes
        self._lambda: float | None = None
        self._nats = 0.0  # of the weights

    def ask(self, n: int) -> Controls:
        pause = self._schedule.pause(self._position) if self._ess < 1.0 and n > 1 else None
        return Controls(n=n, sampling=self._sampling, prefixes=self._going_on or None, pause=pause)

    def tell(self, rollouts: Rollouts, rewards: Array) -> ControllerInfo:
        paused = [i for i, reason in enumerate(rollouts.finish_reasons) if reason == "paused"]
        ended = zip(rollouts.tokens, rollouts.finish_reasons, strict=True)
        self._lengths += [len(tokens) for tokens, reason in ended if reason != "paused"]
        if not paused:
            info = ControllerInfo(
                ess=float(np.mean(self._sizes)) if self._sizes else None,
                lambda_=self._lambda,
                kl=self._nats,
                selection_kl=self._nats,
            )
            self._schedule.learn(self._lengths)
            self._begin()
            return info
        before = self._scores if len(self._scores) else np.zeros(len(rewards))
        added, n = (rewards - before)[paused], len(paused)
        self._lambda = lambda_for_ess(added, self._ess * n)
        weights = np.full(n, 1.0 / n)
        if self._lambda is not None:
            weights = importance_weights(added, self._lambda)
        elif np.isfinite(added).any():
            weights = np.isfinite(added) / np.isfinite(added).sum()
        positive = weights[weights > 0]
        self._nats += float((positive * np.log(positive * n)).sum())
        self._sizes.append(effective_sample_size(weights))
        # One number for all: systematic resampling.
        self._block += 1
        seeds = RowSeeds(self._seed, self._prompt_index, self._iteration)
        at = (np.arange(n) + seeds.generator(self._block, "noise").random()) / n
        chosen = np.minimum(np.searchsorted(np.cumsum(weights), at), n - 1)
        mine = np.array(paused)[chosen]
        self._scores, self._going_on = rewards[mine], [rollouts.tokens[i] for i in mine.tolist()]
        self._position = len(self._going_on[0])
        return ControllerInfo()
