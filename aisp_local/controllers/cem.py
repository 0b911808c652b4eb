"""The cross-entropy method on one vector held for all steps: mean and diagonal covariance follow the elites."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from aisp_local.controllers.base import ITERATIONS
from aisp_local.controllers.noise import antithetic
from aisp_local.controllers.weights import NOISE, length
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds
from aisp_local.types import ControllerInfo, Controls, FloatArray, Rollouts, Sampling


class Cem:
    """``v^i = u + s * eps``; of the elites, the best ``elite_share`` of n:

        u <- mean v,    s^2 <- s^2 + rate (mean (v - u)^2 - s^2).

    A variance is over the elites and from the old mean, which does not make a few samples look alike; it moves slowly,
    since n samples say little of d variances. Where rewards do not differ nothing is learnt.
    Options: ``sigma`` (s at first), ``elite_share``, ``rate`` (0: the covariance stays), ``temperature`` (0: greedy
    under the perturbation). Source: Rubinstein and Kroese, The Cross-Entropy Method (2004), with smoothing.
    """

    name = "cem"
    iterations = ITERATIONS

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        prompt_index: int = 0,
        sigma: float = 0.7,
        elite_share: float = 0.25,
        rate: float = 0.3,
        temperature: float = 0.0,
    ) -> None:
        if sigma < 0 or not math.isfinite(sigma):
            raise InputError(f"sigma is {sigma}; it must be 0 or greater")
        if not 0.0 < elite_share <= 1.0:
            raise InputError(f"elite_share is {elite_share}; it must be in (0, 1]")
        if not 0.0 <= rate <= 1.0:
            raise InputError(f"rate is {rate}; it must be in [0, 1]")
        self._elite_share, self._rate = elite_share, rate
        self._seed, self._prompt_index = seed, prompt_index
        self._sampling = Sampling(temperature)
        self._u: FloatArray = np.zeros(d, np.float32)
        self._variance: FloatArray = np.full(d, sigma**2, np.float32)
        self._v: FloatArray | None = None
        self._iteration = 0

    @property
    def mean(self) -> FloatArray:
        """u [d], a copy."""
        return self._u.copy()

    @property
    def variance(self) -> FloatArray:
        """s^2 [d], a copy."""
        return self._variance.copy()

    def ask(self, n: int) -> Controls:
        self._iteration += 1
        noise = antithetic(RowSeeds(self._seed, self._prompt_index, self._iteration), n, len(self._u))
        v = (self._u + np.sqrt(self._variance) * noise).astype(np.float32)
        self._v = v
        return Controls(n=n, vectors=v[:, None], held=True, sampling=self._sampling)

    def tell(self, rollouts: Rollouts, rewards: npt.NDArray[np.float64]) -> ControllerInfo:
        if self._v is None:
            raise InputError("tell() was called before ask()")
        v, self._v = self._v, None
        finite = np.flatnonzero(np.isfinite(rewards))
        spread = float(rewards[finite].std()) if len(finite) else 0.0
        count = max(1, round(self._elite_share * len(rewards)))
        if len(finite) > count and spread > NOISE * float(np.abs(rewards[finite]).max()):
            elites = v[finite[np.argsort(-rewards[finite], kind="stable")[:count]]]
            variance = np.square(elites - self._u).mean(axis=0)
            self._variance += np.float32(self._rate) * (variance - self._variance)
            self._u = elites.mean(axis=0)
        return ControllerInfo(control_norm=length(self._u))
