"""AISP with one vector held for all steps, antithetic pairs and a lambda that follows the rewards."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from aisp_local.controllers.base import ITERATIONS
from aisp_local.controllers.noise import antithetic
from aisp_local.controllers.weights import (
    effective_sample_size,
    importance_weights,
    lambda_for_ess,
    length,
)
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds
from aisp_local.types import ControllerInfo, Controls, FloatArray, Rollouts, Sampling


class AispHeld:
    """``v^i = u +- sigma eps`` for all steps; ``u <- sum_i w_i v^i`` (Eq. 14), ``w = softmax(r / lambda)``.

    Tying the control across time leaves d directions instead of T * d, few enough for n samples to learn.
    Rows 2j and 2j + 1 are an antithetic pair (an odd last row stands alone), so equal rewards move nothing.
    ``lambda`` gives an effective sample size of ``ess_share * n`` in every iteration.
    Options: ``sigma``, ``ess_share``, ``temperature`` (0: greedy under the perturbation).
    """

    name = "aisp-held"
    iterations = ITERATIONS

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        prompt_index: int = 0,
        sigma: float = 0.7,
        ess_share: float = 0.25,
        temperature: float = 0.0,
    ) -> None:
        if sigma < 0 or not math.isfinite(sigma):
            raise InputError(f"sigma is {sigma}; it must be 0 or greater")
        if not 0.0 < ess_share <= 1.0:
            raise InputError(f"ess_share is {ess_share}; it must be in (0, 1]")
        self._sigma, self._ess_share = sigma, ess_share
        self._seed, self._prompt_index = seed, prompt_index
        self._sampling = Sampling(temperature)
        self._u: FloatArray = np.zeros(d, np.float32)
        self._v: FloatArray | None = None
        self._iteration = 0

    @property
    def mean(self) -> FloatArray:
        """u [d], a copy."""
        return self._u.copy()

    def ask(self, n: int) -> Controls:
        self._iteration += 1
        noise = antithetic(RowSeeds(self._seed, self._prompt_index, self._iteration), n, len(self._u))
        v = (self._u + np.float32(self._sigma) * noise)[:, None]
        self._v = v
        return Controls(n=n, vectors=v, held=True, sampling=self._sampling)

    def tell(self, rollouts: Rollouts, rewards: npt.NDArray[np.float64]) -> ControllerInfo:
        if self._v is None:
            raise InputError("tell() was called before ask()")
        v, self._v = self._v[:, 0], None
        lambda_ = lambda_for_ess(rewards, self._ess_share * len(rewards))
        ess = None
        if lambda_ is not None:
            weights = importance_weights(rewards, lambda_)
            ess = effective_sample_size(weights)
            self._u = np.einsum("n,nd->d", weights, v, dtype=np.float64).astype(np.float32)
        return ControllerInfo(ess=ess, control_norm=length(self._u), lambda_=lambda_)
